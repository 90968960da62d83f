"""A layer's encoded weights under the names and in the tensors of a format: the way back from open_quantised."""

import torch

from moe_ref.checkpoints.naming import Naming, find_naming
from moe_ref.checkpoints.quantisation_config import read_format
from moe_ref.checkpoints.quantised_format import Axis
from moe_ref.checkpoints.quantised_names import MATRICES, LayerNames, MatrixNames
from moe_ref.checkpoints.reader import layer_prefix
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import UsageTypeError, raise_faults
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights, check_quantised
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WHOLE_PARAMETERS
from moe_ref.layouts.stored import Part


def store_quantised(weights: QuantisedWeights, layer: int | str, naming: str | Naming, spec: MoESpec,
                    config: dict[str, object]) -> dict[str, torch.Tensor]:
    """Every tensor of the layer by its full name, in the format that a quantization_config says.

    weights: unsharded; scales and codes keep their bits. Raises UsageTypeError for weights of another scheme than the
    format's, UsageValueError for biases of experts that are not stacked, and for numbers that the format cannot hold.
    """
    naming = find_naming(naming) if isinstance(naming, str) else naming
    names = LayerNames(layer_prefix(naming, layer), naming, spec, read_format("config", config))
    if weights.scheme is not names.format.scheme:
        raise UsageTypeError(f"weights: scheme {weights.scheme}, but should be {names.format.scheme} as the config "
                             "says")
    check_quantised(weights, spec, Parallel(), 0)
    tensors: dict[str, torch.Tensor] = {}
    for part in names.parts:
        for parameter in MATRICES:
            tensors |= _matrix_tensors(weights, names, part, parameter)
        tensors |= _bias_tensors(weights, names, part)
    for name in WHOLE_PARAMETERS:
        if (tensor := getattr(weights, name)) is not None:
            tensors[names.plain()[name][0][0]] = tensor[None] if name in naming.unit_axes else tensor
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _matrix_tensors(weights: QuantisedWeights, names: LayerNames, part: Part,
                    parameter: str) -> dict[str, torch.Tensor]:
    start, stored_format = "" if part == "experts" else "shared_", names.format
    encoded: Encoded = getattr(weights, start + parameter)
    field = f"{parameter}_input_scale_E" if part == "experts" else f"shared_{parameter}_input_scale"
    input_scale = getattr(weights, field)
    tensors = {}
    for place, one in enumerate(names.matrices(part, parameter)):
        joint = "G" in one.rows
        matrix = encoded if parameter == "w2" or joint else encoded.mapped(
            lambda tensor, place=place: tensor.select(int(part == "experts"), place))
        stored = stored_format.store(matrix)
        for suffix, tensor in stored.items():
            held = _joined(tensor, one, names, part, stored_format.parts[suffix].axes) if joint else tensor
            tensors |= _by_module(one, names, part, suffix, held)
        if stored_format.input_scale:
            assert input_scale is not None
            tensors |= _by_module(one, names, part, stored_format.input_scale, input_scale[..., None])
        if stored_format.shape:
            tensors |= {names.tensor(module, stored_format.shape): torch.tensor([one.num_rows, one.num_columns])
                        for module in one.modules}
    return tensors


def _joined(tensor: torch.Tensor, one: MatrixNames, names: LayerNames, part: Part,
            axes: tuple[Axis, ...]) -> torch.Tensor:
    """Gate and up, an axis in front of the stored ones, in the axis of rows."""
    leading, row = int(part == "experts"), [axis.kind for axis in axes].index("rows")
    tensor = tensor if names.layout(part).gate_first else tensor.flip(leading)
    inside = one.rows.index("G")
    return tensor.movedim(leading, leading + row + inside).flatten(leading + row, leading + row + 1)


def _by_module(one: MatrixNames, names: LayerNames, part: Part, suffix: str,
               tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if part == "shared" or names.layout(part).stacked:
        return {names.tensor(one.modules[0], suffix): tensor}
    return {names.tensor(module, suffix): tensor[e] for e, module in enumerate(one.modules)}


def _bias_tensors(weights: QuantisedWeights, names: LayerNames, part: Part) -> dict[str, torch.Tensor]:
    layout, start = names.layout(part), "" if part == "experts" else "shared_"
    w13, w2 = ((weights.w13_bias_EGI, weights.w2_bias_EH) if part == "experts" else
               (weights.shared_w13_bias_GI, weights.shared_w2_bias_H))
    if w13 is None or w2 is None:
        return {}
    if layout.gate_up == "separate" or not layout.gate_first:
        raise_faults("store_quantised", [f"biases of layout {layout}, but only those of gate and up in one tensor, "
                                         "gate first, are written"])
    rows = w13.mT.flatten(-2) if layout.gate_up == "interleaved" else w13.flatten(-2)
    held = {f"{start}w13_bias": rows, f"{start}w2_bias": w2}
    return {names.plain()[key][0][0]: tensor for key, tensor in held.items()}
