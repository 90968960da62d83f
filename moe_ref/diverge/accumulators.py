"""Accumulators by name: in which order and width a product is summed, and what is predicted of it.

ORDER[-fp16|-bf16]: additions rounded to nearest (numerics/summation.py); CLASS[-promoted|-fp16]: the tensor cores of a
hardware class, bit by bit (numerics/tensor_core.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics import summation, tensor_core
from moe_ref.numerics.accumulation import Accumulation
from moe_ref.numerics.formats import Mode, entry
from moe_ref.tolerances.load import load_tolerances

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(M, K) and (K, N) in fp64 that hold numbers of a format -> (M, N) in fp64."""

NARROW_STEP = 16
"""Products that are added in fp32 before an fp16 or bf16 accumulator takes them: one instruction's."""

PROMOTED_EVERY = 128
"""Products after which DeepGEMM adds the tensor cores' sum to an fp32 register."""


@dataclass(frozen=True)
class Declared:
    """What is claimed of an accumulator: its words, predicted variance, and factor of n 2^-24 in the rigorous bound."""

    words: str
    accumulation: Accumulation
    factor: float

    def bound(self, absolute_RN: torch.Tensor, terms: int) -> torch.Tensor:
        """gamma(n, factor 2^-24) and fp64's own, of the sums of absolute products; docs/bounds.md."""
        def gamma(unit: float) -> float:
            return terms * unit / (1 - terms * unit) if terms * unit < 0.5 else float("inf")
        # fp32 holds no smaller normal number than 2^-126.
        return (gamma(self.factor * 2.0**-24) + gamma(2.0**-53)) * absolute_RN + terms * 2.0**-126


@dataclass(frozen=True)
class Accumulator:
    """A simulated matmul and what is declared of it."""

    declared: Declared
    matmul: Matmul


def accumulator_names() -> list[str]:
    """Those that `accumulator` knows, without their suffixes."""
    return [*summation.ORDERS, *(name for name, one in load_tolerances().file.hardware.items() if one.truncates)]


def accumulator(name: str, operands: Format) -> Accumulator:
    """The accumulator of that name for operands of a format; UsageValueError that names those that are known."""
    base, _, suffix = name.partition("-")
    if base in summation.ORDERS and suffix in ("", "fp16", "bf16"):
        return _ordered(base, Format(suffix) if suffix else Format.FP32)
    if base in accumulator_names() and suffix in ("", "promoted", "fp16"):
        return _tensor_core(base, suffix, operands)
    raise UsageValueError(f"accumulator {name!r}, but should be one of {', '.join(accumulator_names())}; an order may "
                          "end in -fp16 or -bf16, a hardware class in -promoted or -fp16")


def nearest(stored: Format) -> Declared:
    """Additions rounded to nearest in a format, one after the other."""
    unit = 2.0 ** -entry(stored).significand_bits
    return Declared(f"{stored} additions, rounded to nearest", Accumulation(unit=unit), unit * 2.0**24)


def hardware_declared(hardware: str, operands: Format) -> Declared:
    """What a hardware class does with operands of a format; those of fp32 go through its scalar units."""
    one = load_tolerances().file.hardware[hardware]
    if not one.truncates or operands is Format.FP32:
        return nearest(Format.FP32)
    products, kept, significand = one.products_per_step, one.kept_bits, one.significand_bits
    if operands is Format.TF32:
        products = one.tf32_products_per_step
    if operands in (Format.E4M3, Format.E5M2):
        products, kept, significand = one.fp8_products_per_step, one.fp8_kept_bits, one.fp8_significand_bits
    return Declared(f"{hardware} tensor cores: {products} products at once, cut to {significand} bits",
                    Accumulation(unit=2.0**-significand, truncates=True, products_per_step=products, kept_bits=kept),
                    one.factor_of(operands))


def _ordered(order: str, fmt: Format) -> Accumulator:
    declared = nearest(fmt)

    def matmul(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        if fmt is Format.FP32:
            return summation.matmul(a_MK, b_KN, order)  # type: ignore[arg-type]
        # An instruction adds its products in fp32 and hands one sum to the narrow accumulator.
        return summation.matmul(a_MK, b_KN, "blocked" if order == "sequential" else order,  # type: ignore[arg-type]
                                fmt=fmt, inside=Format.FP32, block=NARROW_STEP)
    return Accumulator(replace(declared, words=f"{order.replace('_', '-')} {declared.words}"), matmul)


def _tensor_core(hardware: str, suffix: str, operands: Format) -> Accumulator:
    if operands is Format.FP32:
        return Accumulator(nearest(Format.FP32),
                           lambda a_MK, b_KN: summation.matmul(a_MK, b_KN, "sequential", fused=True))
    declared = hardware_declared(hardware, operands)
    core = tensor_core.tensor_core(load_tolerances().file.hardware[hardware], operands)
    if suffix == "promoted":
        core = replace(core, promote_every=PROMOTED_EVERY)
        declared = replace(declared, words=f"{declared.words}, added to fp32 every {PROMOTED_EVERY} products")
    if suffix == "fp16":
        core, declared = tensor_core.with_fp16_accumulator(core), replace(
            nearest(Format.FP16), words=f"{hardware} tensor cores with an fp16 accumulator, rounded to nearest")
    return Accumulator(declared, lambda a_MK, b_KN: tensor_core.matmul(a_MK, b_KN, core))


def three_products(hardware: str, mode: Mode) -> Accumulator:
    """tf32x3 on the tensor cores of a class: three products of large and small tf32 parts."""
    core = tensor_core.tensor_core(load_tolerances().file.hardware[hardware], Format.TF32)
    declared = hardware_declared(hardware, Format.TF32)
    # Three instructions for every one, and what the small parts lose: 2^-22 of a product.
    declared = Declared(f"{declared.words}, three times", declared.accumulation, 3 * declared.factor + 4.0)
    return Accumulator(declared, lambda a_MK, b_KN: tensor_core.tf32x3_matmul(a_MK, b_KN, core, mode))
