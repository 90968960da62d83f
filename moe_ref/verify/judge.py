"""From numbers to a verdict: a pure function, no tensors, no clock, no environment."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.records.schema import StageResult, Statistic, Worst, from_number
from moe_ref.verify.measure.measurement import Measurement

Calls = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class WantedCalls:
    """What one rank should hand to collectives: its payload, and what describes that, in any form of about its size."""

    payload: Calls
    describing: Calls = ()


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run besides the numbers.

    calls: per rank, (group.operation, elements). wanted_calls: the same as the schedule has it; empty when
    calls are not judged. promised_*: what the subject declares of itself.
    differing_batches: other batches of the same tokens whose rows differ, and how.
    """

    calls: tuple[Calls, ...]
    wanted_calls: tuple[WantedCalls, ...]
    same_bits: bool | None
    differing_stages: tuple[str, ...]
    promised_deterministic: bool
    promised_equal_ranks: bool
    changed_inputs: tuple[str, ...]
    differing_batches: tuple[tuple[str, str], ...] = ()
    promised_batch_invariant: bool = False


@dataclass(frozen=True)
class Guard:
    """What a case must be able to see besides zeros: least signal, and least factor of each mutant that it has."""

    signal: float = 0.0
    mutants: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """The verdict, one line that says why, and the first failing stage in data order."""

    verdict: Verdict
    reason: str = ""
    first_stage: Stage | None = None


_ORDER = list(Stage)
_DESCRIBING_FACTOR, _FREE_COUNTS = 2, 64
"""How much larger than one number per id and weight their description may be, and the elements of counts beside it."""


def failing(stages: tuple[StageResult, ...], limit: float) -> list[StageResult]:
    """Stages with an element above the limit, or a statistic above its own, in data order."""
    bad = [stage for stage in stages if from_number(stage.ratio) > limit or excessive(stage)]
    return sorted(bad, key=lambda stage: _ORDER.index(Stage(stage.stage)))


def excessive(stage: StageResult) -> list[Statistic]:
    """Statistics above what they may be, the farthest first."""
    over = [one for one in stage.statistics if from_number(one.value) > from_number(one.allowed)]
    return sorted(over, key=lambda one: -from_number(one.value) / from_number(one.allowed))


def judge(measurement: Measurement, facts: RunFacts, ratio_limit: float, power_limit: float,
          guard: Guard = Guard()) -> Judgement:
    """Structure first, then numbers, then promises; a pass without power says nothing and counts as not run."""
    if measurement.struct_faults:
        return Judgement(Verdict.STRUCT, "\n".join(measurement.struct_faults))
    if bad := failing(measurement.stages, ratio_limit):
        return Judgement(Verdict.MISMATCH, describe(bad[0]) + _calls_note(facts), Stage(bad[0].stage))
    if facts.changed_inputs:
        return Judgement(Verdict.STRUCT, f"changed its inputs {', '.join(facts.changed_inputs)}, which must not change")
    if measurement.differing_ranks and facts.promised_equal_ranks:
        ranks = _list_numbers(list(measurement.differing_ranks))
        stage = measurement.differing_stage
        return Judgement(Verdict.MISMATCH, f"{stage}: declared equal on all ranks, but the bits of "
                                           f"rank {ranks} differ from those of the first that holds the same", stage)
    if wrong := wrong_calls(facts):
        return Judgement(Verdict.STRUCT, wrong, Stage.REDUCED)
    if facts.same_bits is False and facts.promised_deterministic:
        stages = ", ".join(facts.differing_stages)
        return Judgement(Verdict.NONDETERMINISTIC, f"declared deterministic, but {stages} differ between two runs")
    if facts.differing_batches and facts.promised_batch_invariant:
        words = "; ".join(f"{found} when {name}" for name, found in facts.differing_batches)
        return Judgement(Verdict.NONDETERMINISTIC, f"declared batch invariant, but {words}")
    if measurement.power < power_limit and measurement.unjudged_tokens:
        return Judgement(Verdict.NOT_RUN, "the ids are hidden and the choice of experts is ambiguous for "
                                          f"{measurement.unjudged_tokens} tokens, so nothing can be said")
    if measurement.power < power_limit:
        return Judgement(Verdict.NOT_RUN, "no power under the declared rounding: an all-zero result would be off by "
                                          f"{measurement.power:.3g} times the bound, should be {power_limit:g}; "
                                          "recording act, down and merged, or a narrower case, gives it")
    if unseen := _unseen(measurement, guard):
        return Judgement(Verdict.NOT_RUN, f"no power under the declared rounding: {unseen}")
    return Judgement(Verdict.PASS)


_MUTANT_WORDS = {
    "k_tile": "64 products missing from 64 columns of one expert",
    "w_1ulp": "one routing weight off by one unit of bf16",
    "tp_partial": "one expert's rows missing from one rank's sum",
    "store_rz": "stores that cut off",
}


def _unseen(measurement: Measurement, guard: Guard) -> str:
    """The first mistake that would pass, in words; empty where all would be seen."""
    for name, needed in guard.mutants.items():
        mutant = measurement.mutants.get(name)
        if mutant is not None and mutant.factor < needed:
            return (f"the case's own mutant {name} ({_MUTANT_WORDS[name]}) would pass, at {mutant.factor:.3g} of the "
                    f"threshold of {mutant.where}, should be at least {needed:g}")
    if measurement.signal < guard.signal:
        return (f"the output is {measurement.signal:.3g} times what it may be off by (root mean squares), should be at "
                f"least {guard.signal:g}")
    return ""


