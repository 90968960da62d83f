"""Protects what tolerances.yaml says: formats, hardware classes, thresholds, contracts and other projects' criteria."""

import math

import msgspec
import pytest
import torch

from moe_fast.capabilities import CAPABILITIES
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.numerics.tensor_core import matmul, tensor_core
from moe_ref.tolerances.base import Range
from moe_ref.tolerances.contracts import contract
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.published import Cosine, Elementwise, RelativeRms, published
from moe_ref.tolerances.quantile import tau
from moe_ref.verify.bounds.rounding import RoundingModel, gamma
from moe_ref.verify.published import accepts

FILE = load_tolerances().file
SMALL = {Format.E4M3: torch.float8_e4m3fn, Format.E5M2: torch.float8_e5m2}


@pytest.mark.parametrize("name", [name for name in Format if name is not Format.TF32])
def test_formats_are_those_of_torch(name: Format) -> None:
    """Significand, smallest normal and largest number, against torch's own tables."""
    entry, info = FILE.formats[name], torch.finfo({**TORCH_DTYPES, **SMALL}[name])
    assert 2.0 ** (1 - entry.significand_bits) == info.eps
    assert 2.0**entry.min_exponent == info.smallest_normal
    assert entry.max == info.max


def test_tf32_has_the_exponents_of_fp32_and_the_significand_of_fp16() -> None:
    """torch has no such dtype: 19 bits of a sign, 8 of exponent and 10 of fraction."""
    entry = FILE.formats[Format.TF32]
    assert entry.significand_bits == FILE.formats[Format.FP16].significand_bits
    assert entry.min_exponent == FILE.formats[Format.FP32].min_exponent
    assert entry.max == (2 - 2.0**-10) * 2.0**127


@pytest.mark.parametrize(("name", "operands", "factor"), [
    ("cpu", Format.BF16, 1.0), ("cpu", Format.E4M3, 1.0), ("sm80", Format.FP32, 1.0),
    # (2 / k) (1 + (k + 1) 2^(23 - F)): docs/bounds.md.
    ("sm80", Format.FP16, (2 / 8) * (1 + 9 / 2)), ("sm80", Format.TF32, (2 / 4) * (1 + 5 / 2)),
    # 0.66 and 0.81 for long sums, but one cut of a sum of two costs two units.
    ("sm90", Format.BF16, 1.0), ("sm90", Format.TF32, 1.0), ("sm100", Format.BF16, 1.0), ("sm100", Format.E5M2, 1.0),
    # 14 bits of the sum and 13 of each addend: 2^10 times as coarse as 24 bits.
    ("sm90", Format.E4M3, (2 / 32) * 2**10 * (1 + 33)),
])
def test_the_factor_follows_from_the_step(name: str, operands: Format, factor: float) -> None:
    """Error of one step over the products in it, in units of 2^-24, and never below that of fp32 additions."""
    assert FILE.hardware[name].factor_of(operands) == factor
    assert FILE.hardware[name].factor >= FILE.hardware[name].factor_of(Format.FP16)


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 17, 18, 33, 65])
@pytest.mark.parametrize("operands", [Format.FP16, Format.BF16, Format.TF32, Format.E4M3])
@pytest.mark.parametrize("name", ["sm80", "sm90", "sm100", "cuda"])
def test_short_sums_stay_inside_the_factor(name: str, operands: Format, size: int) -> None:
    """One large product beside small ones loses most: a sum of two reaches 0.88 of its bound on sm90."""
    generator = torch.Generator().manual_seed(size)
    bits = FILE.formats[operands].significand_bits

    def drawn(*shape: int) -> torch.Tensor:
        whole = torch.randint(2 ** (bits - 1), 2**bits, shape, generator=generator).double()
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return sign * whole * torch.exp2(torch.randint(-5, 1, shape, generator=generator) - bits)

    a_MK, b_KN = drawn(60, size), drawn(size, 60)
    error = (matmul(a_MK, b_KN, tensor_core(FILE.hardware[name], operands)) - a_MK @ b_KN).abs()
    allowed = gamma(size, FILE.hardware[name].factor_of(operands) * 2.0**-24) * (a_MK.abs() @ b_KN.abs())
    assert (error <= allowed).all()


