"""The combinations of the gate itself, those that its accepted table has."""

from collections.abc import Iterable

from moe_fast.compile.cases import CASES, FP8_TRAINING
from moe_fast.compile.combinations import Combination, combinations_of
from moe_fast.compile.products import tuned_combinations
from moe_ref.contract.case_id import parse_case


def own_combinations(architectures: Iterable[str]) -> list[Combination]:
    """Of its cases and of every tuned tile, each once."""
    chosen = list(architectures)
    found = combinations_of(map(parse_case, CASES), chosen)
    found += combinations_of(map(parse_case, FP8_TRAINING), chosen, in_fp8=True) + tuned_combinations(chosen)
    return list({one.key: one for one in found}.values())
