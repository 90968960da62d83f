"""Matrix products whose additions are rounded one by one, in the orders that kernels sum in."""

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch

from moe_ref.contract.errors import one_of_faults, positive_faults, raise_faults
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import round_to

Order = Literal["sequential", "reversed", "blocked", "pairwise", "split_k", "shuffled"]
"""From the first term on, from the last one on, sums of blocks from the first on, neighbours in a binary tree, sums of
parts in a drawn order (as atomics add them), or all terms in a drawn order."""

ORDERS: tuple[Order, ...] = get_args(Order)

_FORMATS = (Format.FP32, Format.FP16, Format.BF16)
_HELD = 2**20
"""Partial sums that are held at once; more rows than that allows are computed in turns."""

_Add = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def matmul(a_MK: torch.Tensor, b_KN: torch.Tensor, order: Order, *, fmt: Format = Format.FP32,
           inside: Format | None = None, block: int = 64, parts: int = 8, seed: int = 0,
           fused: bool = False) -> torch.Tensor:
    """a @ b, (M, N) in fp64, every addition rounded to nearest in `fmt`, those inside a block or part in `inside`.

    a, b: fp64 that hold numbers of fp32 or narrower. A product is rounded to fp32, which leaves those of operands of at
    most 11 bits exact; fused: it is not rounded. A sum begins with an addition to 0. seed draws orders of split_k and
    shuffled.
    UsageValueError on another order or format, sizes below 1, operands of other shapes or that fp32 does not hold.
    """
    faults = one_of_faults("order", order, Order) + positive_faults(block=block, parts=parts)
    faults += [f"{name}={one!r}, but should be one of {', '.join(_FORMATS)}"
               for name, one in (("fmt", fmt), ("inside", inside or fmt)) if one not in _FORMATS]
    raise_faults("matmul", faults or _operand_faults(a_MK, b_KN))
    drawn = torch.Generator().manual_seed(seed)
    if order == "reversed":
        a_MK, b_KN = a_MK.flip(1), b_KN.flip(0)
    elif order == "shuffled":
        shuffled_K = torch.randperm(len(b_KN), generator=drawn)
        a_MK, b_KN = a_MK[:, shuffled_K], b_KN[shuffled_K]
    size = {"blocked": block, "split_k": -(-len(b_KN) // parts), "pairwise": 1}.get(order, len(b_KN))
    count = -(-len(b_KN) // size) if size else 0
    order_P = torch.randperm(count, generator=drawn).tolist() if order == "split_k" else range(count)
    between, within = _adder(fmt, fused=False), _adder(inside or fmt, fused)
    c_MN = torch.zeros(len(a_MK), b_KN.shape[1], dtype=torch.float64)
    b_PSN = _cut(b_KN, size, count)
    for start, stop in _turns(len(a_MK), count * b_KN.shape[1]):
        sums_PMN = _sums_of_runs(_cut(a_MK[start:stop].T, size, count), b_PSN, within, fused)
        sums_PMN = sums_PMN.float() if fmt is Format.FP32 else sums_PMN
        if order == "pairwise":
            sums_PMN = _tree(sums_PMN, between)
            c_MN[start:stop] = sums_PMN.sum(0)  # one, or none
            continue
        total_MN = torch.zeros(sums_PMN.shape[1:], dtype=sums_PMN.dtype)
        for run in order_P:
            total_MN = between(total_MN, sums_PMN[run])
        c_MN[start:stop] = total_MN
    return c_MN


def truncating_matmul(a_MK: torch.Tensor, b_KN: torch.Tensor, *, products_per_step: int = 16,
                      fmt: Format = Format.FP32) -> torch.Tensor:
    """a @ b, (M, N) in fp64: the running total and a step's products are added at once, then cut off to `fmt`.

    a, b: fp64 that hold numbers of fp32 or narrower. What a step adds up is summed in fp64, exactly unless it spans
    more than 53 bits. UsageValueError as in `matmul`.
    """
    faults = positive_faults(products_per_step=products_per_step)
    raise_faults("truncating_matmul", faults or _operand_faults(a_MK, b_KN))
    c_MN = torch.zeros(len(a_MK), b_KN.shape[1], dtype=torch.float64)
    for a_MS, b_SN in zip(a_MK.split(products_per_step, 1), b_KN.split(products_per_step), strict=True):
        c_MN = round_to(c_MN + a_MS @ b_SN, fmt, "truncate")
    return c_MN


def rounded_sum(left: torch.Tensor, right: torch.Tensor, fmt: Format) -> torch.Tensor:
    """left + right in fp64, rounded once to `fmt`, whose significand has at most 51 bits.

    An inexact fp64 sum is moved to its odd neighbour, which rounds further as the exact sum does (Boldo and Melquiond,
    Emulation of FMA and correctly rounded sums, 2008).
    """
    total = left + right
    seen = total - left
    error = (left - (total - seen)) + (right - seen)
    even = (total.view(torch.int64) & 1) == 0
    inexact = even & (error != 0) & torch.isfinite(error) & torch.isfinite(total)
    other = torch.nextafter(total, torch.copysign(torch.full_like(total, torch.inf), error))
    return round_to(torch.where(inexact, other, total), fmt)


def _operand_faults(a_MK: torch.Tensor, b_KN: torch.Tensor) -> list[str]:
    shapes = tuple(a_MK.shape), tuple(b_KN.shape)
    if a_MK.dim() != 2 or b_KN.dim() != 2 or a_MK.shape[1] != len(b_KN):
        return [f"shapes {shapes[0]} and {shapes[1]}, but should be (M, K) and (K, N)"]
    if a_MK.dtype != torch.float64 or b_KN.dtype != torch.float64:
        return [f"dtypes {a_MK.dtype} and {b_KN.dtype}, but should be torch.float64 with the numbers in it"]
    return [f"{name} holds numbers that fp32 does not, but should hold those of fp32 or narrower"
            for name, tensor in (("a_MK", a_MK), ("b_KN", b_KN))
            if not torch.equal(tensor.float().double().nan_to_num(0.0), tensor.nan_to_num(0.0))]


def _adder(fmt: Format, fused: bool) -> _Add:
    # fp32 additions of fp32 numbers are already what is wanted; an exact product has more bits than fp32.
    if fmt is Format.FP32 and not fused:
        return torch.add
    return lambda left, right: rounded_sum(left.double(), right.double(), fmt)


def _turns(rows: int, held_per_row: int) -> Iterator[tuple[int, int]]:
    step = max(1, _HELD // max(1, held_per_row))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _cut(tensor_KX: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """Runs of `size` terms, (P, S, X); the last is filled up with zeros, which change no sum."""
    filled = torch.zeros(count * size, *tensor_KX.shape[1:], dtype=torch.float64)
    filled[:len(tensor_KX)] = tensor_KX
    return filled.unflatten(0, (count, size))


def _sums_of_runs(a_PSM: torch.Tensor, b_PSN: torch.Tensor, add: _Add, fused: bool) -> torch.Tensor:
    """Sums of every run from its first term on, (P, M, N), all runs side by side."""
    if not fused:
        a_PSM, b_PSN = a_PSM.float(), b_PSN.float()
    total_PMN = torch.zeros(len(a_PSM), a_PSM.shape[2], b_PSN.shape[2], dtype=a_PSM.dtype)
    for a_PM, b_PN in zip(a_PSM.unbind(1), b_PSN.unbind(1), strict=True):
        total_PMN = add(total_PMN, a_PM[:, :, None] * b_PN[:, None, :])
    return total_PMN


def _tree(sums_PMN: torch.Tensor, add: _Add) -> torch.Tensor:
    """Neighbours added until one is left; an odd one at the end waits for the next round."""
    while len(sums_PMN) > 1:
        pairs = add(sums_PMN[:-1:2], sums_PMN[1::2])
        sums_PMN = torch.cat([pairs, sums_PMN[-1:]]) if len(sums_PMN) % 2 else pairs
    return sums_PMN
