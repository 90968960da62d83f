"""What the device reaches now: bytes of a copy and operations of a dense product, measured before anything else."""

from dataclasses import dataclass

import torch

from moe_ref.bench.timing import CudaClock, HostClock, Spread, interleaved
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.vocabulary import Dtype

_SIZES = {"cpu": (2**22, 256), "cuda": (2**31, 8192)}
"""Bytes that are copied, and the side of the square matrices: large on a GPU, and only there of any meaning."""
_BUDGET = 1.0


@dataclass(frozen=True)
class Limit:
    """Units per second (bytes read and written, or operations) at the median, and the spread of the seconds."""

    name: str
    per_s: float
    words: str
    spread: Spread


def measure_limits(dtype: Dtype, clock: HostClock | CudaClock) -> tuple[Limit, Limit]:
    """(copy, product): a copy within the device's memory, and a product of square matrices in the dtype."""
    num_bytes, side = _SIZES[clock.device]
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    matrix = torch.empty(side, side, dtype=TORCH_DTYPES[dtype], device=clock.device)
    matrix.normal_(generator=torch.Generator(clock.device).manual_seed(0))
    result = torch.empty_like(matrix)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(matrix, matrix, out=result)}
    with clock.running(), torch.no_grad():
        prepared = {name: clock.prepare(call).call for name, call in calls.items()}
        spreads = interleaved(prepared, clock, _BUDGET if clock.device == "cuda" else 0.0)
    return (Limit("copy", 2 * num_bytes / spreads["copy"].median, f"{num_bytes} bytes, read and written",
                  spreads["copy"]),
            Limit("product", 2 * side**3 / spreads["product"].median, f"{side} x {side} x {side}, {dtype}",
                  spreads["product"]))
