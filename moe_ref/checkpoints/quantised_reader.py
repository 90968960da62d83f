"""One layer of a quantised checkpoint as encoded weights: the slices of one rank, no number changed."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from moe_ref.checkpoints.files import CheckpointFiles, StoredSlice
from moe_ref.checkpoints.name_ranges import name_ranges
from moe_ref.checkpoints.naming import Naming, find_naming
from moe_ref.checkpoints.quantisation_config import find_format
from moe_ref.checkpoints.quantised_matrix import QuantisedMatrix
from moe_ref.checkpoints.quantised_names import MATRICES, LayerNames, MatrixNames
from moe_ref.checkpoints.reader import DTYPES, identity_names, layer_prefix, name_faults, tensor_faults
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights, check_quantised
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WHOLE_PARAMETERS, parameter_shapes
from moe_ref.layouts.arguments import check_place, raise_type_faults, type_faults
from moe_ref.layouts.dtypes import StoredDtype, dtype_faults
from moe_ref.layouts.stored import Part, StoredMLP, layout_sizes

Stored = dict[str, StoredSlice]
Wanted = tuple[str, tuple[int, ...], tuple[str, ...]]


def open_quantised(path: str | Path, layer: int | str, naming: str | Naming, spec: MoESpec,
                   parallel: Parallel | None = None, rank: int = 0) -> QuantisedWeights:
    """This rank's encoded experts of one layer of a safetensors checkpoint, in the format that config.json says.

    Arguments are those of open_checkpoint; the naming is that of the family's plain checkpoints, whose ".weight" gives
    way to the names of the format. Read are the experts that `rank` hosts, and of their codes and scales its own, out
    to whole words and blocks; under act-order every scale. Codes, zero points and scales keep their bits, but for
    scales that are widened to fp32 and for nvfp4's second scale, which is stored as its reciprocal.
    Raises UsageValueError that lists all tensors that are missing, unknown, of another shape or dtype, and modules
    that the configuration leaves out; also for formats without a scheme, and as open_checkpoint does.
    """
    raise_type_faults("open_quantised", type_faults(
        path=(path, str | Path), layer=(layer, int | str), naming=(naming, str | Naming), spec=(spec, MoESpec),
        parallel=(parallel, Parallel | None)))
    parallel = check_place(parallel, rank)
    naming = find_naming(naming) if isinstance(naming, str) else naming
    files = CheckpointFiles(path)
    names = LayerNames(layer_prefix(naming, layer), naming, spec, find_format(path))
    stored = _open_tensors(files, names)
    fields: dict[str, object] = {}
    for part in names.parts:
        for parameter in MATRICES:
            fields |= _read_matrix(names, stored, part, parameter, parallel, rank)
        fields |= _read_biases(names, stored, part, parallel, rank)
    for name, (held, _) in names.plain().items():
        if name in WHOLE_PARAMETERS:
            tensor = stored[held[0]][()]
            fields[name] = tensor[0] if name in naming.unit_axes else tensor
    weights = QuantisedWeights(scheme=names.format.scheme, **fields)  # type: ignore[arg-type]
    check_quantised(weights, spec, parallel, rank)
    return weights


def _read_matrix(names: LayerNames, stored: Stored, part: Part, parameter: str, parallel: Parallel,
                 rank: int) -> dict[str, object]:
    """w13 or w2, and the scale of the rows that it takes, by field of QuantisedWeights."""
    matrix = QuantisedMatrix(names, part, parameter, stored, parallel, rank)
    hosted = parallel.hosted(names.spec.num_experts)[parallel.coordinates(rank)[0]]
    experts = hosted if part == "experts" else [None]
    # Where a rank hosts nothing, the first expert tells the shapes.
    encoded = _stacked(experts or (0,), matrix)
    start = "" if part == "experts" else "shared_"
    found: dict[str, object] = {start + parameter: encoded.experts([]) if not experts else
                                encoded if part == "experts" else encoded.at(0)}
    if names.format.input_scale:
        scales = torch.stack([matrix.input_scale(e) for e in experts or (0,)])[:len(experts)]
        found |= ({f"{parameter}_input_scale_E": scales} if part == "experts" else
                  {f"shared_{parameter}_input_scale": scales[0]})
    return found


def _stacked(experts: tuple[int, ...] | list[None], matrix: QuantisedMatrix) -> Encoded:
    """The encoded matrices on an axis in front, never more than one of them beside the result."""
    first = matrix.read(experts[0])
    whole = first.mapped(lambda one: one.new_empty((len(experts), *one.shape)))
    for place, e in enumerate(experts):
        encoded = matrix.read(e) if place else first
        for name, tensor in encoded.tensors.items():
            whole.tensors[name][place] = tensor
    return whole


def _first(stored: StoredSlice | list[StoredSlice]) -> StoredSlice:
    return stored[0] if isinstance(stored, list) else stored


def _read_biases(names: LayerNames, stored: Stored, part: Part, parallel: Parallel,
                 rank: int) -> dict[str, torch.Tensor]:
    layout, mlp, start = names.layout(part), names.mlp(part), "" if part == "experts" else "shared_"
    tensors = {}
    for key, (held, _) in names.plain().items():
        if key.endswith("_bias") and key.startswith("shared_") == bool(start):
            found = [stored[name] for name in held]
            tensors[key.removeprefix(start)] = found if part == "experts" and not layout.stacked else found[0]
    if not tensors:
        return {}
    biases = StoredMLP(tensors, layout, mlp, part, layout_sizes(names.spec, part), parallel, rank)
    if part == "shared":
        return dict(zip(("shared_w13_bias_GI", "shared_w2_bias_H"), biases.biases(None), strict=True))
    shapes = parameter_shapes(names.spec, parallel, rank)
    # A rank may host no expert, so that nothing is read which would tell the dtype.
    fields = {name: torch.empty(shapes[name], dtype=DTYPES[_first(tensors[key]).dtype])
              for name, key in (("w13_bias_EGI", next(iter(tensors))), ("w2_bias_EH", "w2_bias"))}
    for index in range(len(biases.experts)):
        fields["w13_bias_EGI"][index], fields["w2_bias_EH"][index] = biases.biases(index)
    return fields


def _open_tensors(files: CheckpointFiles, names: LayerNames) -> Stored:
    """Every tensor of the layer by full name, after all checks that headers allow."""
    prefix, spec = names.prefix, names.spec
    plain, codes = names.plain(), dict(_code_tensors(names))
    needed = {name for held, _ in plain.values() for name in held} | codes.keys()
    unread = {names.tensor(module, suffix) for one in _matrices(names) for module in one.modules
              for suffix in names.format.unread}
    faults = _skipped(names) + name_faults(files, prefix, names.naming, needed,
                                           unread | identity_names(prefix, names.naming, spec))
    stored = {name: files.stored(name) for name in needed if name in files}
    dtypes = []
    for key, (held, shape) in plain.items():
        found = {name: stored[name] for name in held if name in stored}
        faults += tensor_faults(found, shape)
        dtypes += [StoredDtype(name, key, DTYPES[one.dtype]) for name, one in found.items() if one.dtype in DTYPES]
    faults += _code_faults(names, stored, codes)
    raise_faults(f"{files.path}, {prefix}*", faults + dtype_faults(dtypes))
    raise_faults(f"{files.path}, {prefix}*", _size_faults(names, stored))
    return stored


def _code_faults(names: LayerNames, stored: Stored, codes: Mapping[str, Wanted]) -> list[str]:
    """What codes and scales have another shape or dtype, or another dtype than the first of their kind."""
    faults, first = [], {}
    for name, (kind, shape, allowed) in codes.items():
        if (one := stored.get(name)) is None:
            continue
        reference = first.setdefault(kind, name)
        if one.dtype not in allowed:
            hint = f"; a plain tensor, but format {names.format.name} has codes" * (one.dtype in DTYPES)
            faults.append(f"{name}: stored as {one.dtype}, but should be {' or '.join(allowed)}{hint}")
        elif one.dtype != stored[reference].dtype:
            faults.append(f"{name}: stored as {one.dtype}, but should be {stored[reference].dtype} as {reference}")
        if one.shape != shape:
            faults.append(f"{name}: shape {one.shape}, but should be {shape}")
    return faults


def _matrices(names: LayerNames) -> Iterator[MatrixNames]:
    for part in names.parts:
        for parameter in MATRICES:
            yield from names.matrices(part, parameter)


def _code_tensors(names: LayerNames) -> Iterator[tuple[str, Wanted]]:
    """Full name; name in the format, shape and allowed dtypes of all that encoded matrices are stored as."""
    stored_format = names.format
    for part in names.parts:
        stacked = (names.spec.num_experts,) if part == "experts" and names.layout(part).stacked else ()
        for parameter in MATRICES:
            for one in names.matrices(part, parameter):
                tensors = {suffix: (stacked + tensor.shape(one.num_rows, one.num_columns), tensor.dtypes)
                           for suffix, tensor in stored_format.parts.items()}
                if stored_format.input_scale:
                    tensors[stored_format.input_scale] = (1,), ("F32",)
                if stored_format.shape:
                    tensors[stored_format.shape] = (2,), ("I64", "I32")
                for module in one.modules:
                    yield from ((names.tensor(module, suffix), (suffix, *held)) for suffix, held in tensors.items())


def _skipped(names: LayerNames) -> list[str]:
    """Modules without codes: one scheme is that of all matrices of a layer, the shared expert's too."""
    modules = [module for one in _matrices(names) for module in one.modules if names.format.skips(module)]
    return [f"{name} is left out by the configuration, but all matrices of a layer should be encoded in one format"
            for name in name_ranges(f"{module}." for module in modules)]


def _size_faults(names: LayerNames, stored: Stored) -> list[str]:
    """What weight_shape says, where there is one."""
    if names.format.shape is None:
        return []
    faults = []
    for one in _matrices(names):
        for module in one.modules:
            name, wanted = names.tensor(module, names.format.shape), [one.num_rows, one.num_columns]
            if (said := stored[name][()].tolist()) != wanted:
                faults.append(f"{name}: {said}, but should be {wanted}")
    return faults