def _calls_note(facts: RunFacts) -> str:
    wrong = wrong_calls(facts)
    return f"\n{wrong}" if wrong else ""


def wrong_calls(facts: RunFacts) -> str:
    """How the collectives differ from the schedule's, in words; empty when they do not.

    Ids and weights that go with rows may be sent packed, twice, or with counts, by gathers and exchanges of any group,
    so only their amount is limited. Where there is nothing to send a call may be left out.
    """
    for rank, (calls, wanted) in enumerate(zip(facts.calls, facts.wanted_calls, strict=False)):
        described = sum(elements for _, elements in wanted.describing)
        left = [call for call in calls if call[1] > 0]
        for call in (call for call in wanted.payload if call[1] > 0):
            if call not in left:
                return _wrong_words(rank, calls, wanted)
            left.remove(call)
        allowed = _DESCRIBING_FACTOR * described + _FREE_COUNTS if wanted.describing else 0
        moves = all(name.endswith((".all_gather", ".all_to_all")) for name, _ in left)
        if not moves or sum(elements for _, elements in left) > allowed:
            return _wrong_words(rank, calls, wanted)
    return ""


def _wrong_words(rank: int, calls: Calls, wanted: WantedCalls) -> str:
    """What is too much and what is missing; those of both are only counted."""
    surplus, missing = list(calls), []
    for call in wanted.payload:
        if call in surplus:
            surplus.remove(call)
        else:
            missing.append(call)
    for call in wanted.describing:
        if call in surplus:
            surplus.remove(call)
    beside = f"beside {len(calls) - len(surplus)} as they should be, " * (len(calls) > len(surplus))
    if not surplus:
        return f"collectives of rank {rank}: {beside}{_list_calls(tuple(missing))} missing"
    if not missing:
        return f"collectives of rank {rank}: {beside}{_list_calls(tuple(surplus))} too many"
    return (f"collectives of rank {rank}: {beside}{_list_calls(tuple(surplus))}, "
            f"but should be {_list_calls(tuple(missing))}")


def _list_calls(calls: Calls) -> str:
    return ", ".join(f"{operation} of {elements} elements" for operation, elements in calls) or "none"


_INSIDE = "each element is inside its bound, but errors"
_STATISTIC_WORDS = {
    "rms": f"{_INSIDE} are too large as a whole: root mean square over predicted",
    "sign": f"{_INSIDE} follow the sign of the output (a store that truncates? a scale?): sigmas",
    "slots": f"{_INSIDE} follow one routed row (its weight?): sigmas",
    "ranks": f"{_INSIDE} follow one rank's part of an expert: sigmas",
}


def describe(stage: StageResult) -> str:
    """One line: stage, how far over the bound, and where in the words of the layer."""
    worst = stage.worst
    if stage.is_probe and worst is not None:
        return (f"{stage.stage}: exact probe, {stage.num_bad} of {stage.num_checked} elements differ, "
                f"first at {place(worst)}")
    if stage.exact:
        return f"{stage.stage}: {stage.num_bad} of {stage.num_checked} wrong, rank {_list_numbers(stage.bad_ranks)}"
    ratio, bound_ratio, over = from_number(stage.ratio), from_number(stage.bound_ratio), excessive(stage)
    if over and not stage.num_bad:
        one = over[0]
        return (f"{stage.stage}: {_STATISTIC_WORDS[one.name]} {from_number(one.value):.3g}, "
                f"but should be at most {from_number(one.allowed):.3g}" + _statistic_place(one))
    ratio, over_what = (bound_ratio, "bound") if bound_ratio > 1 else (ratio, "what is likely")
    head = f"{stage.stage}: {f'{ratio:.3g}x' if math.isfinite(ratio) else 'infinitely'} over {over_what}"
    experts = f", expert {_list_numbers(stage.bad_experts)}" if stage.bad_experts else ""
    ranks = f", rank {_list_numbers(stage.bad_ranks)}" if stage.bad_ranks else ""
    tokens = f", {stage.num_bad_tokens} token{'s' * (stage.num_bad_tokens != 1)}" if stage.num_bad_tokens else ""
    return head + experts + ranks + tokens + _follows(over)


def _follows(over: list[Statistic]) -> str:
    """Whose errors they are, where the output alone is known: the part of a layer that they follow most."""
    along = {one.name: one for one in over if one.expert is not None}
    if not along:
        return ""
    first, ranks = next(iter(along.values())), along.get("ranks")
    most = "" if ranks is None else f", most in rank {ranks.rank} of tp"
    return f", errors follow expert {first.expert}{most}"


def _statistic_place(one: Statistic) -> str:
    named = ", ".join(f"{name} {value}" for name, value in (("token", one.token), ("expert", one.expert),
                                                           ("tp rank", one.rank)) if value is not None)
    return f" [{named}]" if named else ""


def place(worst: Worst) -> str:
    """Where an element sits, in the words of the layer."""
    return ", ".join(f"{name} {value}" for name, value in (
        ("token", worst.token), ("row", worst.row), ("slot", worst.slot), ("expert", worst.expert),
        ("rank", worst.rank), ("column", worst.column)) if value is not None)


def _list_numbers(numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:6])
    return shown + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
