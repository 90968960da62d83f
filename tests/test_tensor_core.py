"""Protects the model of tensor cores: the same rule in fractions gives the same bits; published facts come out."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import entry, round_to
from moe_ref.numerics.summation import matmul as summed_in_order
from moe_ref.numerics.tensor_core import (
    TensorCore,
    matmul,
    tensor_core,
    tf32_matmul,
    tf32x3_matmul,
    with_fp16_accumulator,
)
from moe_ref.tolerances.load import load_tolerances

HARDWARE = load_tolerances().file.hardware
TENSOR_CORES = {f"{name}-{operand}": tensor_core(HARDWARE[name], operand)
                for name in ("sm80", "sm90", "sm100")
                for operand in (Format.FP16, Format.BF16, Format.TF32, Format.E4M3, Format.E5M2)}
CORES = TENSOR_CORES | {
    "volta": TensorCore(4, 23, operand=Format.FP16),
    "sm90 fp16 sum": with_fp16_accumulator(TENSOR_CORES["sm90-fp16"]),
    "sm80 fp16 sum": with_fp16_accumulator(TENSOR_CORES["sm80-fp16"]),
    "sm90 e4m3 fp16 sum": with_fp16_accumulator(TENSOR_CORES["sm90-e4m3"]),
    "sm90 e4m3 promoted": replace(TENSOR_CORES["sm90-e4m3"], promote_every=64),
}


def exponent_of(value: Fraction) -> int:
    """floor(log2 |value|), from the lengths of numerator and denominator."""
    power = abs(value.numerator).bit_length() - value.denominator.bit_length()
    return power if Fraction(2) ** power <= abs(value) else power - 1


def cut(value: Fraction, unit: Fraction) -> Fraction:
    return unit * (abs(value) // unit) * (1 if value >= 0 else -1)


def stored_slowly(value: Fraction, bits: int, least: int, nearest: bool) -> Fraction:
    if value == 0:
        return value
    unit = Fraction(2) ** (max(exponent_of(value), least) - bits + 1)
    return round(value / unit) * unit if nearest else cut(value, unit)


def dot_slowly(a_K: list[Fraction], b_K: list[Fraction], core: TensorCore) -> Fraction:
    """One element of a product, one instruction after the other, in fractions, for finite results."""
    operand, accumulator = entry(core.operand), entry(core.accumulator)
    total = register = Fraction(0)
    for start in range(0, len(a_K), core.products_per_step):
        addends, step = [], slice(start, start + core.products_per_step)
        for a, b in zip(a_K[step], b_K[step], strict=True):
            if a * b != 0:
                exponent = sum(max(exponent_of(factor), operand.min_exponent) for factor in (a, b))
                addends.append((a * b, exponent))
        if total != 0:
            addends.append((total, max(exponent_of(total), accumulator.min_exponent)))
        # A sum of zero counts as 2^-126 in the alignment.
        largest = max([exponent for _, exponent in addends] + [-126] * (total == 0) + [-126])
        exact = sum((cut(value, Fraction(2) ** (largest - core.kept_bits)) for value, _ in addends), Fraction(0))
        total = stored_slowly(exact, core.significand_bits, accumulator.min_exponent, core.final == "nearest")
        if core.promote_every and (start + core.products_per_step) % core.promote_every == 0:
            register, total = stored_slowly(register + total, 24, -126, nearest=True), Fraction(0)
    return stored_slowly(register + total, 24, -126, nearest=True) if core.promote_every else total


def slowly(a_MK: torch.Tensor, b_KN: torch.Tensor, core: TensorCore) -> torch.Tensor:
    rows = [[Fraction(value) for value in row] for row in a_MK.tolist()]
    columns = [[Fraction(value) for value in column] for column in b_KN.T.tolist()]
    return torch.tensor([[float(dot_slowly(row, column, core)) for column in columns] for row in rows],
                        dtype=torch.float64)


def random(shape: tuple[int, int], operand: Format, seed: int, spread: float = 0.0) -> torch.Tensor:
    """Normal numbers of the format; spread: standard deviation of the binary logarithm of a further factor."""
    drawn = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=drawn, dtype=torch.float64)
    return round_to(value * torch.exp2(spread * torch.randn(shape, generator=drawn, dtype=torch.float64)), operand)


def adversarial(shape: tuple[int, int], operand: Format, seed: int) -> torch.Tensor:
    """Powers of two and their neighbours over the whole range, subnormals, zeros, and opposites beside each other."""
    drawn, limits = torch.Generator().manual_seed(seed), entry(operand)
    # The square of the largest stays below half of fp16's largest sum, or is no concern at all.
    low = max(limits.min_exponent - limits.significand_bits + 1, -70)
    power = torch.randint(low, min(7, -low), shape, generator=drawn).double()
    ulp = 2.0 ** (1 - limits.significand_bits)
    near = 1 + ulp * torch.randint(-1, 2, shape, generator=drawn).double()
    value = round_to(torch.exp2(power) * near, operand) * torch.randint(-1, 2, shape, generator=drawn).double()
    value[:, 1::3] = -value[:, 0:value.shape[1] - 1:3][:, :value[:, 1::3].shape[1]]
    return value


def opposed(operand: Format, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors from subnormal to large that meet their opposites, so that no product is large; a quarter are zeros."""
    drawn, reach = torch.Generator().manual_seed(seed), min(100, -entry(operand).min_exponent - 2)
    power = torch.randint(-reach, reach + 1, (64,), generator=drawn).double()
    pair = []
    for rows, exponent in ((5, power), (4, -power)):
        value = torch.randn(rows, 64, generator=drawn, dtype=torch.float64) * torch.exp2(exponent - reach // 2)
        pair.append(round_to(value * (torch.rand(rows, 64, generator=drawn) < 0.75), operand))
    return pair[0], pair[1].T.contiguous()


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("seed", range(3))
def test_the_rule_in_fractions_gives_the_same_bits(name: str, seed: int) -> None:
    """One rule, written twice: fp64 tensors with bit tricks, and fractions one addend at a time."""
    core = CORES[name]
    for a_MK, b_KN in [
        (random((5, 75), core.operand, seed), random((75, 4), core.operand, seed + 10)),
        (random((5, 64), core.operand, seed, spread=4.0), random((64, 4), core.operand, seed + 10, spread=4.0)),
        (adversarial((5, 64), core.operand, seed), adversarial((4, 64), core.operand, seed + 10).T.contiguous()),
        opposed(core.operand, seed),
    ]:
        if core.accumulator is Format.FP16:
            a_MK = round_to(a_MK.clamp(-8, 8), core.operand)
            b_KN = round_to(b_KN.clamp(-8, 8), core.operand)
        assert torch.equal(matmul(a_MK, b_KN, core), slowly(a_MK, b_KN, core))


def test_the_double_can_disagree() -> None:
    """One kept bit more or less shows, so equality above is no accident of easy operands."""
    core = CORES["sm90-bf16"]
    a_MK, b_KN = random((5, 64), core.operand, 1, spread=4.0), random((64, 4), core.operand, 2, spread=4.0)
    wanted = slowly(a_MK, b_KN, core)
    for other in (replace(core, kept_bits=24), replace(core, kept_bits=26), replace(core, products_per_step=8),
                  replace(core, significand_bits=23), replace(core, final="nearest")):
        assert not torch.equal(matmul(a_MK, b_KN, other), wanted)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 33])
