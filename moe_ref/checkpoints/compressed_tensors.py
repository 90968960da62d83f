"""The formats of compressed-tensors, which llm-compressor writes, and one small table for each of them.

float-quantized and int-quantized: `weight` in fp8 or int8 beside `weight_scale`, of a matrix, a row or a 128 x 128
block. mxfp8-quantized: the same with bytes of e8m0. pack-quantized: `weight_packed` int32 (N, K / 8), the first column
in the lowest bits, numbers moved up by 8 so that none is negative; `weight_zero_point` packed along the rows;
`weight_g_idx` under act-order; int8 in the same way, moved up by 128. nvfp4-pack-quantized: `weight_packed` uint8
(N, K / 2) and `weight_scale` e4m3 (N, K / 16) beside `weight_global_scale`, the RECIPROCAL of the second scale:

    value = code * weight_scale[n, k // 16] / weight_global_scale

Kernels multiply by its reciprocal in fp32, and so is it read. Sources: compressed-tensors compressors/*/base.py and
quantization/lifecycle/forward_helpers.py.
"""

from collections.abc import Mapping
from functools import partial

from moe_ref.checkpoints.config_values import Config, check_values, strings
from moe_ref.checkpoints.not_converted import by_compressed_tensors
from moe_ref.checkpoints.packed_float import packed_float_format
from moe_ref.checkpoints.packed_int import packed_int_format
from moe_ref.checkpoints.quantised_format import QuantisedFormat
from moe_ref.checkpoints.scaled_weight import encode_scaled, scaled_parts, store_scaled
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Scheme

METHOD, SCALE = "compressed-tensors", "weight_scale"


def read_format(where: str, config: Config) -> QuantisedFormat:
    """The format that a quantization_config with quant_method compressed-tensors says.

    Raises UsageValueError for several groups of modules, formats and strategies that no scheme stands for.
    """
    group = _only_group(where, config)
    weights, inputs = _mapping(where, group, "weights"), _mapping(where, group, "input_activations")
    name = str(group.get("format") or config.get("format"))
    skips = partial(by_compressed_tensors, strings(where, config, "ignore"))
    where = f"{where}: format {name}"
    if name in ("float-quantized", "naive-quantized", "int-quantized", "mxfp8-quantized"):
        scheme = _scaled_scheme(where, name, weights, inputs)
        fixed = scheme is Scheme.FP8_TENSOR
        return QuantisedFormat(
            name=name, scheme=scheme, parts=scaled_parts(scheme, SCALE), encode=partial(encode_scaled, scheme, SCALE),
            store=partial(store_scaled, SCALE), skips=skips, input_scale="input_scale" if fixed else None)
    if name == "pack-quantized":
        return packed_int_format(where, name, weights, skips)
    if name in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        return packed_float_format(where, name, weights, skips)
    raise UsageValueError(f"{where}, but should be float-quantized, int-quantized, mxfp8-quantized, pack-quantized, "
                          "nvfp4-pack-quantized or mxfp4-pack-quantized")


def _only_group(where: str, config: Config) -> Config:
    groups = _mapping(where, config, "config_groups")
    if len(groups) != 1:
        raise UsageValueError(f"{where}: {len(groups)} config_groups, but should be 1: which of them has a layer's "
                              "experts is not worked out")
    return _mapping(where, groups, next(iter(groups)))


def _mapping(where: str, config: Config, key: str) -> Mapping[str, object]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise UsageValueError(f"{where}: {key}={value!r}, but should be a mapping")
    return value


def _scaled_scheme(where: str, name: str, weights: Config, inputs: Config) -> Scheme:
    check_values(f"{where}: weights", weights, num_bits=(8,), symmetric=(True, None), dynamic=(False, None))
    if name == "mxfp8-quantized":
        check_values(f"{where}: weights", weights, type=("float",), group_size=(32,))
        return Scheme.MXFP8
    if name == "int-quantized" or weights.get("type") == "int":
        check_values(f"{where}: weights", weights, type=("int",), strategy=("channel",))
        check_values(f"{where}: input_activations", inputs, dynamic=(True,), strategy=("token",))
        return Scheme.INT8
    check_values(f"{where}: weights", weights, type=("float",), strategy=("tensor", "channel", "block"))
    if weights["strategy"] == "tensor":
        check_values(f"{where}: input_activations", inputs, dynamic=(False, None), strategy=("tensor",))
        return Scheme.FP8_TENSOR
    check_values(f"{where}: input_activations", inputs, dynamic=(True,))
    if weights["strategy"] == "channel":
        check_values(f"{where}: input_activations", inputs, strategy=("token",))
        return Scheme.FP8_ROW
    check_values(f"{where}: weights", weights, block_structure=([128, 128],))
    check_values(f"{where}: input_activations", inputs, strategy=("group",), group_size=(128,))
    return Scheme.FP8_BLOCK
