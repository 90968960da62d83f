"""Protects the choice of cases: enough of them, every pair of axis values, the same on every machine."""

import os
import subprocess
import sys
from itertools import combinations, pairwise, product

import pytest

from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Direction, Dtype, Ranks, Scheme
from moe_ref.tiers import encoded
from moe_ref.tiers.axes import AXES, COMBINATIONS, COVER, PLAIN, SHAPES, SPREADS, row_case
from moe_ref.tiers.tiers import MINIMUM_EXECUTED, tier, with_tp

NAMES = ("smoke", "quick", "full", "nightly")


@pytest.mark.parametrize(("name", "fewest"), [("smoke", 24), ("quick", 250), ("full", 280), ("nightly", 500),
                                              ("families", 60), ("ranks", 100), ("conformance", 20)])
def test_a_tier_has_enough_cases(name: str, fewest: int) -> None:
    """More cases than must be executed, and the promise is not below the documented one."""
    one = tier(name)
    assert one.minimum_executed == MINIMUM_EXECUTED[name] >= fewest
    assert len(one.cases) >= one.minimum_executed


@pytest.mark.parametrize("name", [*NAMES, "families", "ranks", "conformance"])
def test_ids_are_unique_and_parse(name: str) -> None:
    """The same id twice would judge one case and count two; every case says why it is there."""
    cases = tier(name).cases
    assert len({one.case_id for one in cases}) == len(cases)
    for one in cases:
        assert parse_case(one.case_id) == one.case
        assert one.purpose.strip()


def test_tiers_are_nested() -> None:
    """What a pull request has run, a nightly run repeats."""
    for small, large in pairwise(NAMES):
        assert {(one.case_id, one.ranks) for one in tier(small).cases} <= \
               {(one.case_id, one.ranks) for one in tier(large).cases}


def test_quick_covers_every_possible_pair() -> None:
    """Most defects show in an interaction of two; counted from the cases themselves, not from what a tier says."""
    assert tier("quick").pairs_covered == tier("quick").pairs_possible == len(COVER.possible)
    seen: set[tuple] = set()
    for one in tier("quick").cases:
        plain = not one.case.problem.model and one.case.problem.scheme is Scheme.PLAIN
        if plain and one.case.direction is Direction.FORWARD and not combined(one.case):
            values = case_values(one.case)
            seen |= set(combinations(((name, values[name]) for name in AXES), 2))
    assert COVER.possible - seen == set()


def test_quick_covers_every_pair_of_encoded_axes() -> None:
    """Each scheme meets every degree, dtype, spread and kind of data there, and every degree each of these."""
    seen: set[tuple] = set()
    for one in tier("quick").cases:
        problem, parallel = one.case.problem, one.case.parallel
        if problem.scheme is not Scheme.PLAIN:
            values = {"scheme": problem.scheme, "tp": parallel.tp, "dtype": problem.dtype, "data": problem.data,
                      "ep": parallel.ep > 1, "pattern": problem.pattern, "hidden": problem.spec.hidden_size}
            seen |= set(combinations(values.items(), 2))
    wanted = {"scheme": encoded.SCHEMES, "ep": (False, True), "hidden": (256, 160, 96)} | {
        name: encoded.AXES[name] for name in ("tp", "dtype", "data", "pattern")}
    for first, second in combinations(("scheme", "tp", "dtype", "data", "ep", "pattern", "hidden"), 2):
        assert {((first, a), (second, b)) for a in wanted[first] for b in wanted[second]} - seen == set()


def test_every_scheme_meets_every_degree_in_every_dtype() -> None:
    """Tier encoded, and so nightly, has the whole grid, with experts over ranks and without."""
    grid = {(one.case.problem.scheme, one.case.parallel.tp, one.case.parallel.ep > 1, one.case.problem.dtype)
            for one in tier("encoded").cases}
    assert grid == set(product(encoded.SCHEMES, (1, 2, 3, 4, 8), (False, True), Dtype))
    assert {one.case_id for one in tier("encoded").cases} <= {one.case_id for one in tier("nightly").cases}


def case_values(case: object) -> dict[str, object]:
    """The axis values of a case, read off the case alone."""
    problem, spec, router = case.problem, case.problem.spec, case.problem.spec.router
    experts = f".E{spec.num_experts}.K{spec.top_k}" if router else ""
    kind = PLAIN["router"]
    if router:
        kind = router.score + ("-groups" if router.num_groups > 1 else "-norm" if router.renormalize else "")
        kind += "-bias" if router.score == "sigmoid" and router.num_groups == 1 else ""
    shared = "none" if spec.shared is None else "shared-gate" if spec.shared.gate == "sigmoid" else "shared"
    return {"shape": f"T{problem.num_tokens}.H{spec.hidden_size}.I{spec.intermediate_size}{experts}",
            "dtype": problem.dtype, "tp": case.parallel.tp, "pattern": problem.pattern, "router": kind,
            "activation": spec.experts.activation, "shared": shared, "residual": problem.residual,
            "data": problem.data, "storage": case.storage, "spread": spread_name(case)}