def test_an_unknown_device_is_the_worst_of_the_known() -> None:
    """Number by number, so that no right kernel on any of them is accused."""
    worst = FILE.hardware["cuda"]
    for name in ("sm80", "sm90", "sm100"):
        entry = FILE.hardware[name]
        assert worst.factor >= entry.factor
        assert worst.truncates >= entry.truncates
        assert (worst.tf32_operands, entry.tf32_operands) == ("truncate", "truncate")
        for count in ("products_per_step", "tf32_products_per_step", "kept_bits", "significand_bits", "fp8_kept_bits",
                      "fp8_significand_bits"):
            assert getattr(worst, count) <= getattr(entry, count), (name, count)
        for operands in Format:
            assert worst.factor_of(operands) >= entry.factor_of(operands), (name, operands)


@pytest.mark.parametrize("name", ["cpu", "cuda", "sm80", "sm90", "sm100"])
def test_every_class_has_a_rounding_model(name: str) -> None:
    """The unit of a long sum is the factor times that of the accumulation format."""
    model = RoundingModel(load_tolerances(), name, Format.FP32)
    assert model.unit == FILE.hardware[name].factor * 2.0**-24


@pytest.mark.parametrize("ends", [[0.7, 0.65], [0.7, 0.7], [0.1, math.inf], [math.nan, 1.0], [0.1], [0.1, 0.2, 0.3]])
def test_a_range_has_two_ends_in_order(ends: list[float]) -> None:
    """An empty range would refuse every curve, an infinite one none."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(ends, Range)


def test_a_range_holds_its_ends() -> None:
    """And nothing beyond them."""
    band = msgspec.convert([0.25, 0.5], Range)
    assert [value in band for value in (0.2499, 0.25, 0.5, 0.5001)] == [False, True, True, False]


def test_the_bound_has_no_slack() -> None:
    """Above 1 it would no longer be a bound; zeros must miss it by more than a right result may."""
    assert FILE.limits.ratio.max == 1.0
    assert FILE.power_guard.zeros.factor > 1.0
    assert set(FILE.power_guard.floors) == set(Dtype)


@pytest.mark.parametrize(("count", "alpha"), [(1, 0.05), (1, 1e-9), (1000, 1e-9), (10**6, 1e-9), (10**9, 1e-12)])
def test_tau_is_the_gaussian_quantile(count: int, alpha: float) -> None:
    """count times the probability beyond it, on either side, is alpha again; more errors need more sigmas."""
    assert count * math.erfc(tau(count, alpha) / math.sqrt(2)) == pytest.approx(alpha, rel=1e-9)
    assert tau(count, alpha) < tau(count + 1, alpha) < tau(count + 1, alpha / 2)


def test_tau_as_tables_have_it() -> None:
    """Of one error at 5 %, and of a thousand at 1e-9."""
    assert [round(tau(1, 0.05), 3), round(tau(1000, 1e-9), 2)] == [1.960, 7.13]


@pytest.mark.parametrize(("count", "alpha"), [(0, 1e-9), (1.5, 1e-9), (1, 0.0), (1, 1.0), (1, math.nan)])
def test_tau_refuses_what_has_no_quantile(count: int, alpha: float) -> None:
    """With the number that was given."""
    with pytest.raises(UsageValueError, match=str(count) if alpha == 1e-9 else str(alpha)):
        tau(count, alpha)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_stored_rows_is_the_contract_of_the_fast_layer(dtype: Dtype) -> None:
    """What a study says of this contract is said of moe_fast."""
    assert contract("stored_rows", dtype) == CAPABILITIES.numerics[dtype]


def test_contracts_differ_in_what_they_store() -> None:
    """From everything in the dtype of the case to nothing but the result."""
    loop, registers, wide = (contract(name, Dtype.BF16) for name in ("torch_loop", "registers", "wide"))
    assert set(loop.storage.values()) == {Format.BF16}
    assert (loop.weight_at, loop.activation, loop.merge) == ("merge", Format.BF16, Format.BF16)
    assert registers.storage == {Stage.REDUCED: Format.BF16}
    assert {stage for stage, stored in wide.storage.items() if stored is not Format.FP32} == {Stage.REDUCED}
    assert [one.reduce for one in (loop, registers, wide)] == [Format.BF16, Format.FP32, Format.FP32]


def test_an_unknown_contract_is_named() -> None:
    """With those that there are."""
    with pytest.raises(UsageValueError, match="contract 'loop', but should be one of stored_rows, torch_loop"):
        contract("loop", Dtype.FP32)


def test_every_project_is_compared_in_bf16() -> None:
    """The format that all of them publish a criterion for."""
    assert [one.project for one in published(FILE.published, Dtype.BF16)] == [
        "torch_testing", "vllm", "sglang", "triton_kernels", "deepgemm"]
    assert [one.project for one in published(FILE.published, Format.E4M3)] == ["deepgemm"]


def torch_says(got: torch.Tensor, want: torch.Tensor, **options: float) -> bool:
    """Whether torch.testing.assert_close passes."""
    try:
        torch.testing.assert_close(got, want, **options)
    except AssertionError:
        return False
    return True


def pairs(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Results beside references, from equal to wrong, with cancelled, infinite and NaN elements among them."""
    generator = torch.Generator().manual_seed(1)
    want = torch.randn(64, generator=generator)
    noise = torch.randn(64, generator=generator)
    found = [(want * (1 + scale * noise) + shift, want) for scale in (0.0, 1e-7, 1e-4, 1e-3, 8e-3, 0.05)
             for shift in (0.0, 5e-6, 1e-2)]
    odd = want.clone()
    odd[3], odd[7] = torch.inf, -torch.inf
    broken = want.clone()
    broken[5] = torch.nan
    found += [(odd, odd), (odd, want), (want, odd), (-odd, odd), (broken, want), (broken, broken), (want[:0], want[:0])]
    return [(got.to(dtype), reference.to(dtype)) for got, reference in found]


