"""One MLP, or all experts, as they are stored: read in the canonical axes, one rank's part at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moe_ref.contract.parallel import Parallel
from moe_ref.contract.placements import part_range, placements
from moe_ref.contract.spec import MLP, MoESpec
from moe_ref.contract.weights import ExpertWeights, parameter_shapes
from moe_ref.layouts.blocks import Stored, read_block
from moe_ref.layouts.layout import Axes, Layout, mlp_axes, stored_shape, with_experts

Part = Literal["experts", "shared"]
Tensors = Mapping[str, Stored | Sequence[Stored]]
Sizes = Mapping[str, Mapping[str, int]]
"""Of every stored tensor, by axis letter: where w2 is cut by output its I and H are not those of w13."""

_PARAMETERS = {"w13": "w13_EGIH", "w1": "w13_EGIH", "w3": "w13_EGIH", "w2": "w2_EHI",
               "w13_bias": "w13_bias_EGI", "w1_bias": "w13_bias_EGI", "w3_bias": "w13_bias_EGI",
               "w2_bias": "w2_bias_EH"}


@dataclass(frozen=True)
class StoredMLP:
    """Stored tensors of the routed experts or of the shared one, by their names in mlp_axes.

    sizes: those of the stored tensors. parallel cuts them for `rank` along the axes that placements tells, and leaves
    the experts that the rank hosts; None: the tensors are this rank's part already.
    """

    tensors: Tensors
    layout: Layout
    mlp: MLP
    part: Part
    sizes: Sizes
    parallel: Parallel | None = None
    rank: int = 0

    @property
    def experts(self) -> Sequence[int]:
        """Where the experts of this rank are stored, in its order."""
        stored = self.sizes["w2"]["E"]
        if self.parallel is None:
            return range(stored)
        return self.parallel.hosted(stored)[self.parallel.coordinates(self.rank)[0]]

    def expert(self, index: int) -> ExpertWeights:
        """One expert of this rank; views, but where gate and up must be put together (2, I, H) is a copy."""
        return ExpertWeights(*self._read_all(self.experts[index]))

    def shared_expert(self) -> ExpertWeights:
        """The one MLP, in the same way."""
        return ExpertWeights(*self._read_all(None))

    def biases(self, index: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of w13 and of w2 alone, of one expert of this rank or, None, of the one MLP; `tensors` may be the
        biases alone."""
        e = None if index is None else self.experts[index]
        return self._gate_up("_bias", e), self._read("w2_bias", e)

    def whole(self) -> tuple[torch.Tensor | None, ...]:
        """w13, w2 and their biases over all stored experts; views if the layout is one that has them."""
        return self._read_all(None)

    def _read_all(self, e: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None,
                                                torch.Tensor | None]:
        bias = self.mlp.bias
        return (self._gate_up("", e), self._read("w2", e),
                self._gate_up("_bias", e) if bias else None, self._read("w2_bias", e) if bias else None)

    def _gate_up(self, suffix: str, e: int | None) -> torch.Tensor:
        """The projections with an axis G, gate first."""
        axis_g = 1 if e is None and self.part == "experts" else 0
        if not self.mlp.gated:
            return self._read(f"w1{suffix}", e).unsqueeze(axis_g)
        if self.layout.gate_up == "separate":
            return torch.stack([self._read(f"w1{suffix}", e), self._read(f"w3{suffix}", e)], axis_g)
        block = self._read(f"w13{suffix}", e)
        return block if self.layout.gate_first else block.flip(axis_g)

    def _read(self, name: str, e: int | None) -> torch.Tensor:
        axes, stored, ranges = mlp_axes(self.layout, self.mlp)[name], self.tensors[name], self._cuts(name)
        if self.part == "experts" and self.layout.stacked:
            axes = with_experts(axes, self.layout)
            if e is not None:
                ranges["E"] = range(e, e + 1)
        elif isinstance(stored, Sequence):
            assert e is not None
            stored = stored[e]
        order = "".join(letter for letter in self.sizes[name] if letter in "".join(axes))
        block = read_block(stored, axes, self.sizes[name], ranges, order)  # type: ignore[arg-type]
        return block[0] if "E" in ranges else block

    def _cuts(self, name: str) -> dict[str, range]:
        """This rank's range of the axis that the placement cuts."""
        if self.parallel is None:
            return {}
        parameter = parameter_name(name, self.part)
        dim = placements(self.parallel)[parameter].shard_dim
        if dim is None:
            return {}
        letter = list(self.sizes[name])[dim]
        return {letter: range(*part_range(parameter, self.sizes[name][letter], self.parallel, self.rank))}


def parameter_name(stored: str, part: Part) -> str:
    """The parameter that a stored tensor is, or one projection of it."""
    name = _PARAMETERS[stored]
    return name if part == "experts" else "shared_" + name.replace("_E", "_", 1)


def layout_sizes(spec: MoESpec, part: Part, parallel: Parallel | None = None,
                 rank: int = 0) -> dict[str, dict[str, int]]:
    """Sizes by axis letter, in canonical order, of what may be stored; of `rank`'s part given `parallel`."""
    shapes = parameter_shapes(spec, parallel, rank)
    parameters = {stored: parameter_name(stored, part) for stored in _PARAMETERS}
    return {stored: dict(zip(name.rpartition("_")[2], shapes[name], strict=True))
            for stored, name in parameters.items() if name in shapes}


def stored_shapes(layout: Layout, mlp: MLP, part: Part, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of every stored tensor; of one expert's tensors where the experts are a list."""
    return {name: stored_shape(axes, sizes[name]) for name, axes in _stored_axes(layout, mlp, part).items()}


def _stored_axes(layout: Layout, mlp: MLP, part: Part) -> dict[str, Axes]:
    axes = mlp_axes(layout, mlp)
    return axes if part == "shared" else {name: with_experts(groups, layout) for name, groups in axes.items()}
