"""Which way a number of tolerances.yaml loosens the verdict is known for each of them."""

from fnmatch import fnmatchcase

import pytest

from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.numbers import LOOSER, Looser, loosens, looser_way, numbers_of
from moe_ref.tolerances.quantile import tau

NUMBERS = numbers_of(load_tolerances().file)


def test_every_number_has_a_way() -> None:
    """A key that is new in the file has to be thought through before a baseline can be compared by it."""
    assert [path for path in NUMBERS if looser_way(path) is None] == []
    assert [pattern for pattern in LOOSER if not any(fnmatchcase(path, pattern) for path in NUMBERS)] == []


def test_numbers_stand_under_their_paths() -> None:
    """Numbers, switches, and words that decide something; neither reasons nor what a record holds case by case."""
    assert NUMBERS["checks.stage.sigmas_factor"] == load_tolerances().file.checks.stage.sigmas_factor
    assert NUMBERS["hardware.sm90.truncates"] == 1.0
    assert NUMBERS["hardware.sm90.tf32_operands.truncate"] == 1.0
    assert NUMBERS["checks.output.filters.ranks"] == 1.0
    assert NUMBERS["growth.bands.moe_fast:fp8 e4m3 on sm90.bits.low"] == 13.0
    assert not any(path.endswith(("reason", "source")) or path.startswith("contracts") for path in NUMBERS)


@pytest.mark.parametrize(("path", "before", "now", "looser"), [
    ("checks.stage.sigmas_factor", 3.0, 6.0, True), ("checks.stage.sigmas_factor", 3.0, 2.0, False),
    ("checks.output.alpha", 1e-9, 1e-12, True), ("checks.output.filters.ranks", 1.0, None, True),
    ("hardware.sm80.kept_bits", 24.0, 20.0, True), ("hardware.cpu.kept_bits", 0.0, 24.0, True),
    ("hardware.sm80.tf32_operands.truncate", None, 1.0, True), ("hardware.sm80.products_per_step", 8.0, 4.0, None),
    ("power_guard.k_tile.factor", 1.5, 1.2, True), ("power_guard.floors.bf16.floor", 2.0, 3.0, False),
    ("growth.bands.moe_fast:fp8 e4m3 on sm90.bits.low", 13.0, 11.0, True),
    ("growth.bands.moe_fast:fp8 e4m3 on sm90.bits.low", 13.0, None, True),
    ("growth.bands.other fp32 on cpu.bits.low", None, 11.0, False),
    ("published.vllm.numbers.fp32.absolute", 0.02, 1.0, None), ("limits.ratio.max", 1.0, float("nan"), None),
    ("a.number.of.tomorrow", 1.0, 2.0, None)])
def test_a_change_is_looser_stricter_or_neither(path: str, before: float | None, now: float | None,
                                                looser: bool | None) -> None:
    assert loosens(path, before, now) is looser


def test_a_smaller_alpha_allows_more() -> None:
    """The table says so, and so does the quantile that every threshold is made of."""
    assert looser_way("checks.stage.alpha") is Looser.SMALLER
    assert tau(1000, 1e-12) > tau(1000, 1e-9)
