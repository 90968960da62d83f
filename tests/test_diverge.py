"""Protects the grouped problems of `diverge`, its subjects, and what is measured of them."""

import math

import pytest
import torch

from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.accumulators import nearest
from moe_ref.diverge.conversion import AS_THEY_ARE, Conversion
from moe_ref.diverge.grouped import fast_grouped, torch_grouped, torch_loop
from moe_ref.diverge.measure import measure
from moe_ref.diverge.problem import GroupedProblem, GrowthData, Operands, build_operands, ladder
from moe_ref.diverge.subjects import Place, find_subject
from moe_ref.diverge.truth import Bench, joined
from moe_ref.numerics.formats import is_representable, round_to

SMALL = GroupedProblem(terms=256, rows=24, columns=16, experts=3)


def plain(operands: Operands) -> torch.Tensor:
    """The product row by row, with each row's own expert."""
    expert_R = torch.searchsorted(operands.ends_E, torch.arange(len(operands.x_RK), dtype=torch.int32), right=True)
    return torch.stack([operands.w_ENK[e].double() @ x_K.double()
                        for e, x_K in zip(expert_R, operands.x_RK, strict=True)])


def narrow_sum(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """A user's callable: fp32 sums, handed on in bf16."""
    return torch_loop(x_RK, w_ENK, ends_E).bfloat16()


def wrong_shape(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """A user's callable with one row too few."""
    return torch_loop(x_RK, w_ENK, ends_E)[1:]


def test_loads_fall_and_fill_all_rows() -> None:
    """The first expert is the most popular; no row is lost to rounding."""
    assert SMALL.loads == (14, 6, 4)
    assert GroupedProblem(terms=1, rows=8, skew=0.0).loads == (2, 2, 2, 2)


@pytest.mark.parametrize(("text", "lengths"), [("64:512", (64, 128, 256, 512)), ("100:350", (100, 200, 350)),
                                               ("256,2048,14336", (256, 2048, 14336)), ("7:7", (7,))])
def test_ladders(text: str, lengths: tuple[int, ...]) -> None:
    """Doubling reaches the last length, whatever it is."""
    assert ladder(text) == lengths


@pytest.mark.parametrize("text", ["", "0:8", "8:4", "4,4", "a:b", "1:2:3", "-4:8"])
def test_ladders_that_are_none(text: str) -> None:
    """Each is refused with what was given."""
    with pytest.raises(UsageValueError, match="lengths"):
        ladder(text)


def test_sizes_are_all_checked_at_once() -> None:
    """One message lists every fault."""
    with pytest.raises(UsageValueError, match=r"rows=0.*skew=-1.*dtype"):
        GroupedProblem(terms=4, rows=0, skew=-1.0, dtype=Format.TF32)
    with pytest.raises(UsageValueError, match="tp=8, but should be at most its 4 terms"):
        GroupedProblem(terms=4, tp=8)


@pytest.mark.parametrize("dtype", [Format.FP32, Format.FP16, Format.BF16, Format.E4M3])
@pytest.mark.parametrize("data", list(GrowthData))
def test_operands_lie_on_their_grid(dtype: Format, data: GrowthData) -> None:
    """A conversion to the format that they are drawn in changes nothing, so that no error comes from there."""
    operands = build_operands(GroupedProblem(terms=64, dtype=dtype, data=data))
    for tensor in (operands.x_RK.double(), operands.w_ENK.double()):
        same = Conversion(dtype, scaled=dtype is Format.E4M3)(tensor)
        assert torch.equal(same, tensor)
    assert (operands.x_RK < 0).any() == (data is not GrowthData.POSITIVE)


@pytest.mark.parametrize("tp", [1, 3])
def test_truth_is_the_product(tp: int) -> None:
    """Grouping, ranks and gauges agree with a product row by row."""
    bench = Bench(GroupedProblem(terms=200, rows=24, columns=16, experts=3, tp=tp))
    truth, value_RN = bench.truth(), plain(bench.operands)
    torch.testing.assert_close(truth.value_RN, value_RN, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(truth.partials, torch.zeros_like(value_RN)), value_RN, rtol=1e-12, atol=1e-12)
    assert len(truth.partials) == tp
    assert (truth.absolute_RN >= value_RN.abs()).all()
    assert joined([truth, truth]).value_RN.shape == (48, 16)


@pytest.mark.parametrize("call", [torch_loop, torch_grouped, fast_grouped])
def test_measured_products_are_products(call: object) -> None:
    """torch's two and moe_fast's kernel, which the interpreter runs here, compute the same thing."""
    operands = Bench(SMALL).operands
    got = call(operands.x_RK, operands.w_ENK, operands.ends_E)  # type: ignore[operator]
    torch.testing.assert_close(got.double(), plain(operands), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "conversion", "stored"), [
    ("moe_fast:ieee", AS_THEY_ARE, Format.FP32), ("moe_fast:tf32", Conversion(Format.TF32, "truncate"), Format.FP32),
    ("moe_fast:bf16", Conversion(Format.BF16), Format.BF16),
    ("moe_fast:fp8", Conversion(Format.E4M3, scaled=True), Format.FP32),
    ("model:sm80:tf32-rounded", Conversion(Format.TF32), Format.FP32),
    ("model:pairwise-fp16:fp16", Conversion(Format.FP16), Format.FP32)])
@pytest.mark.parametrize("tp", [1, 2])
def test_predicted_subjects_do_what_they_declare(name: str, conversion: Conversion, stored: Format, tp: int) -> None:
    """A model stays within the bound, and near the deviation, that are declared for its accumulator, ranks included."""
    bench = Bench(GroupedProblem(terms=256, rows=24, columns=16, experts=3, tp=tp))
    subject = find_subject(name, Format.FP32, Place())
    y_RN, found = subject.run(bench.problem, bench.operands)
    point = measure(y_RN, bench.truth(), bench.truth(subject.conversion), subject.declared, found)
    assert subject.predicted
    assert (subject.conversion, found) == (conversion, stored)
    assert is_representable(y_RN, stored).all()
    assert point.ratio < 1
    assert point.z < 1.6


def test_a_result_is_judged_by_its_own_error() -> None:
    """The measures of a result whose errors are known: relative size, level, signs."""
    bench = Bench(SMALL)
    truth = bench.truth()
    point = measure(truth.value_RN * (1 - 2.0**-10), truth, truth, nearest(Format.FP32), Format.FP32)
    assert point.relative == pytest.approx(2.0**-10)
    assert point.share == pytest.approx(-1)
    assert point.bits == pytest.approx(math.log2(point.one_bit) + 10)
    assert point.ratio > 1


def test_flipped_stores_show_the_sum_behind_them() -> None:
    """From bf16 outputs alone the error before the store is found within half a bit; without flips, a limit of it."""
    bench = Bench(GroupedProblem(terms=1024, rows=64, columns=64))
    truth = bench.truth()
    noise = torch.randn(truth.value_RN.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error_RN = noise * truth.nearest_RN.sqrt() * 2.0**10
    point = measure(round_to(truth.value_RN + error_RN, Format.BF16), truth, truth, nearest(Format.FP32), Format.BF16)
    assert point.resolved
    assert point.bits == pytest.approx(14, abs=0.5)
    exact = measure(round_to(truth.value_RN, Format.BF16), truth, truth, nearest(Format.FP32), Format.BF16)
    assert (exact.resolved, exact.flips) == (False, 0)
    assert 18 < exact.bits < 24
    assert exact.z == 0


@pytest.mark.parametrize(("name", "words"), [
    ("moe_fast:int8", "moe_fast:"), ("torch:bmm", "torch:loop"), ("torch:loop:fp8", "dtype 'fp8'"),
    ("model:sm90", "model:"), ("model:sm91:bf16", "accumulator 'sm91'"), ("model:sm90:int4", "operands 'int4'"),
    ("model:pairwise:tf32x3", "tf32x3"),
    ("nothing", "module:attr"), ("no.such.module:attr", "cannot be found"), ("math:nothing", "cannot be found")])
def test_subjects_that_are_none(name: str, words: str) -> None:
    """Each is refused with the names that there are."""
    with pytest.raises(UsageValueError, match=words):
        find_subject(name, Format.FP32, Place())


def test_callables_of_users() -> None:
    """A callable is found by module:attr, its stored format is that of what it returns, and its shape is checked."""
    bench = Bench(SMALL)
    y_RN, stored = find_subject(f"{__name__}:narrow_sum", Format.FP32, Place()).run(bench.problem, bench.operands)
    assert stored is Format.BF16
    assert is_representable(y_RN, Format.BF16).all()
    with pytest.raises(UsageValueError, match=r"returned shape \(23, 16\), but should return \(24, 16\)"):
        find_subject(f"{__name__}:wrong_shape", Format.FP32, Place()).run(bench.problem, bench.operands)
    with pytest.raises(UsageTypeError, match="is float, but should be a callable"):
        find_subject("math:pi", Format.FP32, Place())
    with pytest.raises(UsageValueError, match="hardware 'cpu', but should be one of"):
        Place(hardware="cpu")
