"""The table of cases, and what they ran on."""

from collections import Counter
from typing import TYPE_CHECKING

from moe_ref.records.schema import CaseLine, StageResult
from moe_ref.report.facts import culprit, is_red, margin_stage
from moe_ref.report.sections.places import shown_rows
from moe_ref.report.sections.view import View, fill

if TYPE_CHECKING:
    from markupsafe import Markup

_FIRST_FACTS = ("device", "device_count", "hardware", "hardware_reason", "fingerprint", "driver", "cuda", "nccl",
                "kernels", "torch", "triton", "numpy", "python", "system", "cpu_count", "commit")
"""What decides how sums are judged and what a difference between two runs may come from."""


def case_section(view: View) -> "Markup":
    """Cases by verdict, red ones first, inside a verdict the least room first."""
    rows = shown_rows(view.lines)
    machines = {(line.ranks, line.device) for found in rows.values() for line in found}
    return fill("sections/cases.html.j2", groups=rows, numbers=Counter(line.verdict for line in view.lines),
                stage_of=_stage_of, machine=" ranks, ".join(*machines) if len(machines) == 1 else "",
                has_reasons=any(line.reason for found in rows.values() for line in found), anchors=view.anchors)


def environment_section(view: View) -> "Markup":
    """Everything that the run line says of machine and versions."""
    header = view.evidence.run.header
    subject, facts = header.implementation, dict(header.environment)
    first = {name: facts.pop(name) for name in _FIRST_FACTS if name in facts}
    run = {"implementation": subject.name, "version": subject.version, "source digest": subject.source_digest,
           "run": header.run, "started": header.started, "tier": header.tier, "lane": header.lane,
           "tolerances": header.tolerances_digest, "oracle": header.oracle_version,
           "expectations": header.expectations.digest if header.expectations else ""}
    rows = [*first.items(), *((name, value) for name, value in run.items() if value), *sorted(facts.items())]
    return fill("sections/environment.html.j2", rows=[(name.replace("_", " "), value) for name, value in rows])


def _stage_of(line: CaseLine) -> StageResult | None:
    """Where a failure starts; of other cases the stage with the least room."""
    return culprit(line) if is_red(line) else margin_stage(line)
