"""One MLP, or all experts, as they are stored: read in the canonical axes, one rank's part at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moe_ref.contract.parallel import PLACEMENTS, Parallel
from moe_ref.contract.spec import MLP, MoESpec
from moe_ref.contract.weights import ExpertWeights
from moe_ref.layouts.blocks import Stored, read_block
from moe_ref.layouts.layout import Axes, Layout, mlp_axes, stored_shape, with_experts

Part = Literal["experts", "shared"]
Tensors = Mapping[str, Stored | Sequence[Stored]]

_CANONICAL = {"w13": "EGIH", "w1": "EIH", "w3": "EIH", "w2": "EHI",
              "w13_bias": "EGI", "w1_bias": "EI", "w3_bias": "EI", "w2_bias": "EH"}


@dataclass(frozen=True)
class StoredMLP:
    """Stored tensors of the routed experts or of the shared one, by their names in mlp_axes.

    sizes: those of the stored tensors by axis letter, E = 0 for the shared expert. parallel cuts them for `rank`
    along the axis that PLACEMENTS tells; None: the tensors are this rank's part already.
    """

    tensors: Tensors
    layout: Layout
    mlp: MLP
    sizes: Mapping[str, int]
    parallel: Parallel | None = None
    rank: int = 0

    def expert(self, e: int) -> ExpertWeights:
        """One expert; views, but where gate and up must be put together (2, I, H) is a copy."""
        return ExpertWeights(*self._read_all(e))

    def whole(self) -> tuple[torch.Tensor | None, ...]:
        """w13, w2 and their biases over all experts; views if the layout is one that has them."""
        return self._read_all(None)

    def _read_all(self, e: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None,
                                                torch.Tensor | None]:
        bias = self.mlp.bias
        return (self._gate_up("", e), self._read("w2", e),
                self._gate_up("_bias", e) if bias else None, self._read("w2_bias", e) if bias else None)

    def _gate_up(self, suffix: str, e: int | None) -> torch.Tensor:
        """The projections with an axis G, gate first."""
        axis_g = 1 if e is None and self.sizes["E"] else 0
        if not self.mlp.gated:
            return self._read(f"w1{suffix}", e).unsqueeze(axis_g)
        if self.layout.gate_up == "separate":
            return torch.stack([self._read(f"w1{suffix}", e), self._read(f"w3{suffix}", e)], axis_g)
        block = self._read(f"w13{suffix}", e)
        return block if self.layout.gate_first else block.flip(axis_g)

    def _read(self, name: str, e: int | None) -> torch.Tensor:
        axes, stored, ranges = mlp_axes(self.layout, self.mlp)[name], self.tensors[name], self._cuts(name)
        if self.sizes["E"] and self.layout.stacked:
            axes = with_experts(axes, self.layout)
            if e is not None:
                ranges["E"] = range(e, e + 1)
        elif isinstance(stored, Sequence):
            assert e is not None
            stored = stored[e]
        order = "".join(letter for letter in _CANONICAL[name] if letter in "".join(axes))
        block = read_block(stored, axes, self.sizes, ranges, order)  # type: ignore[arg-type]
        return block[0] if "E" in ranges else block

    def _cuts(self, name: str) -> dict[str, range]:
        """This rank's range of the axis that the placement cuts."""
        if self.parallel is None:
            return {}
        matrix, _, bias = name.partition("_")
        base = (matrix if matrix == "w2" else "w13") + (f"_{bias}" if bias else "")
        dim = PLACEMENTS[f"{base}_{_CANONICAL[base]}"].shard_dim
        if dim is None:
            return {}
        letter = _CANONICAL[base][dim]
        return {letter: range(*self.parallel.ranges(self.sizes[letter])[self.rank])}


def layout_sizes(spec: MoESpec, part: Part, parallel: Parallel | None = None, rank: int = 0) -> dict[str, int]:
    """Sizes by axis letter of the routed experts or of the shared one; I is the rank's share given `parallel`."""
    shared = spec.shared if part == "shared" else None
    mlp, size = (shared.mlp, shared.intermediate_size) if shared else (spec.experts, spec.intermediate_size)
    if parallel is not None:
        start, stop = parallel.ranges(size)[rank]
        size = stop - start
    return {"E": 0 if part == "shared" else spec.num_experts, "G": mlp.num_projections, "I": size,
            "H": spec.hidden_size}


def stored_axes(layout: Layout, mlp: MLP, part: Part) -> dict[str, Axes]:
    """Axes of every stored tensor; of one expert's tensors where the experts are a list."""
    axes = mlp_axes(layout, mlp)
    return axes if part == "shared" else {name: with_experts(groups, layout) for name, groups in axes.items()}


def stored_shapes(layout: Layout, mlp: MLP, part: Part, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of every stored tensor; of one expert's tensors where the experts are a list."""
    return {name: stored_shape(axes, dict(sizes)) for name, axes in stored_axes(layout, mlp, part).items()}
