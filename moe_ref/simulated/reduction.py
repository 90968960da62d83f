"""Sums between ranks in the orders that collectives add in."""

from typing import Literal

import torch

from moe_ref.contract.errors import one_of_faults, raise_faults, size_faults
from moe_ref.contract.parallel import cut
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import round_to

Reduction = Literal["ring", "tree", "once", "rank_order"]
"""Rounded at every hop of a ring that starts at another rank for each run of columns, at every node of a binary tree,
once at the end (a switch that adds in a wide accumulator), or at every addition from rank 0 on."""


def reduce_parts(parts_PTH: torch.Tensor, reduction: Reduction, stored: Format, rotation: int = 0) -> torch.Tensor:
    """The sum over ranks, (T, H), of fp64 parts that hold numbers of `stored`, as every rank gets it.

    rotation: by how many ranks a ring starts later, as its channels and the order of its ranks decide.
    UsageValueError on another reduction or a rotation below 0.
    """
    raise_faults("reduce_parts", one_of_faults("reduction", reduction, Reduction) + size_faults(0, rotation=rotation))
    ranks = len(parts_PTH)
    if reduction == "once":
        return round_to(parts_PTH.sum(0), stored)
    if reduction == "tree":
        level = list(parts_PTH)
        while len(level) > 1:
            pairs = [round_to(left + right, stored) for left, right in zip(level[::2], level[1::2], strict=False)]
            level = pairs + level[len(level) - len(level) % 2:]
        return level[0]
    if reduction == "rank_order":
        return _in_turn(parts_PTH, list(range(ranks)), stored)
    total_TH = torch.empty_like(parts_PTH[0])
    for chunk, (start, stop) in enumerate(cut(parts_PTH.shape[-1], (1,) * ranks)):
        hops = [(chunk + 1 + rotation + hop) % ranks for hop in range(ranks)]
        total_TH[:, start:stop] = _in_turn(parts_PTH[:, :, start:stop], hops, stored)
    return total_TH


def _in_turn(parts_PTH: torch.Tensor, ranks: list[int], stored: Format) -> torch.Tensor:
    total_TH = parts_PTH[ranks[0]]
    for rank in ranks[1:]:
        total_TH = round_to(total_TH + parts_PTH[rank], stored)
    return total_TH
