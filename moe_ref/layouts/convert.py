"""From stored tensors of a layout to the canonical weights, and back."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from moe_ref.contract.errors import raise_faults
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec
from moe_ref.contract.weights import (
    WHOLE_PARAMETERS,
    ExpertWeights,
    MoEWeights,
    WeightSource,
    check_expert,
    check_shared,
    check_weights,
    parameter_shapes,
)
from moe_ref.layouts.arguments import check_place, raise_type_faults, type_faults
from moe_ref.layouts.dtypes import StoredDtype, dtype_faults
from moe_ref.layouts.layout import Layout, mlp_axes, stored_shape
from moe_ref.layouts.source import LayoutSource
from moe_ref.layouts.stored import StoredMLP, layout_sizes, stored_shapes

StoredTensors = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]

_SHARED = "shared_"


def from_layout(tensors: StoredTensors, layout: Layout, spec: MoESpec, parallel: Parallel | None = None,
                rank: int = 0, *, shared_layout: Layout | None = None) -> MoEWeights | LayoutSource:
    """Canonical weights over stored tensors of any strides; no value is changed.

    tensors: by name as in layout_shapes, a list of E tensors each where the experts are not stacked; parameters
    outside the experts under their canonical names (router_EH, ...). With `parallel` they are `rank`'s part, of the
    experts that it hosts in their order.
    shared_layout: that of the shared expert if it is another one. Layouts that have views of all experts
    (stacked, merged or interleaved, gate first) give MoEWeights of such views; the others a source that puts gate
    and up of one expert together when it is read. A shared expert with separate w1 and w3 is always copied.
    Raises UsageValueError that lists everything missing, unknown, of another shape, with both numbers, or of a
    dtype that dtype_faults refuses; also for a rank outside [0, ep * tp). Raises UsageTypeError for arguments of
    another type, and for tensors that are none.
    """
    _check_types("from_layout", layout, shared_layout, spec, parallel, _tensor_type_faults(tensors))
    check_place(parallel, rank)
    shared_layout = shared_layout or layout
    _check(tensors, layout, shared_layout, spec, parallel, rank)
    others = {name: tensor for name in WHOLE_PARAMETERS if isinstance(tensor := tensors.get(name), torch.Tensor)}
    experts = StoredMLP({name: tensors[name] for name in mlp_axes(layout, spec.experts)}, layout, spec.experts,
                        "experts", layout_sizes(spec, "experts", parallel, rank))
    shared = None
    if spec.shared:
        shared = StoredMLP({name: tensors[_SHARED + name] for name in mlp_axes(shared_layout, spec.shared.mlp)},
                           shared_layout, spec.shared.mlp, "shared", layout_sizes(spec, "shared", parallel, rank))
    if not layout.is_view(spec.experts):
        return LayoutSource(experts, shared, others)
    names = ("w13_EGIH", "w2_EHI", "w13_bias_EGI", "w2_bias_EH")
    fields = dict(zip(names, experts.whole(), strict=True))
    if shared:
        names = ("shared_w13_GIH", "shared_w2_HI", "shared_w13_bias_GI", "shared_w2_bias_H")
        fields |= dict(zip(names, shared.shared_expert(), strict=True))
    return MoEWeights(**{name: tensor for name, tensor in fields.items() if tensor is not None}, **others)


def layout_shapes(layout: Layout, spec: MoESpec, parallel: Parallel | None = None, rank: int = 0, *,
                  shared_layout: Layout | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything from_layout takes, of one expert's tensors where the experts are a list.

    w13, or w1 and w3 (w1 alone without a gate); w2; the same names with _bias; all of these with shared_ before
    them for the shared expert; router_EH and the other parameters outside the experts. Raises UsageTypeError and
    UsageValueError for the arguments as from_layout does.
    """
    _check_types("layout_shapes", layout, shared_layout, spec, parallel, [])
    check_place(parallel, rank)
    shapes = stored_shapes(layout, spec.experts, "experts", layout_sizes(spec, "experts", parallel, rank))
    if spec.shared:
        sizes = layout_sizes(spec, "shared", parallel, rank)
        shared = stored_shapes(shared_layout or layout, spec.shared.mlp, "shared", sizes)
        shapes |= {_SHARED + name: shape for name, shape in shared.items()}
    return shapes | {name: shape for name, shape in parameter_shapes(spec).items() if name in WHOLE_PARAMETERS}