def combined(case: object) -> bool:
    """Whether a case spreads its layer in several ways at once."""
    return format_case(case).endswith(COMBINATIONS)


def test_ways_to_spread_a_layer_meet() -> None:
    """Every combination on virtual and on real ranks; no axis value of its own, since pairs would be too many."""
    for name, ranks in (("quick", Ranks.LOCAL), ("ranks", Ranks.GLOO)):
        ids = [one.case_id for one in tier(name).cases if one.ranks is ranks]
        assert [one for one in COMBINATIONS if not any(text.endswith(f"-{one}") for text in ids)] == []


def spread_name(case: object) -> str:
    """The one value of the axis that makes this grid and these shares."""
    experts = case.problem.spec.num_experts
    fitting = [name for name, spread in SPREADS.items()
               if spread.over(case.parallel.tp, experts) == (case.parallel, case.token_shares)]
    assert fitting, case
    return fitting[0]


def test_impossible_pairs_are_impossible() -> None:
    """Left out: a dense layer with a router, groups that cannot be formed, no expert to spare, shares for one rank."""
    everything = {((a, x), (b, y)) for a, b in combinations(AXES, 2) for x in AXES[a] for y in AXES[b]}
    shapes = {shape.name: shape for shape in SHAPES}
    for pair in everything - COVER.possible:
        values = dict(pair)
        if values == {"tp": 1, "spread": "uneven"}:
            continue
        assert "shape" in values, f"{pair} is possible for some shape"
        shape = shapes[values["shape"]]
        dense = shape.num_experts == 0 and ("router" in values or "pattern" in values)
        no_groups = "groups" in str(values.get("router", "")) and not any(
            shape.num_experts % n == 0 and shape.num_experts // n > 1 for n in (2, 3, 4))
        no_spare = str(values.get("pattern")) == "empty" and shape.num_experts - shape.top_k < 2
        assert dense or no_groups or no_spare, pair


def test_smoke_sees_every_dtype_degree_and_both_kinds_of_ranks() -> None:
    """Twenty seconds still touch each value of the axes that break most often."""
    cases = tier("smoke").cases
    assert {one.case.parallel.tp for one in cases} == set(AXES["tp"])
    assert {one.case.problem.dtype for one in cases} == set(Dtype)
    assert {one.case.problem.pattern for one in cases} == set(AXES["pattern"])
    assert {one.ranks for one in cases} == {Ranks.LOCAL, Ranks.GLOO}
    assert any(one.case.problem.num_tokens == 0 for one in tier("quick").cases)
    assert {spread_name(one.case) for one in cases if one.case.parallel.tp == 2} == set(SPREADS)
    assert {one.case.direction for one in cases} == set(Direction)


def test_process_ranks_see_every_spread() -> None:
    """Two hundred cases and more on real processes, of 2, 3, 4 and 8 ranks among others, in every dtype."""
    cases = tier("ranks").cases
    assert len(cases) > 200
    assert {one.ranks for one in cases} == {Ranks.GLOO}
    assert {one.case.parallel.size for one in cases} >= {2, 3, 4, 8}
    forward = [one.case for one in cases if one.case.direction is Direction.FORWARD and not combined(one.case)]
    for spread in SPREADS:
        assert {case.problem.dtype for case in forward if spread_name(case) == spread} == set(Dtype)


def test_every_axis_value_makes_a_case() -> None:
    """A value that no case can have would be counted as covered by nothing."""
    for name, values in AXES.items():
        for value in values:
            assert any(row_case(PLAIN | {"shape": shape.name, "tp": 2, name: value}) for shape in SHAPES), (name, value)


def test_the_same_cases_in_every_process() -> None:
    """Sets iterate in an order that depends on PYTHONHASHSEED; the tiers must not, nor need torch."""
    hash_seed = "4711" if os.environ.get("PYTHONHASHSEED") == "0" else "0"  # another one than this process has
    script = ("import sys; from moe_ref.tiers.tiers import tier\n"
              "for n in ('smoke', 'quick', 'full', 'nightly', 'families', 'ranks', 'conformance', 'encoded'):\n"
              "    for c in tier(n).cases: print(n, c.case_id, c.ranks.value, c.purpose)\n"
              "assert 'torch' not in sys.modules")
    output = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": hash_seed},
                            capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [f"{name} {one.case_id} {one.ranks.value} {one.purpose}"
                                   for name in (*NAMES, "families", "ranks", "conformance", "encoded")
                                   for one in tier(name).cases]


def test_an_unknown_tier_lists_the_known_ones() -> None:
    """Wrong use, with the way out in the message."""
    with pytest.raises(UsageValueError, match="unknown tier 'fast'; known: smoke, quick, full, nightly, famil"):
        tier("fast")


def test_the_degree_can_be_changed() -> None:
    """`--tp 1,2,4` keeps problem, purpose and ranks."""
    one = tier("smoke").cases[0]
    other = with_tp(one, 5)
    assert other.case.parallel.tp == 5
    assert (other.case.problem, other.purpose, other.ranks) == (one.case.problem, one.purpose, one.ranks)
