"""How large the errors of a long sum are expected to be of which a matrix unit adds up one block after the other."""

from itertools import pairwise

import torch

from moe_ref.numerics.accumulation import Accumulation
from moe_ref.numerics.gauges import gauges


def promoted_errors(a_MK: torch.Tensor, w_NK: torch.Tensor, unit: Accumulation, every: int,
                    start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected square and drift of what a unit loses in a @ w^T, (M, N) fp64, with a new sum after `every` products.

    start: how far inside its block the first product lies. What is added between blocks is not in it. Losses of a block
    go against its own sum; what that does not say of their signs is independent from block to block.
    """
    columns = a_MK.shape[1]
    variance = torch.zeros(len(a_MK), len(w_NK), dtype=torch.float64, device=a_MK.device)
    drift = torch.zeros_like(variance)
    cuts = [0, *range(every - start % every, columns, every), columns] if columns else [0]
    for first, stop in pairwise(cuts):
        sums = gauges(a_MK[:, first:stop], w_NK[:, first:stop], absolute=True, signs=True)
        variance += unit.variance(sums, stop - first)
        drift += unit.drift(sums, stop - first)
    return (variance + drift.square() if len(cuts) > 2 else variance), drift
