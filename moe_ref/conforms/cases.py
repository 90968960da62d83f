"""The cases of one layer: every token count, dtype, degree and direction that is asked for, and a few probes."""

from dataclasses import replace
from itertools import product

from moe_ref.contract.case import Case, Problem
from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Data, Direction, Dtype, Pattern, Storage
from moe_ref.setup_cases.steps import resized
from moe_ref.tiers.tiers import PlannedCase

PROBES: dict[str, tuple[str, dict[str, object]]] = {
    "zipf": ("popular experts", {"pattern": Pattern.ZIPF}),
    "empty": ("experts without a token", {"pattern": Pattern.EMPTY}),
    "allone": ("every token's first choice is the same expert", {"pattern": Pattern.ALL_TO_ONE}),
    "outlier": ("one channel in 64 is 64 times larger", {"data": Data.OUTLIER}),
    "large": ("large pre-activations", {"data": Data.LARGE}),
    "exact": ("sums that are exact in any order: bits decide", {"data": Data.EXACT}),
    "holes": ("slots that name no expert", {"pattern": Pattern.HOLES, "data": Data.EXACT}),
    "nonfinite": ("NaN and infinity stay in their rows", {"data": Data.NON_FINITE}),
    "one": ("one token", {"num_tokens": 1}),
    "none": ("no token", {"num_tokens": 0}),
    "padded": ("tensors inside larger ones of NaN", {}),
}
"""Name of a probe: what it is there for, and what of a problem it changes; `padded` changes where tensors lie."""

USUAL = ("zipf", "empty", "allone", "outlier", "exact", "nonfinite", "one", "none")
"""`holes` and `padded` ask for more than most functions promise."""

PROBE_TOKENS = 33


def planned_cases(spec: MoESpec, dtypes: tuple[Dtype, ...], tokens: tuple[int, ...], tp: tuple[int, ...],
                  directions: tuple[Direction, ...],
                  probes: tuple[str, ...]) -> tuple[list[PlannedCase], dict[str, str]]:
    """All of them without repetition, and the probes that such a layer cannot have, with the reason."""
    found, left_out = {}, {}
    for dtype, count, degree, direction in product(dtypes, tokens, tp, directions):
        problem = Problem(spec=spec, num_tokens=count, dtype=dtype)
        case = Case(problem=problem, parallel=Parallel(tp=degree), direction=direction)
        found[format_case(case)] = PlannedCase(case=case, purpose=f"{count} tokens, tp {degree}, {direction}")
    for name, dtype in product(probes, dtypes):
        purpose = PROBES[name][0]
        try:
            case = probe(name, Problem(spec=spec, num_tokens=PROBE_TOKENS, dtype=dtype))
        except UsageValueError as error:
            left_out[name] = str(error)
        else:
            found[format_case(case)] = PlannedCase(case=case, purpose=purpose)
    return list(found.values()), left_out


def probe(name: str, problem: Problem) -> Case:
    """A probe of that layer; raises UsageValueError where it cannot have it."""
    changed = PROBES[name][1]
    storage = Storage.PADDED if name == "padded" else Storage.OUT_IN
    return Case(problem=replace(problem, **changed), storage=storage)  # pyrefly: ignore


def named_cases(texts: tuple[str, ...], spec: MoESpec) -> list[PlannedCase]:
    """Cases by their ids; raises UsageValueError for one that is not of this layer."""
    cases = [parse_case(text) for text in texts]
    for text, case in zip(texts, cases, strict=True):
        own = case.problem.spec
        # The layer of a set-up case is the same mathematics in other sizes.
        if own not in (spec, resized(spec, own.hidden_size, own.intermediate_size, own.top_k)):
            raise UsageValueError(f"case {text}: another layer than the spec that is asked for")
    return [PlannedCase(case=case, purpose="named") for case in cases]
