"""Bit-level model of the accumulators of tensor cores: aligned, truncated, added exactly, cut.

One instruction adds k products and the sum before them. Every addend is cut, towards zero, to kept_bits fraction bits
below the largest exponent among them, where the exponent of a product is the sum of its factors' exponents; the cut
addends are added exactly, and the sum is cut to the accumulator's significand. Rule and constants: MMA-Sim, arXiv
2511.10909, and Khattak and Mikaitis, arXiv 2512.07004, who compared such models with devices bit by bit.

All of it is exact in fp64: a product of two numbers of at most 11 significant bits has 22, its exponent lies within
[-280, 256], scaling by powers of two loses nothing, and k + 1 cut addends below 2^(kept_bits + 2) each are integers
whose sum stays below 2^53.
"""

from dataclasses import dataclass, replace

import torch

from moe_ref.contract.errors import UsageValueError, one_of_faults, positive_faults, raise_faults, size_faults
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import Mode, entry, is_representable, round_to
from moe_ref.tolerances.hardware import HardwareEntry

OPERANDS = (Format.TF32, Format.FP16, Format.BF16, Format.E4M3, Format.E5M2)

_ZERO_SUM = -126
"""Exponent that a sum of zero counts with, so that nothing is aligned to less than this."""

_ZERO_PRODUCT = -(1 << 13)
"""Stands for the exponent of a factor that is zero: its product never decides the alignment."""

_HELD = 1 << 17
"""Addends that are worked on at once; they stay in the cache."""


@dataclass(frozen=True)
class TensorCore:
    """One instruction: products added at once, fraction bits kept in alignment, and what its sum is cut to.

    significand_bits: of the sum, with the hidden one; accumulator: the format whose range it has. final: whether
    the sum is cut or rounded to nearest even. promote_every: after so many products the sum is added to an fp32
    register, rounded to nearest, and begun anew; 0: never. UsageValueError on sizes that no fp64 integer holds.
    """

    products_per_step: int
    kept_bits: int
    significand_bits: int = 24
    final: Mode = "truncate"
    operand: Format = Format.BF16
    accumulator: Format = Format.FP32
    promote_every: int = 0

    def __post_init__(self) -> None:
        faults = positive_faults(products_per_step=self.products_per_step, kept_bits=self.kept_bits)
        faults += positive_faults(significand_bits=self.significand_bits) + one_of_faults("final", self.final, Mode)
        faults += size_faults(0, promote_every=self.promote_every)
        faults += [] if self.operand in OPERANDS else [
            f"operand={self.operand}, but should be one of {', '.join(OPERANDS)}"]
        faults += [] if self.accumulator in (Format.FP32, Format.FP16) else [
            f"accumulator={self.accumulator}, but should be fp32 or fp16"]
        raise_faults("tensor core", faults)
        needed = self.kept_bits + 2 + self.products_per_step.bit_length()
        if needed > 53:
            faults.append(f"kept_bits={self.kept_bits} and products_per_step={self.products_per_step} need {needed} "
                          "bits, but should need at most 53")
        if (most := entry(self.accumulator).significand_bits) < self.significand_bits:
            faults.append(f"significand_bits={self.significand_bits}, but should be at most {most}, those of "
                          f"{self.accumulator}")
        if self.promote_every % self.products_per_step:
            faults.append(f"promote_every={self.promote_every}, but should be a multiple of {self.products_per_step}")
        raise_faults("tensor core", faults)


def tensor_core(hardware: HardwareEntry, operand: Format) -> TensorCore:
    """The tensor core of a hardware class for operands of a format, with an fp32 accumulator.

    UsageValueError for a format that tensor cores do not take, and for a class whose addends are not aligned.
    """
    products, kept, bits = hardware.products_per_step, hardware.kept_bits, hardware.significand_bits
    if operand is Format.TF32:
        products = hardware.tf32_products_per_step
    elif operand in (Format.E4M3, Format.E5M2):
        products, kept = hardware.fp8_products_per_step, hardware.fp8_kept_bits
        bits = hardware.fp8_significand_bits
    if not hardware.truncates:
        raise UsageValueError("tensor core: truncates=False, but should be True: this class rounds every addition, "
                              "which numerics.summation does")
    return TensorCore(products, kept, bits, operand=operand)


