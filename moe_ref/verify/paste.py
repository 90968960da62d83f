"""Entries of an expectations file to be pasted for failures that no entry covers: YAML, the reason left to fill in."""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

from moe_ref.contract.vocabulary import RED_VERDICTS, Stage, Verdict
from moe_ref.expectations.load import Expectations
from moe_ref.expectations.schema import TO_FILL_IN
from moe_ref.records.schema import CaseLine
from moe_ref.verify.expected import own_stages

_SHOWN, _DAYS = 3, 90
_PART_LIMIT = 100
"""Characters of a reason that tell a crash from others."""


def entries_to_paste(lines: Sequence[CaseLine], expectations: Expectations, ratio_limit: float) -> list[str]:
    """Lines of YAML that cover the first case of each of the first few distinct failures; [] where none can be covered.

    A mismatch has an entry for each stage that fails on its own, but for those which have one.
    """
    alike: dict[tuple[str, ...], list[CaseLine]] = {}
    for line in lines:
        if kinds := tuple(_kinds(line, expectations, ratio_limit)):
            alike.setdefault(kinds, []).append(line)
    expires = datetime.now(UTC).date() + timedelta(days=_DAYS)
    found = []
    for kinds, members in list(alike.items())[:_SHOWN]:
        more = f"    # and {len(members) - 1} more that fail so" * (len(members) > 1)
        for kind in kinds:
            found += [f'  - cases: "{members[0].case}"{more}', *(f"    {row}" for row in kind.split("\n")),
                      f'    reason: "{TO_FILL_IN}"', f'    link: "{TO_FILL_IN}"', f"    expires: {expires}"]
    return found


def _kinds(line: CaseLine, expectations: Expectations, ratio_limit: float) -> Iterator[str]:
    """What tells the failure from others, as rows of an entry each."""
    covering = expectations.covering(line.case)
    if line.verdict == Verdict.MISMATCH and line.first_stage is not None:
        for stage in own_stages(tuple(line.stages), Stage(line.first_stage), ratio_limit):
            if not any(entry.excuses(Verdict.MISMATCH, stage, line.reason) for entry in covering):
                yield f"verdict: mismatch\nstage: {stage}"
    elif line.verdict in RED_VERDICTS - {Verdict.MISMATCH, Verdict.UNEXPECTED_PASS}:
        # Time limits, stages and batches that differ are other ones from case to case.
        has_part = line.verdict in (Verdict.CRASH, Verdict.STRUCT)
        part = re.sub(r" \[on [^\]]*\]\Z", "", line.reason.partition("\n")[0])[:_PART_LIMIT]
        # JSON's texts are YAML's.
        yield f"verdict: {line.verdict}" + f"\ncontains: {json.dumps(part)}" * bool(has_part and part)
