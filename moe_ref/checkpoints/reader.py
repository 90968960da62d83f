"""One layer of a checkpoint as a source of experts, one rank's slices at a time."""

from collections.abc import Mapping
from pathlib import Path

import torch

from moe_ref.checkpoints.files import CheckpointFiles, StoredSlice
from moe_ref.checkpoints.name_ranges import name_ranges
from moe_ref.checkpoints.naming import Naming, find_naming
from moe_ref.contract.errors import UsageValueError, is_integer, raise_faults
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WHOLE_PARAMETERS
from moe_ref.layouts.arguments import check_place, raise_type_faults, type_faults
from moe_ref.layouts.convert import layout_shapes
from moe_ref.layouts.dtypes import StoredDtype, dtype_faults
from moe_ref.layouts.layout import mlp_axes
from moe_ref.layouts.source import LayoutSource
from moe_ref.layouts.stored import StoredMLP, layout_sizes

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that are read, by their names in a safetensors header."""


def open_checkpoint(path: str | Path, layer: int | str, naming: str | Naming, spec: MoESpec,
                    parallel: Parallel | None = None, rank: int = 0) -> LayoutSource:
    """A WeightSource over one layer of a safetensors checkpoint, dtypes as stored; experts are read on demand.

    layer: its number, or the prefix of its names, "model.language_model.layers.3". naming: one of namings(), its
    name, or a family (model_type). The source's expert(i) is the i-th of those that `rank` hosts, and only this rank's
    slices of it are read, along the axes that placements(parallel) cuts; gate and up of one expert are copied together
    where they are not stored so that one view holds both.
    Raises UsageValueError that lists all tensors that are missing, unknown, of another shape, quantised or of a
    dtype that dtype_faults refuses; also for a rank outside [0, ep * tp), and files that cannot be read or mean two
    things. Raises UsageTypeError that lists the arguments of another type.
    """
    raise_type_faults("open_checkpoint", type_faults(
        path=(path, str | Path), layer=(layer, int | str), naming=(naming, str | Naming), spec=(spec, MoESpec),
        parallel=(parallel, Parallel | None)))
    parallel = check_place(parallel, rank)
    naming = find_naming(naming) if isinstance(naming, str) else naming
    files = CheckpointFiles(path)
    prefix = layer_prefix(naming, layer)
    stored = _open_tensors(files, prefix, naming, spec)
    names = mlp_axes(naming.experts, spec.experts)
    experts = StoredMLP({name: _one_or_list(stored[name], naming) for name in names}, naming.experts, spec.experts,
                        "experts", layout_sizes(spec, "experts"), parallel, rank)
    shared = None
    if spec.shared:
        names = mlp_axes(naming.shared, spec.shared.mlp)
        shared = StoredMLP({name: stored[f"shared_{name}"][0] for name in names}, naming.shared, spec.shared.mlp,
                           "shared", layout_sizes(spec, "shared"), parallel, rank)
    whole = {name: stored[name][0][()] for name in WHOLE_PARAMETERS if name in stored}
    return LayoutSource(experts, shared, {name: tensor[0] if name in naming.unit_axes else tensor
                                          for name, tensor in whole.items()})


def layer_prefix(naming: Naming, layer: int | str) -> str:
    """How the names of that layer begin."""
    return naming.layer.format(layer=layer) if is_integer(layer) else f"{str(layer).rstrip('.')}."


def _one_or_list(tensors: list[StoredSlice], naming: Naming) -> StoredSlice | list[StoredSlice]:
    return tensors[0] if naming.experts.stacked else tensors


def _open_tensors(files: CheckpointFiles, prefix: str, naming: Naming,
                  spec: MoESpec) -> dict[str, list[StoredSlice]]:
    """By stored or canonical parameter what the spec needs, a tensor per expert where they are a list."""
    shapes = layout_shapes(naming.experts, spec, shared_layout=naming.shared)
    wanted = {key: _names(key, prefix, naming, spec) for key in shapes if key in naming.tensors}
    faults = [f"the spec needs {key}, but naming {naming.name} has no tensor for it"
              for key in shapes if key not in wanted]
    faults += name_faults(files, prefix, naming, {name for names in wanted.values() for name in names},
                           identity_names(prefix, naming, spec))
    stored, dtypes = {}, []
    for key, names in wanted.items():
        held = {name: files.stored(name) for name in names if name in files}
        shape = ((1,) if key in naming.unit_axes else ()) + shapes[key]
        faults += tensor_faults(held, shape)
        stored[key] = list(held.values())
        dtypes += [StoredDtype(name, key, DTYPES[tensor.dtype]) for name, tensor in held.items()
                   if tensor.dtype in DTYPES]
    raise_faults(f"{files.path}, {prefix}*", faults + dtype_faults(dtypes))
    return stored


def name_faults(files: CheckpointFiles, prefix: str, naming: Naming, needed: set[str],
                 ignored: set[str]) -> list[str]:
    """What is missing, and what is there that nobody asked for: it would change the layer's result unnoticed."""
    modules = tuple(f"{prefix}{module}." for module in naming.modules)
    present = {name for name in files.names if name.startswith(modules)}
    if not present:
        raise UsageValueError(f"{files.path}: no tensor begins with {prefix} and one of "
                              f"{', '.join(sorted(naming.modules))}, as naming {naming.name} has it; the first of "
                              f"{len(files.names)} is {next(iter(files.names), None)}")
    faults = [f"{name} is missing" for name in name_ranges(needed - present)]
    extra: dict[str, list[str]] = {}
    for name in present - needed - ignored:
        extra.setdefault(files.stored(name).dtype, []).append(name)
    return faults + [f"{name} ({dtype}) is there, but spec and naming {naming.name} do not have it"
                     for dtype in sorted(extra) for name in name_ranges(extra[dtype])]


def _names(key: str, prefix: str, naming: Naming, spec: MoESpec) -> list[str]:
    name = naming.tensors[key]
    if "{e}" not in name:
        # A list of experts without numbers is the MLP of a dense layer: one expert.
        return [prefix + name]
    return [prefix + name.format(e=e) for e in range(spec.num_experts)]


def identity_names(prefix: str, naming: Naming, spec: MoESpec) -> set[str]:
    """What may be stored for identity experts, which have no parameters."""
    if not naming.identity_stored:
        return set()
    return {prefix + name.format(e=e) for name in naming.tensors.values() if "{e}" in name
            for e in range(spec.num_experts, spec.num_choices)}


def tensor_faults(tensors: Mapping[str, StoredSlice], shape: tuple[int, ...]) -> list[str]:
    """A fault for each of these plain tensors, by name, that is quantised or of another shape."""
    faults = []
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            faults.append(f"{name}: stored as {tensor.dtype}, but should be one of {', '.join(DTYPES)}; "
                          "open_quantised reads quantised checkpoints")
        if tensor.shape != shape:
            faults.append(f"{name}: shape {tensor.shape}, but should be {shape}")
    return faults