def test_a_short_last_instruction_is_filled_with_zeros(size: int) -> None:
    """K need not be a multiple of k."""
    core = CORES["sm90-bf16"]
    a_MK, b_KN = random((3, size), core.operand, 3), random((size, 2), core.operand, 4)
    missing = -size % 16
    filled_a, filled_b = torch.nn.functional.pad(a_MK, (0, missing)), torch.nn.functional.pad(b_KN, (0, 0, 0, missing))
    assert torch.equal(matmul(a_MK, b_KN, core), matmul(filled_a, filled_b, core))
    assert torch.equal(matmul(a_MK, b_KN, core), slowly(a_MK, b_KN, core))


def test_rows_in_blocks_are_rows_alone() -> None:
    """What is held at once decides nothing."""
    core = CORES["sm90-bf16"]
    a_MK, b_KN = random((40, 32), core.operand, 5), random((32, 700), core.operand, 6)
    alone = torch.cat([matmul(row[None], b_KN, core) for row in a_MK])
    assert torch.equal(matmul(a_MK, b_KN, core), alone)


def test_empty_products_are_zero() -> None:
    """No rows, no columns or no terms."""
    core = CORES["sm90-bf16"]
    for rows, terms, columns in [(0, 4, 2), (2, 4, 0), (2, 0, 3)]:
        a_MK, b_KN = (torch.ones(shape, dtype=torch.float64) for shape in ((rows, terms), (terms, columns)))
        c_MN = matmul(a_MK, b_KN, core)
        assert c_MN.shape == (rows, columns)
        assert not c_MN.any()


