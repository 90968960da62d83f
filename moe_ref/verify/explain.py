"""The failure message: at most ten lines, the verdict first, a command that repeats the case last."""

from moe_ref.contract.case import Case
from moe_ref.contract.vocabulary import Schedule, Stage, Verdict
from moe_ref.contract.volume import additions_between_ranks
from moe_ref.records.schema import CaseLine, DiagnosisLine, StageResult, from_number
from moe_ref.verify.judge import excessive, place
from moe_ref.verify.likely import likely

_DETAIL_LINES = 3
_LINE_LIMIT = 180


def explain(line: CaseLine, case: Case) -> str:
    """Words for a record line; one line for a pass."""
    head = f"{line.verdict}: {line.reason}" if line.reason else line.verdict
    first, *details = [_cut(text) for text in head.split("\n")]
    if line.verdict in (Verdict.PASS, Verdict.UNSUPPORTED, Verdict.NOT_RUN):
        return first
    culprit = next((stage for stage in line.stages if stage.stage == line.first_stage and stage.num_bad), None)
    lines = [first, *(f"  | {detail}" for detail in details[:1 if culprit else _DETAIL_LINES])]
    lines.append(f"  case    {line.case}   impl {line.implementation.name} {line.implementation.version}, "
                 f"{line.ranks} ranks, {line.device}")
    if line.stages:
        lines.append("  stages  " + " | ".join(_stage(stage, line.first_stage) for stage in line.stages))
    if culprit is not None:
        output = next((stage for stage in line.stages if stage.stage == Stage.OUTPUT), None)
        lines += _where(culprit, case, _said(line, culprit, likely(culprit, case, output)))
    elif failed := next((stage for stage in line.stages if stage.stage == line.first_stage and excessive(stage)), None):
        # Only the sum of many errors is too large: no element says where, but how they round does. Where not even that
        # is, as in a wrong number of calls, no bound was broken.
        lines += _said(line, failed, "") or [f"  rounds  {words}" for words in [_differs_last(line)] if words]
        lines.append(f"  bound   tolerances.yaml checks, predicted variance of {_model(failed.stage, case)}")
    if line.same_bits is not None:
        lines.append(f"  again   {line.runs} runs, {'same bits' if line.same_bits else 'different bits'}")
    lines.append(f"  replay  {line.replay}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) < _LINE_LIMIT else text[:_LINE_LIMIT - 4] + "..."


def _stage(stage: StageResult, first_stage: str | None) -> str:
    value = from_number(stage.ratio)
    text = ("=" if value == 0 else "FAIL") if stage.exact else f"{value:.2g}"
    return f"{stage.stage} {text}" + (" FAIL" if stage.stage == first_stage and not stage.exact else "")


def _differs_last(line: CaseLine) -> str:
    """Of a mismatch of the output, which check B does not have: what it says of the reduced rows."""
    last = next((stage for stage in line.stages if stage.stage == Stage.REDUCED), None)
    return _differs(line, last) if last is not None else ""


def _differs(line: CaseLine, stage: StageResult) -> str:
    """What check B says of a stage, in words."""
    found = next((one for one in line.semantic if one.stage == stage.stage), None)
    if found is None:
        return ""
    subject, siblings = from_number(found.subject_share), from_number(found.sibling_share)
    if subject <= 2 * siblings:
        return ""
    return (f"{subject:.1%} of {stage.stage} differ from layers that round as declared, {siblings:.1%} of those from "
            f"each other")


def _said(line: CaseLine, stage: StageResult, guess: str) -> list[str]:
    """One line at most: the fault that explains the failing stage, a guess from its numbers, or how it rounds."""
    if line.diagnosis is not None:
        return [f"  likely  {_cut(explained(line.diagnosis))}"]
    if guess:
        return [f"  likely  looks like {guess}"]
    return [f"  rounds  {words}" for words in [_differs(line, stage)] if words]


def explained(diagnosis: DiagnosisLine) -> str:
    """As "F02 residual added 2 times explains 99.6 % of the error, the next best 12 %"."""
    share, following = (100 * from_number(one) for one in (diagnosis.share, diagnosis.next_share))
    return f"{diagnosis.fault} explains {share:.1f} % of the error, the next best {following:.0f} %"


def _where(stage: StageResult, case: Case, said: list[str]) -> list[str]:
    spec, tokens = case.problem.spec, case.problem.num_tokens
    parts = []
    if stage.num_bad_tokens or stage.exact:
        parts.append(f"{stage.num_bad_tokens} of {tokens} tokens ({_some(stage.bad_tokens, stage.num_bad_tokens)})")
    if stage.bad_experts:
        parts.append(f"experts {_some(stage.bad_experts)} of {spec.num_experts}")
    if stage.bad_ranks:
        parts.append(f"ranks {_some(stage.bad_ranks)} of {case.parallel.size}")
    if stage.bad_tiles:
        parts.append(f"64-column tiles {_some(stage.bad_tiles)} of {stage.num_tiles}")
    lines = ["  where   " + ", ".join(parts) + f"; best-fit scale {from_number(stage.scale):.4g}, "
             f"bias {from_number(stage.bias):+.2g}"]
    worst = stage.worst
    if stage.exact and stage.note:
        lines.append(f"  note    {_cut(stage.note)}")
    elif worst is not None:
        lines.append(f"  worst   {stage.stage}[{place(worst)}] got {worst.got}, want {worst.want}, "
                     f"allowed {worst.allowed}")
    lines += said
    if stage.is_probe:
        lines.append("  bound   none: sums are exact in any order, so right results agree to the bit")
        return lines
    lines.append(f"  bound   tolerances.yaml, rounding model {_model(stage.stage, case)}")
    return lines


def _some(numbers: list[int], total: int | None = None) -> str:
    shown = ", ".join(str(number) for number in numbers[:6])
    return shown + (", ..." if (total or len(numbers)) > min(6, len(numbers)) else "")


def _model(stage: str, case: Case) -> str:
    if Stage(stage).is_gradient:
        return "whole layer backward, propagated"
    spec, parallel = case.problem.spec, case.parallel
    inner = max(stop - start for start, stop in parallel.ranges(spec.intermediate_size))
    if parallel.schedule is Schedule.GATHER:
        inner = spec.intermediate_size
    in_rows = parallel.schedule is Schedule.ALL_REDUCE_ROWS
    additions = additions_between_ranks(parallel)
    return {
        Stage.LOGITS: f"sum of K = {spec.hidden_size}", Stage.IDS: "scores within their bound, ties to the lower id",
        Stage.WEIGHTS: f"{spec.router.score if spec.router else 'none'} of {spec.num_choices} logits",
        Stage.PERMUTE_SCALES: "largest of a block over the largest code", Stage.PERMUTE_CODES: "rows over their scales",
        Stage.ACT_SCALES: "largest of a block over the largest code", Stage.ACT_CODES: "rows over their scales",
        Stage.GATE_UP: f"sum of K = {spec.hidden_size}",
        Stage.ACT: f"{'two sums' if spec.experts.gated else 'one sum'} of K = {spec.hidden_size}, "
                   f"{spec.experts.activation}, one store",
        Stage.DOWN: f"sum of K = {inner} per rank, weight, one store",
        Stage.SHARED: "shared expert from the tokens",
        Stage.MERGED: f"sum of {spec.top_k} rows" + f", each of {additions + 1} ranks' parts" * in_rows + ", one store",
        Stage.REDUCED: f"{0 if in_rows else additions} additions between ranks",
        Stage.OUTPUT: "whole layer, propagated",
    }[Stage(stage)]