def _check_types(function: str, layout: Layout, shared_layout: Layout | None, spec: MoESpec,
                 parallel: Parallel | None, faults: list[str]) -> None:
    """faults: those of further arguments."""
    raise_type_faults(function, faults + type_faults(layout=(layout, Layout), spec=(spec, MoESpec),
                                                     parallel=(parallel, Parallel | None),
                                                     shared_layout=(shared_layout, Layout | None)))


def _tensor_type_faults(tensors: StoredTensors) -> list[str]:
    faults = type_faults(tensors=(tensors, Mapping))
    for name, given in ({} if faults else tensors).items():
        if isinstance(given, Sequence):
            faults += [f"{name}[{e}]: {type(one).__name__}, but should be a tensor"
                       for e, one in enumerate(given) if not isinstance(one, torch.Tensor)]
        elif not isinstance(given, torch.Tensor):
            faults.append(f"{name}: {type(given).__name__}, but should be a tensor or a list of tensors")
    return faults


def _check(tensors: StoredTensors, layout: Layout, shared_layout: Layout, spec: MoESpec, parallel: Parallel | None,
           rank: int) -> None:
    shapes = layout_shapes(layout, spec, parallel, rank, shared_layout=shared_layout)
    hosted = layout_sizes(spec, "experts", parallel, rank)["w2"]["E"]
    listed = () if layout.stacked else tuple(mlp_axes(layout, spec.experts))
    faults = [f"{name} is missing, but the layout needs {shape}" for name, shape in shapes.items()
              if name not in tensors]
    faults += [f"{name} is given, but neither layout nor spec has it" for name in tensors if name not in shapes]
    for name, shape in shapes.items():
        if name in tensors:
            faults += _shape_faults(name, tensors[name], shape, hosted if name in listed else None)
    known = {name: tensors[name] for name in shapes if name in tensors}
    raise_faults(f"tensors of {layout}", faults + dtype_faults(_stored_dtypes(known)))


def _stored_dtypes(tensors: StoredTensors) -> Iterator[StoredDtype]:
    for name, given in tensors.items():
        if isinstance(given, torch.Tensor):
            yield StoredDtype(name, name, given.dtype)
        else:
            yield from (StoredDtype(f"{name}[{e}]", name, tensor.dtype) for e, tensor in enumerate(given))


def _shape_faults(name: str, given: torch.Tensor | Sequence[torch.Tensor], shape: tuple[int, ...],
                  count: int | None) -> list[str]:
    """count: how many tensors a list should have; None: no list."""
    if isinstance(given, torch.Tensor) != (count is None):
        should = "one tensor" if count is None else f"a list of {count} tensors, one per expert"
        return [f"{name}: {type(given).__name__}, but should be {should}"]
    if isinstance(given, torch.Tensor):
        held = tuple(given.shape)
        return [] if held == shape else [f"{name}: shape {held}, but should be {shape}"]
    faults = []
    if len(given) != count:
        faults.append(f"{name}: {len(given)} tensors, but should be {count}, one per expert")
    return faults + [f"{name}[{e}]: shape {tuple(tensor.shape)}, but should be {shape}"
                     for e, tensor in enumerate(given) if tuple(tensor.shape) != shape]