def test_an_addend_is_cut_below_the_kept_bits_of_the_largest() -> None:
    """Hopper keeps 25 fraction bits, Ampere 24, Volta 23: 2^p - 2^p + 1 is 1 up to p = F and 0 beyond."""
    def survives(core: TensorCore, p: int) -> bool:
        low = 2.0 ** -(p // 4)
        rest = p - 2 * (p // 4)
        a_MK = torch.tensor([[2.0 ** (rest - rest // 2), -(2.0 ** (rest - rest // 2)), low]], dtype=torch.float64)
        b_KN = torch.tensor([[2.0 ** (rest // 2)], [2.0 ** (rest // 2)], [low]], dtype=torch.float64)
        return matmul(a_MK, b_KN, core).item() == low * low
    for name, kept in (("volta", 23), ("sm80-fp16", 24), ("sm90-fp16", 25), ("sm90-e4m3", 13), ("sm100-e5m2", 25)):
        assert [survives(CORES[name], p) for p in range(1, 28)] == [p <= kept for p in range(1, 28)]


def test_one_small_matmul_tells_generations_apart() -> None:
    """What FTTN (arXiv 2403.00232) found: one tiny product is 0 on V100 and A100, and not 0 on H100.

    With operands of our own: a pair of 2^25 that cancels, and two addends of 1.5 beside it, below the kept bits of
    Volta and Ampere, cut to 1 each by Hopper, whole where additions begin with the pair and are rounded one by one.
    """
    a_1K = torch.tensor([[2.0**15, -(2.0**15), 1.5, 1.5]], dtype=torch.float64)
    b_K1 = torch.tensor([[2.0**10], [2.0**10], [1.0], [1.0]], dtype=torch.float64)
    got = [matmul(a_1K, b_K1, CORES[name]).item() for name in ("volta", "sm80-fp16", "sm90-fp16", "sm100-fp16")]
    assert got == [0.0, 0.0, 2.0, 2.0]
    assert summed_in_order(a_1K, b_K1, "sequential").item() == 3.0


def test_the_fp8_accumulator_of_hopper_keeps_fourteen_bits() -> None:
    """DeepSeek-V3 reports about 14 bits: 2^14 + 1 is not held in the next instruction, 2^13 + 1 is."""
    core = CORES["sm90-e4m3"]
    for p, held in ((13, True), (14, False)):
        a_1K = torch.zeros(1, 64, dtype=torch.float64)
        a_1K[0, 0], a_1K[0, 32] = 2.0**7, 1.0
        b_K1 = torch.ones(64, 1, dtype=torch.float64)
        b_K1[0, 0] = 2.0 ** (p - 7)
        assert (matmul(a_1K, b_K1, core).item() == 2.0**p + 1) is held


def test_promotion_cures_the_growth_of_fp8_errors() -> None:
    """Numbers of one sign: cut sums of 4096 terms lose percents, begun anew every 128 terms hardly a thousandth."""
    drawn = torch.Generator().manual_seed(7)
    a_MK, b_KN = (round_to(torch.rand(shape, generator=drawn, dtype=torch.float64), Format.E4M3)
                  for shape in ((8, 4096), (4096, 8)))
    truth = a_MK @ b_KN
    plain, promoted = (((matmul(a_MK, b_KN, core) - truth) / truth).square().mean().sqrt().item()
                       for core in (CORES["sm90-e4m3"], replace(CORES["sm90-e4m3"], promote_every=128)))
    assert 0.01 < plain < 0.2
    assert promoted < 2e-3
    assert torch.equal(matmul(a_MK, b_KN, replace(CORES["sm90-e4m3"], promote_every=8192)).float(),
                       matmul(a_MK, b_KN, CORES["sm90-e4m3"]).float())


@pytest.mark.parametrize("operands", ["nearest", "truncate"])
def test_three_tf32_products_are_far_nearer_than_one(operands: str) -> None:
    """The small parts bring back all but the last bits of fp32 operands."""
    core = CORES["sm90-tf32"]
    a_MK, b_KN = random((8, 32), Format.FP32, 8), random((32, 8), Format.FP32, 9)
    truth = a_MK @ b_KN
    one = (tf32_matmul(a_MK, b_KN, core, operands) - truth).square().mean().sqrt()
    three = (tf32x3_matmul(a_MK, b_KN, core, operands) - truth).square().mean().sqrt()
    assert three * 200 < one


def test_small_tf32_products_come_first() -> None:
    """By hand: two parts of 2^-24, one of either side, would both be lost if 1 came before them."""
    value = torch.tensor([[1 + 2.0**-12]], dtype=torch.float64)
    assert tf32x3_matmul(value, value, CORES["sm90-tf32"], "truncate").item() == 1 + 2.0**-11
    assert tf32_matmul(value, value, CORES["sm90-tf32"], "truncate").item() == 1
    apart = 2.0**-12 * (1 + 2.0**-12)
    a_1K = torch.tensor([[1.0, apart, 1.0]], dtype=torch.float64)
    b_K1 = torch.tensor([[1.0], [1.0], [apart]], dtype=torch.float64)
    assert tf32x3_matmul(a_1K, b_K1, CORES["sm90-tf32"], "truncate").item() == 1 + 2.0**-11 + 2.0**-23


@pytest.mark.parametrize(("left", "right", "wanted"), [
    ([math.inf, 1.0], [1.0, 1.0], math.inf), ([math.inf, 1.0], [-1.0, 1.0], -math.inf),
    ([math.inf, math.inf], [1.0, -1.0], math.nan), ([math.inf, 1.0], [0.0, 1.0], math.nan),
    ([math.nan, 1.0], [1.0, 1.0], math.nan), ([2.0**100, 1.0], [2.0**100, 1.0], math.inf),
    ([-(2.0**100), 1.0], [2.0**100, 1.0], -math.inf),
    ([2.0**64, -(2.0**64), 1.0], [2.0**64, 2.0**64, 1.0], 0.0),
])
def test_what_is_not_finite(left: list[float], right: list[float], wanted: float) -> None:
    """IEEE's rules; a sum that overflows is infinite, and opposites of one instruction cancel before they can."""
    rest = [0.0] * (20 - len(left))
    a_MK = torch.tensor([left + rest, [1.0] * 20], dtype=torch.float64)
    b_KN = torch.tensor([right + rest], dtype=torch.float64).T
    got = matmul(a_MK, b_KN, CORES["sm90-bf16"])[0, 0].item()
    assert got == wanted or (math.isnan(got) and math.isnan(wanted))


def test_a_sum_that_overflowed_stays_infinite() -> None:
    """Also fp16 sums, beyond 65504; the other elements keep their bits."""
    core = with_fp16_accumulator(CORES["sm80-fp16"])
    a_MK = torch.zeros(2, 24, dtype=torch.float64)
    a_MK[0, ::8], a_MK[1] = torch.tensor([60000.0, 60000.0, -60000.0], dtype=torch.float64), 1.0
    b_KN = torch.ones(24, 1, dtype=torch.float64)
    assert matmul(a_MK, b_KN, core).flatten().tolist() == [math.inf, 24.0]


def test_subnormal_sums_are_kept() -> None:
    """The smallest fp32 number survives as a sum, half of it is cut away."""
    core, one = CORES["sm90-bf16"], torch.ones(1, 1, dtype=torch.float64)
    for power, wanted in ((-133, 2.0**-149), (-126, 2.0**-142)):
        assert matmul(one * 2.0**power, one * 2.0**-16, core).item() == wanted
    assert matmul(one * 2.0**-133, one * 2.0**-17, core).item() == 0.0


def test_nothing_is_aligned_below_the_exponent_of_an_empty_sum() -> None:
    """Eight times 2^-152 would be the smallest fp32 number; a sum of zero counts as 2^-126 and cuts each at 2^-151."""
    tiny = torch.full((1, 8), 2.0**-76, dtype=torch.float64)
    assert matmul(tiny, tiny.T.contiguous(), CORES["sm90-bf16"]).item() == 0.0
    assert matmul(2 * tiny, tiny.T.contiguous(), CORES["sm90-bf16"]).item() == 2.0**-148


def test_a_subnormal_fp16_sum_counts_as_the_smallest_normal_number() -> None:
    """2^-23 and 2^-25 are a tie for fp16, rounded to even; 2^-40 would decide it, but is cut at 2^-38."""
    a_1K, b_K1 = torch.zeros(1, 16, dtype=torch.float64), torch.zeros(16, 1, dtype=torch.float64)
    for place, left, right in ((0, -12, -11), (8, -14, -11), (9, -20, -20)):
        a_1K[0, place], b_K1[place, 0] = 2.0**left, 2.0**right
    assert matmul(a_1K, b_K1, with_fp16_accumulator(CORES["sm80-fp16"])).item() == 2.0**-23


@pytest.mark.parametrize(("change", "words"), [
    ({"kept_bits": 50}, "need 57 bits"), ({"products_per_step": 0}, "products_per_step=0"),
    ({"significand_bits": 25}, "significand_bits=25"), ({"operand": Format.FP32}, "operand=fp32"),
    ({"promote_every": 100}, "promote_every=100"), ({"final": "up"}, "final='up'"),
    ({"accumulator": Format.BF16}, "accumulator=bf16"),
])
def test_sizes_beyond_the_model_are_refused(change: dict[str, object], words: str) -> None:
    """With what was given and what it should be."""
    with pytest.raises(UsageValueError, match=words):
        replace(CORES["sm90-bf16"], **change)  # type: ignore[arg-type]


def test_wrong_operands_are_refused() -> None:
    """Numbers of another format, other shapes, other dtypes, and a class that has no tensor core."""
    core, one = CORES["sm90-bf16"], torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(UsageValueError, match="4 numbers of a are not bf16"):
        matmul(one + 2.0**-10, one, core)
    with pytest.raises(UsageValueError, match=r"\(2, 2\) and b \(3, 2\)"):
        matmul(one, torch.ones(3, 2, dtype=torch.float64), core)
    with pytest.raises(UsageValueError, match=r"torch\.float32"):
        matmul(one.float(), one, core)
    with pytest.raises(UsageValueError, match="truncates=False"):
        tensor_core(HARDWARE["cpu"], Format.BF16)
    with pytest.raises(UsageValueError, match="operand=fp64"):
        tensor_core(HARDWARE["sm90"], Format.FP64)
