"""Whether a shape fits, estimated before anything of it is made."""

import torch

from moe_ref.bench.problem import Operation, RankLayer
from moe_ref.contract.dtypes import TORCH_DTYPES

_USED = 0.9
"""Of what is free; the rest is lost to fragments and to what estimates leave out."""


def needed_bytes(layer: RankLayer, operation: Operation, tokens: int, num_subjects: int) -> int:
    """Weights, tokens and the rows that each subject keeps, all of which are held at once: graphs keep their memory."""
    spec, size = layer.spec, TORCH_DTYPES[layer.dtype].itemsize
    inner = (2 * spec.experts.num_projections + 2) * spec.intermediate_size
    if spec.shared is not None:
        inner += (2 * spec.shared.mlp.num_projections + 2) * spec.shared.intermediate_size
    rows = tokens * spec.top_k * (inner + 3 * spec.hidden_size) * size
    router = tokens * (spec.hidden_size + 3 * spec.num_choices) * 8
    held = layer.num_bytes + rows if operation is Operation.BACKWARD else rows
    return layer.num_bytes + 4 * tokens * spec.hidden_size * size + router + num_subjects * held


def free_bytes(device: str) -> int:
    """What may be used of the memory that is free now, torch's own reserve included."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        reserve = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(_USED * (free + reserve))
    with open("/proc/meminfo") as lines:
        found = dict(line.split(":", 1) for line in lines)
    return int(_USED * 1024 * int(found["MemAvailable"].split()[0]))