@pytest.mark.parametrize("dtype", list(Dtype))
def test_the_elementwise_criterion_is_assert_close(dtype: Dtype) -> None:
    """Its defaults are those of the installed torch, and vLLM's and SGLang's numbers mean what they pass to it."""
    verdicts = set()
    for one in published(FILE.published, dtype):
        if not isinstance(one.criterion, Elementwise):
            continue
        options = {"atol": one.criterion.absolute, "rtol": one.criterion.relative}
        for got, want in pairs(TORCH_DTYPES[dtype]):
            says = torch_says(got, want, **({} if one.project == "torch_testing" else options))
            assert accepts(one.criterion, got, want) == says, (one.project, got - want)
            verdicts.add((one.project, says))
    assert len(verdicts) == 6


def test_the_relative_criterion_measures_against_the_root_mean_square() -> None:
    """Cancelled elements count against the size of the whole; the largest and the mean error have a limit each."""
    criterion, want = RelativeRms(max=2e-2, rms=4e-3), torch.ones(100)
    want[0] = 0.0
    rms = math.sqrt(0.99)
    for error, passes in ((0.019 * rms, True), (0.021 * rms, False)):
        got = want.clone()
        got[0] = error
        assert accepts(criterion, got, want) == passes
    assert accepts(criterion, want * 1.0039, want)
    assert not accepts(criterion, want * 1.0041, want)
    assert accepts(criterion, want[:0], want[:0])
    assert not accepts(criterion, torch.where(want == 0, torch.nan, want), want)
    infinite = torch.where(want == 0, torch.inf, want)
    assert accepts(criterion, infinite, infinite)
    assert not accepts(criterion, infinite, want)


def test_the_cosine_criterion_is_half_the_squared_relative_error() -> None:
    """So 0.4 % of the whole passes 1e-5 where 0.5 % does not; zeros beside zeros are no number and fail."""
    want = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for scale, passes in ((1.004, True), (1.005, False)):
        assert accepts(Cosine(max=1e-5), want * scale, want) == passes
    assert not accepts(Cosine(max=1e-5), torch.zeros(3), torch.zeros(3))


def test_results_that_cannot_be_compared_are_refused() -> None:
    """A project compares with a reference of the same shape and dtype."""
    with pytest.raises(UsageValueError, match=r"\(2,\), but should have that of want, \(3,\)"):
        accepts(Cosine(max=1.0), torch.ones(2), torch.ones(3))
    with pytest.raises(UsageTypeError, match=r"torch\.float32, but should be as want, torch\.float64"):
        accepts(Cosine(max=1.0), torch.ones(3), torch.ones(3).double())
