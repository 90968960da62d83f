"""The axes of a case, read off its id: what coverage tables count and what plots draw against."""

from functools import cache, lru_cache

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.features import Feature, features_of
from moe_ref.contract.vocabulary import Stage

UNREADABLE = {"case id": "not readable by this version"}

_OWN_AXIS = {Feature.DENSE, Feature.GROUPS, Feature.SELECTION_BIAS, Feature.SHARED_EXPERT, Feature.RESIDUAL}
"""Features that an axis of their own tells in every case; the others are axes of the cases that use them."""

_HIDDEN_STAGES = (Stage.LOGITS, Stage.GATE_UP, Stage.ACT)
_INTERMEDIATE_STAGES = (Stage.DOWN, Stage.MERGED, Stage.REDUCED)


@cache
def read_case(text: str) -> Case | None:
    """The case of an id; None for an id of another grammar, or of a model this version does not know."""
    try:
        return parse_case(text)
    except UsageValueError:
        return None


@cache
def case_axes(text: str) -> dict[str, str]:
    """axis -> value, the axes that most often separate failures first; UNREADABLE for a foreign id."""
    case = read_case(text)
    if case is None:
        return UNREADABLE
    problem, spec, router = case.problem, case.problem.spec, case.problem.spec.router
    yes_no = {True: "yes", False: "no"}
    parallel = case.parallel
    axes = {"dtype": str(problem.dtype), "tp": str(parallel.tp), "ep": str(parallel.ep),
            "split": "uneven" if parallel.splits else "even", "direction": str(case.direction),
            "schedule": str(parallel.schedule), "tokens on": str(parallel.tokens), "hosting": str(parallel.hosting),
            "storage": str(case.storage), "pattern": str(problem.pattern),
            "data": str(problem.data), "activation": spec.experts.activation,
            "score": router.score if router else "no router"}
    if router:
        axes |= {"renormalize": yes_no[router.renormalize], "selection bias": yes_no[router.selection_bias is not None],
                 "expert groups": f"{router.num_groups_kept} of {router.num_groups}"}
    gates = {"none": "plain", "sigmoid": "gated", "router": "router-gated"}
    shared = "none" if spec.shared is None else gates[spec.shared.gate]
    axes |= {"shared expert": shared, "residual": yes_no[problem.residual], "model": problem.model or "none",
             "tokens": _number(problem.num_tokens), "hidden": _number(spec.hidden_size),
             "intermediate": _number(spec.intermediate_size), "experts": _number(spec.num_experts),
             "top-k": _number(spec.top_k)}
    return axes | {str(feature): "yes" for feature in sorted(features_of(spec) - _OWN_AXIS)}


@lru_cache(4096)
def _number(value: int) -> str:
    """The one text of a number: a hundred thousand cases have few."""
    return str(value)


def axis_sort_key(value: str) -> tuple[int, float, str]:
    """Numbers by size, then words by alphabet."""
    return (0, float(value), "") if value.isdecimal() else (1, 0.0, value)


def size_of(text: str) -> float:
    """Multiply-adds of a case, routed and shared, to find the smallest of several; inf for a foreign id."""
    case = read_case(text)
    if case is None:
        return float("inf")
    spec, tokens = case.problem.spec, max(case.problem.num_tokens, 1)
    columns = spec.top_k * spec.intermediate_size * (1 + spec.experts.num_projections)
    if spec.shared:
        columns += spec.shared.intermediate_size * (1 + spec.shared.mlp.num_projections)
    return tokens * spec.hidden_size * columns * case.parallel.tp


def reduction(stage: str, text: str) -> tuple[str, int] | None:
    """(axis, K): what the last long sum of a stage runs over; None where there is none.

    "hidden" and "intermediate"; "output" is the whole layer, which sums over one and then the other.
    Stages count as the group that ends with them: `act` of a fused gate_up + act sums over H. K is the
    unsharded length, so that one layer stands at the same K for every tp.
    """
    case = read_case(text)
    if case is None:
        return None
    spec = case.problem.spec
    if stage in _HIDDEN_STAGES:
        return "hidden", spec.hidden_size
    if stage in _INTERMEDIATE_STAGES:
        return "intermediate", spec.intermediate_size
    if stage == Stage.OUTPUT:
        return "output", spec.hidden_size + spec.intermediate_size
    if stage == Stage.SHARED and spec.shared:
        return "intermediate", spec.shared.intermediate_size
    return None


def ladder_step(text: str, axis: str) -> tuple[str, int] | None:
    """(the id without its degree, the degree) of a case with even shares; one ladder is all degrees of one such id.

    axis: tp or ep. None for uneven shares, which are of one degree, and for a foreign id.
    """
    case = read_case(text)
    if case is None or case.parallel.splits or case.token_shares:
        return None
    degree = case.parallel.tp if axis == "tp" else case.parallel.ep
    return "-".join(word for word in text.split("-") if word != f"{axis}{degree}"), degree


def rows_per_expert(text: str) -> float | None:
    """Mean routed rows of an expert, T K / E; None without a router, without tokens and for a foreign id."""
    case = read_case(text)
    if case is None or case.problem.spec.router is None or not case.problem.num_tokens:
        return None
    return case.problem.num_tokens * case.problem.spec.top_k / case.problem.spec.num_experts
