"""Which cases a mutant meets, and in what order: those that its patterns name first, cheap ones before dear ones."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Ranks
from moe_ref.score.messages import CaseToTry
from moe_ref.score.schema import Mutant, Right
from moe_ref.tiers.tiers import PlannedCase, tier

DEFAULT_TIERS = ("smoke", "quick", "families", "ranks")
MOST_OF_A_PATTERN = 12
"""Cases of one pattern that a mutant meets; a full run has no limit."""
RIGHT_TIER = "smoke"


def cost(planned: PlannedCase) -> float:
    """What a case costs, roughly: products of all tokens, and a start for each process."""
    spec, tokens = planned.case.problem.spec, planned.case.problem.num_tokens
    work = spec.hidden_size * spec.intermediate_size * tokens * (spec.top_k + 1)
    return work + 2e6 * planned.case.parallel.size + (1e8 if planned.ranks is not Ranks.LOCAL else 0.0)


def planned_cases(tiers: Sequence[str] = DEFAULT_TIERS) -> dict[str, PlannedCase]:
    """All cases of the tiers by id; one that two tiers have is tried on the cheaper ranks."""
    found: dict[str, PlannedCase] = {}
    for name in tiers:
        for one in tier(name).cases:
            if one.case_id not in found or cost(one) < cost(found[one.case_id]):
                found[one.case_id] = one
    return found


def carriers(mutant: Mutant, cases: dict[str, PlannedCase], full: bool = False) -> list[CaseToTry]:
    """The cases for a mutant; all of the tiers in a full run, those named first.

    What only a GPU can run may name cases of a size that no default tier has.
    """
    if mutant.runs_on == "gpu":
        own = [name for name in mutant.carried_by if not set(name) & set("*?[") and name not in cases]
        cases = cases | {name: PlannedCase(case=parse_case(name), purpose=mutant.what) for name in own}
    chosen = _matching(mutant.carried_by, cases, None if full else MOST_OF_A_PATTERN)
    if full:
        rest = sorted((one for one in cases.values() if one.case_id not in chosen), key=cost)
        chosen |= {one.case_id: one for one in rest}
    return [CaseToTry(one.case_id, str(one.ranks)) for one in chosen.values() if one.case_id != mutant.silent_on]


def right_cases(right: Right, cases: dict[str, PlannedCase]) -> list[CaseToTry]:
    """The pinned cases of every right variant, and those that it names itself."""
    chosen = {one.case_id: one for one in tier(RIGHT_TIER).cases} | _matching(right.cases, cases, MOST_OF_A_PATTERN)
    return [CaseToTry(one.case_id, str(one.ranks)) for one in chosen.values()]


def _matching(patterns: Iterable[str], cases: dict[str, PlannedCase], most: int | None) -> dict[str, PlannedCase]:
    chosen: dict[str, PlannedCase] = {}
    for pattern in patterns:
        found = sorted((one for name, one in cases.items() if fnmatchcase(name, pattern)), key=cost)
        chosen |= {one.case_id: one for one in found[:most] if one.case_id not in chosen}
    return chosen
