"""assert_conforms: a function of somebody's is judged against the oracle where it stands, in a test of theirs."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_ref.conforms.cases import PROBES, USUAL, named_cases, planned_cases
from moe_ref.conforms.mismatch import Mismatch
from moe_ref.conforms.subject import Takes, name_of, spec_of_experts, subject_of
from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.errors import UsageValueError, is_integer, one_of_faults, raise_faults
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import RED_VERDICTS, Direction, Dtype, Stage, Verdict
from moe_ref.records.schema import CaseLine, from_number
from moe_ref.setup_cases.ladder import SetupResult, run_setup
from moe_ref.tolerances.contracts import contract
from moe_ref.verify.run.case_runner import USAGE_PREFIX
from moe_ref.verify.run.in_process import UNPROTECTED, InProcess
from moe_ref.verify.run.session import Session

REPLAY = 'assert_conforms(..., cases=["{case}"])'
"""How one case is seen again: the function has no name that a command could load."""


@dataclass(frozen=True)
class Conformed:
    """What was judged, all of it right.

    executed: cases that ran. skipped: how many did not, by reason. left_out: probes that the layer cannot have, by
    name. worst_ratio, worst_case: the output nearest to what it may be off, 1 at the limit. bits: the fewest effective
    bits of an output, see StageResult; infinite where all are exact. lines: of the record. setup: the set-up cases,
    None where they were not asked for or cases were named. process: in which these ran.
    """

    executed: int
    skipped: dict[str, int]
    left_out: dict[str, str]
    worst_ratio: float
    worst_case: str
    bits: float
    lines: tuple[CaseLine, ...]
    setup: SetupResult | None
    process: str = UNPROTECTED


def assert_conforms(function: Callable, spec: MoESpec, *, takes: Takes = "experts",
                    numerics: str | Numerics = "stored_rows", dtypes: Iterable[str] = ("bf16",),
                    tokens: Iterable[int] = (1, 33, 257), tp: Iterable[int] = (1,),
                    directions: Iterable[str] = ("fwd",), probes: Iterable[str] = USUAL,
                    cases: Iterable[str] = (), stages: Iterable[str] = (), device: str = "cpu",
                    deterministic: bool = False, runs: int = 2, setup: bool = True,
                    record: Path | str | None = None) -> Conformed:
    """Judge a function against the fp64 oracle, and raise Mismatch with the failure message unless all of it is right.

    takes "experts": function(x_TH, w13_EFH, w2_EHI, weights_TK, ids_TK) -> y_TH in the dtype of x: F = 2 I, gate rows
    first (F = I without a gate); weights_TK in the format that the contract stores them in, else fp32, ids_TK int64, at
    tp > 1 this rank's columns; with biases of experts the keywords w13_bias_EF and w2_bias_EH, which is zero on all
    ranks but the first. Of the spec's router it is handed the choice of a plain one. takes "layer":
    a whole layer with the signature of moe_ref.moe; stages: those that it records in `trace`.

    numerics: a contract of tolerances.yaml by name, or a Numerics. probes: names of moe_ref.conforms.cases.PROBES.
    cases: ids, in place of all that is planned. deterministic: whether the same bits are promised. record: a folder for
    records.jsonl. The set-up cases are run first, so that a wrong mapping is named before any other failure.

    Everything runs in this process: nothing ends a hang or survives a crash, as `moe-ref verify` does; the result and
    the record say so. Raises UsageValueError on wrong use before anything runs, Mismatch also where no case ran, and
    RuntimeError for an error of the harness.
    """
    __tracebackhide__ = True
    asked = _Asked(takes, tuple(dtypes), tuple(tokens), tuple(tp), tuple(directions), tuple(probes), tuple(stages),
                   device, runs)
    raise_faults("assert_conforms", asked.faults(function, spec))
    judged = spec_of_experts(spec) if takes == "experts" else spec
    kinds = tuple(map(Dtype, asked.dtypes))
    rounds = {kind: numerics if isinstance(numerics, Numerics) else contract(numerics, kind) for kind in kinds}
    ways = tuple(map(Direction, asked.directions))
    shown, named = tuple(map(Stage, asked.stages)), tuple(cases)
    subject = subject_of(function, judged, takes, rounds, asked.tp, ways, shown, deterministic)
    planned, left_out = ((named_cases(named, judged), {}) if named else
                         planned_cases(judged, kinds, asked.tokens, asked.tp, ways, asked.probes))
    session = Session.in_process(name_of(function), InProcess(subject), device, Path(record) if record else None)
    session.settings = replace(session.settings, replay_as=REPLAY, runs=runs)
    try:
        ladder = run_setup(session.settings, session.pool, judged) if setup and not named else None
        if ladder is not None and ladder.failure is not None:
            raise Mismatch(_of_setup(ladder))
        lines = [session.run(one) for one in planned]
    finally:
        session.close()
    return _concluded(lines, left_out, ladder)


@dataclass(frozen=True)
class _Asked:
    takes: str
    dtypes: tuple[str, ...]
    tokens: tuple[int, ...]
    tp: tuple[int, ...]
    directions: tuple[str, ...]
    probes: tuple[str, ...]
    stages: tuple[str, ...]
    device: str
    runs: int

    def faults(self, function: Any, spec: Any) -> list[str]:
        """Everything that is not as it should be, in words."""
        faults = [] if callable(function) else [f"function={function!r}, but should be callable"]
        faults += [] if isinstance(spec, MoESpec) else [f"spec={spec!r}, but should be a MoESpec"]
        faults += one_of_faults("takes", self.takes, Takes)
        for name, least, values in (("tokens", 0, self.tokens), ("tp", 1, self.tp), ("runs", 1, (self.runs,))):
            faults += [f"{name} holds {one!r}, but should hold integers of at least {least}" for one in values
                       if not is_integer(one) or one < least]
        for name, values, known in (("dtypes", self.dtypes, tuple(Dtype)), ("probes", self.probes, tuple(PROBES)),
                                    ("directions", self.directions, tuple(Direction)),
                                    ("stages", self.stages, tuple(stage for stage in Stage if not stage.is_gradient)),
                                    ("device", (self.device,), ("cpu", "cuda"))):
            faults += [f"{name} holds {one!r}, but should be of {', '.join(known)}" for one in values
                       if one not in known]
        faults += ["device cuda, but torch finds none"] * (self.device == "cuda" and not torch.cuda.is_available())
        faults += [f"{name} is empty" for name in ("dtypes", "tokens", "tp", "directions") if not getattr(self, name)]
        return faults


def _of_setup(ladder: SetupResult) -> str:
    """The step that fails, and its case in full."""
    failure = ladder.failure
    assert failure is not None
    return "\n".join([ladder.verdict, *([failure.line.message] if failure.line else [])])


def _concluded(lines: list[CaseLine], left_out: dict[str, str], ladder: SetupResult | None) -> Conformed:
    """The result; raises where something is red, where the harness failed, and where nothing ran."""
    __tracebackhide__ = True
    if usage := [line for line in lines if line.reason.startswith(USAGE_PREFIX)]:
        raise UsageValueError(usage[0].reason.removeprefix(USAGE_PREFIX))
    if broken := [line for line in lines if line.verdict == Verdict.HARNESS_ERROR]:
        raise RuntimeError(broken[0].message)
    red = [line for line in lines if line.verdict in RED_VERDICTS]
    if red:
        others = [f"  {line.case}: {line.verdict}: {line.reason.partition(chr(10))[0]}" for line in red[1:]]
        head = [f"{len(red)} of {len(lines)} cases fail; beside the first:"] * bool(others)
        raise Mismatch("\n".join([red[0].message, *head, *others]))
    ran = [line for line in lines if line.verdict == Verdict.PASS]
    skipped = Counter(f"{line.verdict}: {line.reason}" for line in lines if line.verdict != Verdict.PASS)
    if not ran:
        reasons = "; ".join(f"{count} cases {reason}" for reason, count in skipped.items())
        raise Mismatch(f"no case ran, which is no pass: {reasons or 'none was planned'}")
    outputs = [(stage, line.case) for line in ran for stage in line.stages if stage.stage == Stage.OUTPUT]
    worst, case = max((from_number(stage.ratio), name) for stage, name in outputs)
    # Where nothing is wanted, as of no token, there are no bits to count.
    bits = min((found for stage, _ in outputs if (found := from_number(stage.bits)) > 0), default=math.inf)
    return Conformed(len(ran), dict(skipped), left_out, worst, case, bits, tuple(lines), ladder)
