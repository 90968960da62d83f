"""What is wrong with a line that decodes: words outside the vocabulary, texts that nobody can read, contradictions."""

import re
from collections import Counter

import msgspec

from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, RED_VERDICTS, Stage, Verdict
from moe_ref.records.schema import CaseLine, EndLine, RunLine, from_number

MOST_CASES = 250_000
"""That one run line may name: each of them becomes a line of the report."""

_ID_LIMIT, _TEXT_LIMIT, _MOST_STAGES, _MOST_NUMBERS = 1000, 100_000, 100, 2 ** 16
_VERDICTS, _STAGES = frozenset(map(str, Verdict)), frozenset(map(str, Stage))


def id_fault(case: str) -> str:
    """Why a case id cannot be shown, "" where it can."""
    if not case or len(case) > _ID_LIMIT:
        return f"a case id of {len(case)} characters, but should have 1 to {_ID_LIMIT}"
    return "" if case.isprintable() else "a case id with characters that cannot be printed"


def case_fault(line: CaseLine) -> str:
    """Why a case line cannot be believed or shown, "" where it can."""
    if fault := id_fault(line.case):
        return fault
    if line.verdict not in _VERDICTS:
        return f"verdict {line.verdict!r}, but should be one of {', '.join(Verdict)}"
    if line.first_stage is not None and line.first_stage not in _STAGES:
        return f"first stage {line.first_stage!r} is none of a layer's"
    for name in ("reason", "message", "replay", "purpose"):
        if (length := len(getattr(line, name))) > _TEXT_LIMIT:
            return f"{name} has {length} characters, but should have at most {_TEXT_LIMIT}"
    return _stage_fault(line)


def _stage_fault(line: CaseLine) -> str:
    if len(line.stages) > _MOST_STAGES:
        return f"{len(line.stages)} stages, but should be at most {_MOST_STAGES}"
    for stage in line.stages:
        if stage.stage not in _STAGES:
            return f"stage {stage.stage!r} is none of a layer's"
        places = (stage.bad_tokens, stage.bad_experts, stage.bad_ranks, stage.bad_tiles)
        if max(map(len, places)) > _MOST_NUMBERS:
            return f"stage {stage.stage} names more than {_MOST_NUMBERS} places"
        # Not `> 1`, which nan is not either.
        if line.verdict == Verdict.PASS and not from_number(stage.ratio) <= 1:
            return f"verdict pass, but stage {stage.stage} has error / allowed {stage.ratio}"
    return ""


def run_fault(line: RunLine) -> str:
    """Why a run line cannot be believed, "" where it can."""
    if len(line.cases) > MOST_CASES:
        return f"a run of {len(line.cases)} cases, but should name at most {MOST_CASES}"
    if not names_device(line.environment.get("device", "")):
        return "environment names no device, but should name cpu or a GPU model"
    return ""


def names_device(text: str) -> bool:
    """Whether anything but the number of devices is left to tell a class of hardware by."""
    return re.search(r"[A-Za-z0-9_]", re.sub(r"^\s*\d+\s*x\s+", "", text)) is not None


def readable_cases(line: RunLine) -> tuple[RunLine, list[str]]:
    """The run line with the case ids that can be shown, and what is wrong with each other one."""
    faults = [fault for case in line.cases if (fault := id_fault(case))]
    if not faults:
        return line, []
    return msgspec.structs.replace(line, cases=[case for case in line.cases if not id_fault(case)]), faults


def end_fault(end: EndLine, lines: list[CaseLine], num_refused: int) -> str:
    """What an end line says that its case lines do not, "" where they agree.

    num_refused: lines of the file that could not be read: by so many the counts may differ.
    """
    verdicts = Counter(line.verdict for line in lines)
    differing = [f"{end.verdicts.get(verdict, 0)} {verdict} where case lines have {verdicts[verdict]}"
                 for verdict in Verdict if abs(end.verdicts.get(verdict, 0) - verdicts[verdict]) > num_refused]
    executed = sum(verdicts[verdict] for verdict in EXECUTED_VERDICTS)
    if abs(end.executed - executed) > num_refused:
        differing.append(f"{end.executed} executed where case lines have {executed}")
    red = sum(verdicts[verdict] for verdict in RED_VERDICTS)
    if end.exit_code == 0 and red:
        differing.append(f"exit code 0 where {red} cases failed")
    return f"the end line says {'; '.join(differing)}" if differing else ""
