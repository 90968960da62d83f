"""What small products of powers of two reveal of an unknown matrix product: its accumulator, its cuts, its operands.

Every probe sums three addends B, -B and s at three of 128 positions, the rest being zeros, and looks at what is left of
s. In any order of additions two of the three meet first. B with s: s survives if the accumulator holds both. B with -B:
s survives whatever B is. All three at once, in one instruction of a tensor core: s survives if B leaves it inside the
bits kept in alignment. B is 1.5 2^p s, so that s is at the same distance from the last place on either side of B.
Only s, a small power of two, is read, so a result that is stored in 16 bits hides nothing. After Fasi, Higham,
Mikaitis and Pranesh, PeerJ Computer Science 7:e330, 2021, and FTTN, arXiv 2403.00232.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import entry
from moe_ref.tolerances.hardware import HardwareEntry

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""a (M, K) @ b (K, N) on fp64 tensors that hold numbers of the operands' format, with the result in fp64."""

Rounding = Literal["none", "nearest", "truncate", "other"]

UNKNOWN = "cuda"
"""The entry that stands for a device which is none of the others."""

_TERMS, _SIDE = 128, 32
"""Shape of every probe: (32, 128) @ (128, 32), of which the diagonal is read; 8-bit kernels want multiples of 16."""

_FAR = 27
"""B = 1.5 2^27 s: outside the kept bits of every known device, and 8-bit operands still reach it."""

_SPAN = {Format.E4M3: 27, Format.E5M2: 28, Format.FP16: 28}
"""The largest p of a probe; of all other formats 56, which shows an fp64 accumulator."""

_SPREAD = ((0, 1, 2), (0, 1, 127), (0, 64, 127), (125, 126, 127))
"""Positions of one instruction, of different instructions, blocks and halves."""

_ACCUMULATORS = {8: "bf16", 11: "fp16", 24: "fp32", 53: "fp64"}

_Addend = tuple[int, float, float]
"""Position and both factors."""


@dataclass(frozen=True)
class Fingerprint:
    """What probes revealed for operands of one format; 0 stands for what they did not.

    operand_bits, operand_rounding: significand bits of an operand that reach the product, and how the others are lost.
    significand_bits, rounding: of a sum. kept_bits, products_per_step: fraction bits below the largest addend that one
    instruction keeps, and its products; additions one by one reveal neither, exact instructions keep all bits.
    """

    operand: Format
    operand_bits: int
    operand_rounding: Rounding
    significand_bits: int
    rounding: Rounding
    kept_bits: int
    products_per_step: int

    @property
    def accumulator(self) -> str:
        """The format whose significand sums have, or their bits."""
        if not self.significand_bits:
            return "wider than shown"
        return _ACCUMULATORS.get(self.significand_bits, f"{self.significand_bits} bits")


def fingerprint(matmul: Matmul, operand: Format) -> Fingerprint:
    """Probe a matrix product that takes operands of this format; UsageValueError for fp64 operands."""
    if operand is Format.FP64:
        raise UsageValueError("fingerprint: operand=fp64, but should be fp32 or narrower")
    operand_bits = _operand_bits(matmul) if operand is Format.FP32 else entry(operand).significand_bits
    significand_bits = _significand_bits(matmul, operand)
    products_per_step = _products_per_step(matmul)
    return Fingerprint(
        operand, operand_bits, _operand_rounding(matmul, operand_bits) if operand is Format.FP32 else "none",
        significand_bits, _rounding(matmul, significand_bits),
        _kept_bits(matmul) if products_per_step else 0, products_per_step)


def matching(found: Fingerprint, hardware: Mapping[str, HardwareEntry]) -> tuple[str, ...]:
    """Names of the hardware classes that would leave this fingerprint; the class of unknown devices is none of them."""
    return tuple(name for name, one in hardware.items() if name != UNKNOWN and _expected(one, found) == found)


def classify(found: Sequence[Fingerprint], hardware: Mapping[str, HardwareEntry]) -> str:
    """The one hardware class that would leave all these fingerprints; "" if there is none, or more than one."""
    names = [name for name in hardware if found and all(name in matching(one, hardware) for one in found)]
    return names[0] if len(names) == 1 else ""


def _expected(one: HardwareEntry, found: Fingerprint) -> Fingerprint:
    """The fingerprint of a class, for the operands and the operand width that were found."""
    bits = found.operand_bits
    rounding: Rounding = "none"
    products, kept, significand = one.products_per_step, one.kept_bits, one.significand_bits
    if found.operand is Format.FP32:
        tf32 = entry(Format.TF32).significand_bits
        if bits != tf32:
            # Without tf32 every class multiplies fp32 numbers one by one, outside its tensor cores.
            return Fingerprint(Format.FP32, entry(Format.FP32).significand_bits, "none", 24, "nearest", 0, 0)
        # Software may round operands before, which leaves the hardware nothing to cut.
        rounding = "nearest" if found.operand_rounding == "nearest" else one.tf32_operands
        products = one.tf32_products_per_step
    elif found.operand is Format.TF32:
        products = one.tf32_products_per_step
    elif found.operand in (Format.E4M3, Format.E5M2):
        products, kept, significand = one.fp8_products_per_step, one.fp8_kept_bits, one.fp8_significand_bits
    if not one.truncates:
        return Fingerprint(found.operand, bits, rounding, significand, "nearest", 0, 0)
    return Fingerprint(found.operand, bits, rounding, significand, "truncate", kept, products)


