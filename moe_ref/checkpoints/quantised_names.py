"""Names and shapes of every tensor that a layer has under a format, from the naming of the plain checkpoint."""

from dataclasses import dataclass
from math import prod

from moe_ref.checkpoints.naming import Naming
from moe_ref.checkpoints.quantised_format import QuantisedFormat
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.spec import MLP, MoESpec
from moe_ref.contract.weights import WHOLE_PARAMETERS, parameter_shapes
from moe_ref.layouts.layout import Layout, mlp_axes
from moe_ref.layouts.stored import Part, layout_sizes, stored_shapes

MATRICES = {"w13": ("w13", "w1", "w3"), "w2": ("w2",)}
"""An encoded parameter -> what it may be stored as."""


@dataclass(frozen=True, kw_only=True)
class MatrixNames:
    """One stored matrix, as w1: modules, one for each expert or one for all; the letters of its rows and columns, gate
    and up among the rows where they are stored together; its rows and columns, of all that one module holds."""

    key: str
    modules: tuple[str, ...]
    rows: str
    columns: str
    num_rows: int
    num_columns: int


@dataclass(frozen=True)
class LayerNames:
    """Names of a layer under a prefix; raises UsageValueError for what the naming or the format does not have."""

    prefix: str
    naming: Naming
    spec: MoESpec
    format: QuantisedFormat

    def __post_init__(self) -> None:
        faults = []
        for part in self.parts:
            layout, mlp = self.layout(part), self.mlp(part)
            if (layout.order, layout.w2_order or "out_in", layout.folded) != ("out_in", "out_in", False):
                faults.append(f"naming {self.naming.name} stores (in, out) or folded, but format {self.format.name} is "
                              "known as (out, in)")
            if layout.gate_up != "separate" and mlp.gated and any(
                    axis.kind == "rows" and axis.size > 1 for one in self.format.parts.values() for axis in one.axes):
                faults.append(f"gate and up {layout.gate_up}, but format {self.format.name} is known with them apart")
            faults += [f"the spec needs {key}, but naming {self.naming.name} has no tensor for it"
                       for key in self._keys(part, layout, mlp) if key not in self.naming.tensors]
        raise_faults("quantised checkpoint", faults)
        raise_faults("quantised checkpoint", self._size_faults())

    @property
    def parts(self) -> tuple[Part, ...]:
        """The routed experts, and the shared one where there is one."""
        return ("experts", "shared") if self.spec.shared else ("experts",)

    def layout(self, part: Part) -> Layout:
        """Where gate and up lie."""
        return self.format.layout or (self.naming.experts if part == "experts" else self.naming.shared)

    def mlp(self, part: Part) -> MLP:
        """The mathematics of the experts of this kind."""
        if part == "experts":
            return self.spec.experts
        assert self.spec.shared is not None
        return self.spec.shared.mlp

    def matrices(self, part: Part, parameter: str) -> tuple[MatrixNames, ...]:
        """What "w13" or "w2" is stored as."""
        layout, mlp = self.layout(part), self.mlp(part)
        axes, sizes = mlp_axes(layout, mlp), layout_sizes(self.spec, part)
        return tuple(MatrixNames(
            key=key, modules=tuple(name.removesuffix(".weight") for name in self._names(part, layout, key)),
            rows=axes[key][0], columns=axes[key][1], num_rows=prod(sizes[key][letter] for letter in axes[key][0]),
            num_columns=sizes[key][axes[key][1]]) for key in MATRICES[parameter] if key in axes)

    def tensor(self, module: str, suffix: str) -> str:
        """The full name of one tensor of a module."""
        return f"{module}{self.format.joint}{suffix}"

    def plain(self) -> dict[str, tuple[list[str], tuple[int, ...]]]:
        """By stored or canonical parameter the names and the shape of what is in a dtype of its own: biases, and the
        parameters that belong to no expert."""
        found = {}
        for part in self.parts:
            layout, mlp = self.layout(part), self.mlp(part)
            shapes = stored_shapes(layout, mlp, part, layout_sizes(self.spec, part))
            found |= {_key(part, key): (self._names(part, layout, key), shape)
                      for key, shape in shapes.items() if key.endswith("_bias")}
        for name, shape in parameter_shapes(self.spec).items():
            if name in WHOLE_PARAMETERS:
                unit = (1,) if name in self.naming.unit_axes else ()
                found[name] = ([self.prefix + self.naming.tensors[name]], unit + shape)
        return found

    def _keys(self, part: Part, layout: Layout, mlp: MLP) -> list[str]:
        whole = [name for name in parameter_shapes(self.spec) if name in WHOLE_PARAMETERS and part == "experts"]
        return [_key(part, key) for key in mlp_axes(layout, mlp)] + whole

    def _names(self, part: Part, layout: Layout, key: str) -> list[str]:
        name = self.prefix + self.naming.tensors[_key(part, key)]
        if part == "shared" or layout.stacked or "{e}" not in name:
            return [name]
        return [name.format(e=e) for e in range(self.spec.num_experts)]

    def _size_faults(self) -> list[str]:
        matrices = [one for part in self.parts for parameter in MATRICES for one in self.matrices(part, parameter)]
        return [fault for one in matrices
                for fault in self.format.shape_faults(one.modules[0], one.num_rows, one.num_columns)]



def _key(part: Part, key: str) -> str:
    return key if part == "experts" else f"shared_{key}"
