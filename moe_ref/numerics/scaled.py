"""8-bit operands with scales: how numbers become codes, what a product of such operands loses, and how it is computed.

A scale covers a block of the tensor, which makes all usual kinds: the whole tensor, a row, 1 x 128 along K for tokens,
128 x 128 for weights (DeepSeek-V3, arXiv 2412.19437, section 3.3). It is the block's largest absolute value over the
format's largest number, rounded to fp32, or up to a power of two.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_ref.contract.errors import UsageValueError, flag_faults, positive_faults, raise_faults
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import entry, round_to, unit_in_last_place
from moe_ref.numerics.tensor_core import TensorCore, matmul


@dataclass(frozen=True)
class ScaleRule:
    """One scale for each block of rows x columns, None standing for all of them; codes in an 8-bit format.

    power_of_two: whether scales are rounded up to one, which loses no bit in scaling. UsageValueError on empty blocks
    and other formats.
    """

    rows: int | None = None
    columns: int | None = None
    power_of_two: bool = False
    stored: Format = Format.E4M3

    def __post_init__(self) -> None:
        sizes = {"rows": self.rows, "columns": self.columns}
        faults = positive_faults(**{name: size for name, size in sizes.items() if size is not None})
        faults += flag_faults(power_of_two=self.power_of_two)
        if self.stored not in (Format.E4M3, Format.E5M2):
            faults.append(f"stored={self.stored}, but should be e4m3 or e5m2")
        raise_faults("scale rule", faults)


PER_TENSOR = ScaleRule()
PER_ROW = ScaleRule(rows=1)
TOKEN_BLOCKS = ScaleRule(rows=1, columns=128)
WEIGHT_BLOCKS = ScaleRule(rows=128, columns=128)


class ProductError(NamedTuple):
    """Expected square and largest size of what quantised operands change in a product, each (M, N) in fp64."""

    variance: torch.Tensor
    bound: torch.Tensor


def quantise(values_RK: torch.Tensor, rule: ScaleRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (R, K), numbers of the 8-bit format, and the scales of the blocks, both in fp64; values: finite, fp64.

    Values over their scale are rounded to fp32, then to the code's format, and saturate; a block of zeros,
    or of values so small that fp32 has no normal scale for them, has scale 1 and codes of zero.
    UsageValueError on other dtypes, on shapes that are not two sizes above zero, and on what is not finite.
    """
    _check(values_RK)
    scales = _scales(values_RK, rule)
    limit = entry(rule.stored).max
    quotient_RK = round_to(values_RK / _spread(scales, values_RK, rule), Format.FP32)
    codes_RK = round_to(quotient_RK, rule.stored).clamp(-limit, limit)
    return codes_RK, scales


def decode(codes_RK: torch.Tensor, scales: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """Codes times their scales, (R, K) in fp64, exactly."""
    return codes_RK * _spread(scales, codes_RK, rule)


def product_error(a_MK: torch.Tensor, w_NK: torch.Tensor, rule_a: ScaleRule, rule_w: ScaleRule) -> ProductError:
    """What a @ w.T loses by quantising both operands: expected square, and a bound for every element.

    A value lies anywhere in its code's cell of width q: variance q^2 / 12, at most q / 2 off. Products of an error
    and a value, and of two errors, add up: independent for the variance, all of one sign for the bound.
    UsageValueError as in `quantise`.
    """
    _check(a_MK)
    _check(w_NK)
    width_a, width_w = _cell_width(a_MK, rule_a), _cell_width(w_NK, rule_w)
    square_a, square_w = width_a.square() / 12, width_w.square() / 12
    variance = a_MK.square() @ square_w.T + square_a @ w_NK.square().T + square_a @ square_w.T
    bound = a_MK.abs() @ width_w.T / 2 + width_a @ w_NK.abs().T / 2 + width_a @ width_w.T / 4
    return ProductError(variance, bound)


def scaled_matmul(a_MK: torch.Tensor, w_NK: torch.Tensor, rule_a: ScaleRule, rule_w: ScaleRule,
                  core: TensorCore) -> torch.Tensor:
    """a @ w.T, (M, N) in fp64, of quantised operands on a tensor core that takes their format.

    Codes are multiplied; the sum of each block of K is multiplied by both scales and joins an fp32 register, every
    step rounded to nearest, as DeepGEMM does. UsageValueError where the blocks of both along K differ.
    """
    if rule_a.columns != rule_w.columns:
        raise UsageValueError(f"scaled_matmul: blocks of {rule_a.columns} and {rule_w.columns} columns, "
                              "but should agree")
    (code_a, scale_a), (code_w, scale_w) = quantise(a_MK, rule_a), quantise(w_NK, rule_w)
    scale_a, scale_w = _rows(scale_a, len(a_MK), rule_a), _rows(scale_w, len(w_NK), rule_w)
    size = rule_a.columns or a_MK.shape[1]
    total_MN = torch.zeros(len(a_MK), len(w_NK))
    for block, (part_a, part_w) in enumerate(zip(code_a.split(size, 1), code_w.split(size, 1), strict=True)):
        scale_MN = scale_a[:, block, None].float() * scale_w[:, block].float()
        total_MN += matmul(part_a, part_w.T.contiguous(), core).float() * scale_MN
    return total_MN.double()


def _check(values_RK: torch.Tensor) -> None:
    wrong = int((~values_RK.isfinite()).sum())
    if values_RK.dtype != torch.float64 or values_RK.dim() != 2 or not values_RK.numel() or wrong:
        raise UsageValueError(f"scaled operand: {values_RK.dtype}, shape {tuple(values_RK.shape)}, {wrong} not finite, "
                              "but should be finite torch.float64 of shape (R, K)")


def _scales(values_RK: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """One per block, (row blocks, column blocks)."""
    rows, columns = rule.rows or len(values_RK), rule.columns or values_RK.shape[1]
    missing = (0, -values_RK.shape[1] % columns, 0, -len(values_RK) % rows)
    blocks = torch.nn.functional.pad(values_RK.abs(), missing).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    exact = blocks.amax((1, 3)) / entry(rule.stored).max
    if rule.power_of_two:
        mantissa, exponent = torch.frexp(exact)
        scales = torch.ldexp(torch.ones_like(exact), exponent - (mantissa == 0.5).int())
    else:
        scales = round_to(exact, Format.FP32)
    # A subnormal scale has too few bits to keep codes in range, and one of zero would divide by it.
    return torch.where(scales < 2.0 ** entry(Format.FP32).min_exponent, 1.0, scales)


def _rows(scales: torch.Tensor, count: int, rule: ScaleRule) -> torch.Tensor:
    return scales.repeat_interleave(rule.rows or count, 0)[:count]


def _spread(scales: torch.Tensor, like_RK: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """The scale of every element, (R, K)."""
    count = like_RK.shape[1]
    return _rows(scales, len(like_RK), rule).repeat_interleave(rule.columns or count, 1)[:, :count]


def _cell_width(values_RK: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """Width of the cell around every value's code, 0 for a value of zero."""
    scale_RK = _spread(_scales(values_RK, rule), values_RK, rule)
    # The quotient is below 16 widths, and rounded to fp32 first: that adds 2^-20 of a width to its half.
    width_RK = unit_in_last_place(values_RK / scale_RK, rule.stored) * scale_RK * (1 + 2.0**-19)
    return torch.where(values_RK == 0, 0.0, width_RK)
