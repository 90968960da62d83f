"""The logical placement of every parameter, and the part of it that a rank holds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import Literal

import torch

from moe_ref.contract.errors import raise_faults
from moe_ref.contract.parallel import Parallel, Range
from moe_ref.contract.vocabulary import Schedule, SharedPlacement


@dataclass(frozen=True)
class Placement:
    """Logical placement of one parameter.

    "colwise" cuts the output features, "rowwise" the input features, whatever the storage order;
    the dims say which tensor dimension holds them (None: the parameter has no such features). expert_dim: the
    dimension that expert parallelism cuts; None: the parameter belongs to no routed expert.
    """

    kind: Literal["colwise", "rowwise", "replicated"]
    input_dim: int | None
    output_dim: int | None
    expert_dim: int | None = None

    @property
    def shard_dim(self) -> int | None:
        """The tensor dimension that is cut over tp ranks; None when every rank holds all of it."""
        return {"colwise": self.output_dim, "rowwise": self.input_dim, "replicated": None}[self.kind]


PLACEMENTS = {
    "w13_EGIH": Placement("colwise", input_dim=3, output_dim=2, expert_dim=0),
    "w2_EHI": Placement("rowwise", input_dim=2, output_dim=1, expert_dim=0),
    "w13_bias_EGI": Placement("colwise", input_dim=None, output_dim=2, expert_dim=0),
    "w2_bias_EH": Placement("rowwise", input_dim=None, output_dim=1, expert_dim=0),
    "router_EH": Placement("replicated", input_dim=1, output_dim=0),
    "router_bias_E": Placement("replicated", input_dim=None, output_dim=0),
    "selection_bias_E": Placement("replicated", input_dim=None, output_dim=0),
    "weight_scale_E": Placement("replicated", input_dim=None, output_dim=0),
    "shared_w13_GIH": Placement("colwise", input_dim=2, output_dim=1),
    "shared_w2_HI": Placement("rowwise", input_dim=1, output_dim=0),
    "shared_w13_bias_GI": Placement("colwise", input_dim=None, output_dim=1),
    "shared_w2_bias_H": Placement("rowwise", input_dim=None, output_dim=0),
    "shared_gate_SH": Placement("replicated", input_dim=1, output_dim=0),
    "output_bias_H": Placement("replicated", input_dim=None, output_dim=0),
}
"""Every parameter of MoEWeights, as the schedules that sum partial results have it. w13 is cut along I inside each half
G: a cut of a merged 2I axis would give rank 0 nothing but gate rows. A rowwise bias has no input features to cut: every
rank holds it, and one adds it, since the partial sums of all ranks are added up."""


@cache
def placements(parallel: Parallel) -> Mapping[str, Placement]:
    """The placements under `parallel`: gather cuts w2 and its bias by output, a whole shared expert is not cut."""
    held = dict(PLACEMENTS)
    if parallel.schedule is Schedule.GATHER:
        for name in ("w2_EHI", "w2_bias_EH", "shared_w2_HI", "shared_w2_bias_H"):
            held[name] = replace(held[name], kind="colwise")
    if parallel.shared is SharedPlacement.REPLICATED:
        for name in ("shared_w13_GIH", "shared_w2_HI", "shared_w13_bias_GI", "shared_w2_bias_H"):
            held[name] = replace(held[name], kind="replicated")
    return held


def part_range(name: str, size: int, parallel: Parallel, rank: int) -> Range:
    """What `rank` holds of the cut axis of a parameter, which has `size` elements; all of it where nothing is cut."""
    parallel.check_rank(rank)
    return _ranges(name, size, parallel)[rank]


def _ranges(name: str, size: int, parallel: Parallel) -> tuple[Range, ...]:
    """part_range of every rank of the grid."""
    if placements(parallel)[name].shard_dim is None:
        return ((0, size),) * parallel.size
    return parallel.shared_ranges(size) if name.startswith("shared_") else parallel.ranges(size) * parallel.ep


def part_shape(name: str, shape: tuple[int, ...], parallel: Parallel, rank: int) -> tuple[int, ...]:
    """The shape of what `rank` holds of a parameter of this shape."""
    placement, sizes = placements(parallel)[name], list(shape)
    if (dim := placement.shard_dim) is not None:
        start, stop = part_range(name, shape[dim], parallel, rank)
        sizes[dim] = stop - start
    if placement.expert_dim is not None:
        sizes[placement.expert_dim] = len(parallel.hosted(shape[placement.expert_dim])[parallel.coordinates(rank)[0]])
    return tuple(sizes)


def rank_part(name: str, tensor: torch.Tensor, parallel: Parallel, rank: int, *, block: tuple[int, int] = (1, 1),
              size: int | None = None) -> torch.Tensor:
    """What `rank` holds of an unsharded parameter; of one expert's part of it where the axis E is missing.

    A view where the rank's experts are neighbours, else a copy. block: (output, input) features that one entry of
    `tensor` stands for, as a scale of a quantised block does; size: elements of the cut axis where its last block is a
    partial one. Raises UsageValueError, on every rank, when any rank's cut falls inside a block.
    """
    parallel.check_rank(rank)
    placement, missing = placements(parallel)[name], len(name.rpartition("_")[2]) - tensor.dim()
    if (dim := placement.shard_dim) is not None:
        width = block[0] if placement.kind == "colwise" else block[1]
        start, stop = _entries(name, tensor.shape[dim - missing], width, size, parallel)[rank]
        tensor = tensor.narrow(dim - missing, start, stop - start)
    if parallel.ep == 1 or placement.expert_dim is None or missing:
        return tensor
    experts = parallel.hosted(tensor.shape[placement.expert_dim])[parallel.coordinates(rank)[0]]
    first, count = (experts[0], len(experts)) if experts else (0, 0)
    if experts == tuple(range(first, first + count)):
        return tensor.narrow(placement.expert_dim, first, count)
    return tensor.index_select(placement.expert_dim, torch.tensor(experts, device=tensor.device))


def _entries(name: str, entries: int, block: int, size: int | None, parallel: Parallel) -> tuple[Range, ...]:
    """The entries of every rank along an axis on which each stands for `block` elements, the last perhaps for fewer."""
    size = entries * block if size is None else size
    if -(-size // block) != entries:
        raise_faults(name, [f"{entries} entries, but {size} elements in blocks of {block} have {-(-size // block)}"])
    ranges = _ranges(name, size, parallel)
    if inside := sorted({cut for one in ranges for cut in one if cut % block and cut != size}):
        spread = f"tp={parallel.tp}, ep={parallel.ep}, splits={parallel.splits}"
        raise_faults(name, [f"{size} elements are cut at {', '.join(map(str, inside))} by {spread}, but should be at "
                            f"multiples of the block of {block}" + _whole_blocks(name, entries, block, size, parallel)])
    return tuple((-(-start // block), -(-stop // block)) for start, stop in ranges)


def _whole_blocks(name: str, entries: int, block: int, size: int, parallel: Parallel) -> str:
    """Shares that cut a routed parameter between blocks, as near to those given as there are."""
    if name.startswith("shared_"):
        return ""
    widths = [min(stop * block, size) - start * block for start, stop in parallel.ranges(entries)]
    return f", as splits={tuple(width // gcd(*widths) for width in widths)} does"