def _power(exponent: int, factor: float = 1.0) -> tuple[float, float]:
    """Two factors of one addend; halves of the exponent, so that 8-bit formats reach far."""
    return factor * 2.0 ** (exponent - exponent // 2), 2.0 ** (exponent // 2)


def _addends(p: int, places: Sequence[int], sign: float, small: float) -> tuple[list[_Addend], float]:
    """B, -B and `small` times s at three places, and s; half of p lies on either side of 1."""
    low, high = -(p // 2), p - p // 2
    return [(places[0], *_power(high, 1.5 * sign)), (places[1], *_power(high, -1.5 * sign)),
            (places[2], *_power(low, small))], 2.0**low


def _left(matmul: Matmul, p: int, placements: Sequence[Sequence[int]], small: float = 1.0) -> list[float]:
    """What is left of `small` times s for every placement and both signs of B, in units of s."""
    rows = [_addends(p, places, sign, small) for places in placements for sign in (1.0, -1.0)]
    sums = _sums(matmul, [addends for addends, _ in rows])
    return [total / unit for total, (_, unit) in zip(sums, rows, strict=True)]


def _sums(matmul: Matmul, rows: Sequence[Sequence[_Addend]]) -> list[float]:
    """The sums of products in rows, each (position, left, right), on the diagonals of as many probes as it takes."""
    sums: list[float] = []
    for start in range(0, len(rows), _SIDE):
        block = rows[start:start + _SIDE]
        a_MK = torch.zeros(_SIDE, _TERMS, dtype=torch.float64)
        b_KN = torch.zeros(_TERMS, _SIDE, dtype=torch.float64)
        for row, addends in enumerate(block):
            for place, left, right in addends:
                a_MK[row, place], b_KN[place, row] = left, right
        sums += matmul(a_MK, b_KN).diagonal()[:len(block)].tolist()
    return sums


def _placements(triples: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Each of three positions in turn for s, the others for B and -B."""
    return [roles for places in triples for roles in permutations(places) if roles[0] < roles[1]]


def _largest_kept(matmul: Matmul, triples: Sequence[Sequence[int]], span: int) -> int:
    """The largest p up to `span` at which s survives in all placements; what is lost for some B is for any larger."""
    placements = _placements(triples)
    return bisect_left(range(1, span + 1), True,
                       key=lambda p: any(left != 1.0 for left in _left(matmul, p, placements)))


def _significand_bits(matmul: Matmul, operand: Format) -> int:
    """One more than the largest p at which s survives everywhere.

    1.5 2^p + 1 fits into p + 1 bits. Where B and s are added and the sum is stored in fewer, s is lost, and some of the
    placements add them first, whatever the order: of three positions, each pair is tried.
    """
    span = _SPAN.get(operand, 56)
    largest = _largest_kept(matmul, _SPREAD, span)
    return largest + 1 if largest < span else 0


def _rounding(matmul: Matmul, significand_bits: int) -> Rounding:
    """What becomes of 1.5 s and of s / 2 where the last place is 2 s.

    To nearest leaves 2 s of the one and 0 of the other, unless B and -B met first. Towards zero leaves nothing of 1.5 s
    where it has the sign of the number it is added to, and part of it where addends are cut before.
    """
    if not significand_bits:
        return "none"
    placements = _placements(_SPREAD)
    large = set(_left(matmul, significand_bits, placements, 1.5))
    small = set(_left(matmul, significand_bits, placements, 0.5))
    if large <= {2.0, 1.5} and small <= {0.0, 0.5}:
        return "nearest"
    return "truncate" if min(large) == 0.0 and max(large) <= 2.0 else "other"


def _products_per_step(matmul: Matmul) -> int:
    """How many positions share an instruction with the first two, or the last two.

    Three positions share one if s fares alike at each of them with a far larger B at the other two: lost where addends
    are cut, whole where they are not. Added one by one, B and -B would cancel first for one of the three alone.
    Positions of earlier instructions, whose sum is an addend too, look the same; the pair that comes first has none,
    so the smaller number counts. Neighbours are taken to share an instruction, and one holds at least three products.
    """
    sizes = []
    for pair in ((0, 1), (_TERMS - 2, _TERMS - 1)):
        others = [place for place in range(_TERMS) if place not in pair]
        placements = [roles for other in others
                      for roles in ((*pair, other), (pair[0], other, pair[1]), (other, pair[1], pair[0]))]
        lost = torch.tensor([left != 1.0 for left in _left(matmul, _FAR, placements)]).view(len(others), -1)
        sizes.append(2 + int((lost.all(1) | ~lost.any(1)).sum()))
    return min(sizes) if 2 < min(sizes) < _TERMS else 0


def _kept_bits(matmul: Matmul) -> int:
    """The largest p at which s survives in the instruction of the first three positions; 0 if it does at all."""
    largest = _largest_kept(matmul, _SPREAD[:1], _FAR)
    return largest if largest < _FAR else 0


def _operand_bits(matmul: Matmul) -> int:
    """How many bits of 1.0101... reach the product with 1, on either side.

    The pattern ends in a one at every length, so a number of so many bits, or two parts of it, are needed.
    """
    def whole(bits: int) -> bool:
        value = (2**bits // 3 * 2 | 1) / 2.0 ** (bits - 1) if bits > 1 else 1.0
        return _sums(matmul, [[(0, value, 1.0)], [(0, 1.0, value)]]) == [value, value]
    return next((bits - 1 for bits in range(1, 25) if not whole(bits)), 24)


def _operand_rounding(matmul: Matmul, bits: int) -> Rounding:
    """1 + 3/4 of the last place becomes the next number to nearest and 1 if cut."""
    if bits == entry(Format.FP32).significand_bits:
        return "none"
    last = 2.0 ** (1 - bits)
    value = 1 + 0.75 * last
    sums = set(_sums(matmul, [[(0, value, 1.0)], [(0, 1.0, value)]]))
    if sums == {1 + last}:
        return "nearest"
    return "truncate" if sums == {1.0} else "other"