def to_layout(weights: WeightSource, layout: Layout, spec: MoESpec, parallel: Parallel | None = None,
              rank: int = 0, *,
              shared_layout: Layout | None = None) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """The stored tensors of a layout, as from_layout takes them; contiguous copies, but for parameters outside
    the experts, which are passed on. No value is changed.

    With `parallel` the weights are `rank`'s part. Raises UsageValueError and UsageTypeError, as from_layout does,
    unless the weights have exactly the parameters of the spec, in their shapes: nothing is left out.
    """
    _check_types("to_layout", layout, shared_layout, spec, parallel, _source_faults(weights))
    experts, shared = _checked_experts(weights, spec, check_place(parallel, rank), rank)
    rows = [_stored_tensors(expert, layout, spec.experts) for expert in experts]
    shapes = stored_shapes(layout, spec.experts, "experts", layout_sizes(spec, "experts", parallel, rank))
    tensors: dict[str, torch.Tensor | list[torch.Tensor]] = {}
    for name, shape in shapes.items():
        column = [row[name] for row in rows]
        if not layout.stacked:
            tensors[name] = [tensor.clone(memory_format=torch.contiguous_format) for tensor in column]
        elif not column:
            tensors[name] = _like_experts(weights, shared).new_empty(shape)
        else:
            tensors[name] = torch.cat(column) if layout.folded else torch.stack(column)
    if spec.shared and shared is not None:
        for name, tensor in _stored_tensors(shared, shared_layout or layout, spec.shared.mlp).items():
            tensors[_SHARED + name] = tensor.clone(memory_format=torch.contiguous_format)
    return tensors | {name: tensor for name in WHOLE_PARAMETERS if (tensor := getattr(weights, name)) is not None}


def _like_experts(weights: WeightSource, shared: ExpertWeights | None) -> torch.Tensor:
    """Whose dtype and device the experts have, on a rank that hosts none: those that the rule of dtypes accepts."""
    held = (weights.w2_EHI if isinstance(weights, MoEWeights) else None, shared.w2_HI if shared else None,
            weights.output_bias_H, weights.router_EH)
    return next((tensor for tensor in held if tensor is not None), torch.empty(0))


def _source_faults(weights: WeightSource) -> list[str]:
    lacking = [name for name in ("expert", "shared_expert", *WHOLE_PARAMETERS) if not hasattr(weights, name)]
    return [f"weights: {type(weights).__name__}, but should be a WeightSource, which has {', '.join(lacking)}"
            ] if lacking else []


def _checked_experts(weights: WeightSource, spec: MoESpec, parallel: Parallel,
                     rank: int) -> tuple[list[ExpertWeights], ExpertWeights | None]:
    """All experts of the rank and the shared one, after every check of the contract, and of dtypes across experts."""
    check_weights(weights, spec, parallel, rank)
    hosted = parallel.hosted(spec.num_experts)[parallel.coordinates(rank)[0]]
    experts = [check_expert(weights.expert(index), spec, parallel, rank, index) for index in range(len(hosted))]
    shared = check_shared(weights.shared_expert(), spec, parallel, rank)
    parts = [(f"expert {e}, ", expert) for e, expert in zip(hosted, experts, strict=True)]
    parts += [("shared expert, ", shared)] if shared else []
    held = [(label, name, tensor) for label, part in parts for name, tensor in part._asdict().items()]
    held += [("", name, getattr(weights, name)) for name in WHOLE_PARAMETERS]
    raise_faults("weights", dtype_faults(StoredDtype(label + name, name, tensor.dtype)
                                         for label, name, tensor in held if tensor is not None))
    return experts, shared


def _stored_tensors(expert: ExpertWeights, layout: Layout, mlp: MLP) -> dict[str, torch.Tensor]:
    """One MLP's tensors by stored name."""
    tensors = {}
    for name, axes in mlp_axes(layout, mlp).items():
        bias = name.endswith("_bias")
        if name.startswith("w2"):
            tensor, letters = (expert.w2_bias_H, "H") if bias else (expert.w2_HI, "HI")
        else:
            tensor, letters = (expert.w13_bias_GI, "GI") if bias else (expert.w13_GIH, "GIH")
        assert tensor is not None
        if name.startswith(("w1_", "w3_")) or name in ("w1", "w3"):
            tensor, letters = tensor[int(name.startswith("w3"))], letters[1:]
        elif letters[0] == "G" and not layout.gate_first:
            tensor = tensor.flip(0)
        order = [letters.index(letter) for letter in "".join(axes)]
        sizes: dict[str, int] = dict(zip(letters, tensor.shape, strict=True))
        tensors[name] = tensor.permute(order).reshape(stored_shape(axes, sizes))
    return tensors