def with_fp16_accumulator(core: TensorCore) -> TensorCore:
    """The same instruction with an fp16 result, which is rounded to nearest even."""
    return replace(core, significand_bits=11, final="nearest", accumulator=Format.FP16)


def matmul(a_MK: torch.Tensor, b_KN: torch.Tensor, core: TensorCore) -> torch.Tensor:
    """a @ b, (M, N) in fp64, as a tensor core sums it, from the first term on; a, b: fp64 holding operands.

    Missing products of the last instruction are zeros. Subnormals are kept. Infinities and NaN have IEEE's results;
    a sum beyond the largest number becomes infinite although it is cut, as MMA-Sim has it. UsageValueError on shapes
    that do not fit and on numbers that the operands' format does not hold.
    """
    _check(a_MK, b_KN, core.operand)
    size, (rows, columns) = core.products_per_step, (len(a_MK), b_KN.shape[1])
    steps_b = _steps(b_KN, size)
    limit = entry(core.accumulator).max / 2
    # A NaN is not below the limit either.
    careful = not bool(((a_MK.abs() @ b_KN.abs()) < limit).all())
    held = max(1, _HELD // max(1, size * columns))
    blocks = [_block(_steps(part_MK.T, size), steps_b, core, careful) for part_MK in a_MK.split(held)]
    return torch.cat(blocks) if rows else torch.zeros(0, columns, dtype=torch.float64)


def tf32_matmul(a_MK: torch.Tensor, b_KN: torch.Tensor, core: TensorCore, operands: Mode) -> torch.Tensor:
    """a @ b, (M, N), of fp64 tensors holding fp32 numbers, each made tf32 first; UsageValueError as in `matmul`."""
    return matmul(round_to(a_MK, Format.TF32, operands), round_to(b_KN, Format.TF32, operands), core)


def tf32x3_matmul(a_MK: torch.Tensor, b_KN: torch.Tensor, core: TensorCore, operands: Mode) -> torch.Tensor:
    """a @ b, (M, N), of fp64 tensors holding fp32 numbers by three products of large and small tf32 parts.

    Small times large, large times small and large times large join one accumulator in this order, instruction by
    instruction, as in CUTLASS's fast fp32 operators. Finite operands; of infinities the small part is NaN.
    """
    large_a, large_b = round_to(a_MK, Format.TF32, operands), round_to(b_KN, Format.TF32, operands)
    small_a = round_to(a_MK - large_a, Format.TF32, operands)
    small_b = round_to(b_KN - large_b, Format.TF32, operands)
    size = core.products_per_step
    left_SkM = torch.cat([_steps(part.T, size) for part in (small_a, large_a, large_a)], dim=1)
    right_SkN = torch.cat([_steps(part, size) for part in (large_b, small_b, large_b)], dim=1)
    return matmul(left_SkM.flatten(0, 1).T, right_SkN.flatten(0, 1), core)


def _check(a_MK: torch.Tensor, b_KN: torch.Tensor, operand: Format) -> None:
    faults = [f"{name} is {tensor.dtype}, but should be torch.float64" for name, tensor in (("a", a_MK), ("b", b_KN))
              if tensor.dtype != torch.float64]
    if a_MK.dim() != 2 or b_KN.dim() != 2 or a_MK.shape[1] != b_KN.shape[0]:
        faults.append(f"a {tuple(a_MK.shape)} and b {tuple(b_KN.shape)}, but should be (M, K) and (K, N)")
    raise_faults("tensor core", faults)
    for name, tensor in (("a", a_MK), ("b", b_KN)):
        wrong = int((~is_representable(tensor, operand) & tensor.isfinite()).sum())
        faults += [f"{wrong} numbers of {name} are not {operand}, but all should be"] * bool(wrong)
    raise_faults("tensor core", faults)


def _steps(tensor_KX: torch.Tensor, size: int) -> torch.Tensor:
    """Rows in groups of `size`, (steps, size, X), filled with zeros."""
    count = -(-len(tensor_KX) // size)
    missing = tensor_KX.new_zeros(count * size - len(tensor_KX), tensor_KX.shape[1])
    return torch.cat([tensor_KX, missing]).unflatten(0, (count, size))


def _block(a_SkM: torch.Tensor, b_SkN: torch.Tensor, core: TensorCore, careful: bool) -> torch.Tensor:
    """All instructions of some rows, one after the other."""
    least = entry(core.operand).min_exponent
    exponent_a, exponent_b = (torch.where(part == 0, _ZERO_PRODUCT, _exponent(part).clamp(min=least)).to(torch.int16)
                              for part in (a_SkM, b_SkN))
    sum_MN = torch.zeros(a_SkM.shape[2], b_SkN.shape[2], dtype=torch.float64)
    register_MN = sum_MN.float()
    for step in range(len(a_SkM)):
        product_kMN = a_SkM[step][:, :, None] * b_SkN[step][:, None, :]
        largest_MN = (exponent_a[step][:, :, None] + exponent_b[step][:, None, :]).amax(0).to(torch.int64)
        plain_MN = product_kMN.sum(0) + sum_MN if careful else None
        sum_MN = _instruction(product_kMN, largest_MN, sum_MN, core)
        if plain_MN is not None:
            sum_MN = torch.where(plain_MN.isfinite(), sum_MN, plain_MN)
        if core.promote_every and (step + 1) * core.products_per_step % core.promote_every == 0:
            register_MN += sum_MN.float()
            sum_MN = torch.zeros_like(sum_MN)
    return (register_MN + sum_MN.float()).double() if core.promote_every else sum_MN


def _instruction(product_kMN: torch.Tensor, largest_MN: torch.Tensor, sum_MN: torch.Tensor,
                 core: TensorCore) -> torch.Tensor:
    """The next sum; product_kMN is used up."""
    exponent_MN = _exponent(sum_MN).clamp(min=entry(core.accumulator).min_exponent)
    exponent_MN = torch.where(sum_MN == 0, _ZERO_SUM, exponent_MN)
    largest_MN = torch.maximum(largest_MN, exponent_MN).clamp_(min=_ZERO_SUM)
    scale_MN = _power(core.kept_bits - largest_MN)
    whole_MN = product_kMN.mul_(scale_MN).trunc_().sum(0).add_((sum_MN * scale_MN).trunc_())
    return _stored(whole_MN * _power(largest_MN - core.kept_bits), core)


def _stored(value: torch.Tensor, core: TensorCore) -> torch.Tensor:
    """An exact sum in the accumulator: cut or rounded, infinite beyond its largest number."""
    fraction_bits, limits = core.significand_bits - 1, entry(core.accumulator)
    unit_exponent = _exponent(value).clamp_(min=limits.min_exponent) - fraction_bits
    scaled = value * _power(-unit_exponent)
    whole = scaled.trunc_() if core.final == "truncate" else scaled.round_()
    stored = whole.mul_(_power(unit_exponent))
    return torch.where(stored.abs() > limits.max, torch.inf * stored.sign(), stored)


def _exponent(value: torch.Tensor) -> torch.Tensor:
    """floor(log2 |value|) of normal fp64 numbers, int64; -1023 for zero, 1024 for infinities and NaN."""
    return ((value.view(torch.int64) >> 52) & 0x7FF) - 1023


def _power(exponent_of_two: torch.Tensor) -> torch.Tensor:
    return ((exponent_of_two + 1023) << 52).view(torch.float64)
