"""Values of quantization_config as released checkpoints have them, by a name for tests, and the scheme of each."""

from moe_ref.contract.vocabulary import Scheme


def compressed(name: str, weights: dict[str, object], inputs: dict[str, object] | None = None) -> dict[str, object]:
    """One of compressed-tensors, with one group of modules."""
    return {"quant_method": "compressed-tensors", "format": name, "ignore": ["lm_head", "re:.*mlp.gate$"],
            "quantization_status": "compressed", "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}}}


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "dynamic": False, "actorder": None}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq", "damp_percent": 0.01, "true_sequential": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
       "modules_to_not_convert": ["gate."]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": [
    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}

CONFIGS: dict[str, tuple[Scheme, dict[str, object]]] = {
    "deepseek_fp8": (Scheme.FP8_BLOCK, FP8),
    "fp8_tensor": (Scheme.FP8_TENSOR, compressed("float-quantized", FLOAT8 | {"strategy": "tensor"}, {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False})),
    "fp8_channel": (Scheme.FP8_ROW, compressed("float-quantized", FLOAT8 | {"strategy": "channel"}, TOKEN)),
    "fp8_block": (Scheme.FP8_BLOCK, compressed(
        "float-quantized", FLOAT8 | {"strategy": "block", "block_structure": [128, 128]},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True})),
    "mxfp8": (Scheme.MXFP8, compressed("mxfp8-quantized", FLOAT8 | {"strategy": "group", "group_size": 32})),
    "int8": (Scheme.INT8, compressed("int-quantized", INT8, TOKEN | {"type": "int"})),
    "int8_packed": (Scheme.INT8, compressed("pack-quantized", INT8)),
    "int4": (Scheme.GPTQ, compressed("pack-quantized", INT4 | {"group_size": 128, "symmetric": True})),
    "int4_32": (Scheme.GPTQ_32, compressed("pack-quantized", INT4 | {"group_size": 32, "symmetric": True})),
    "int4_zeros": (Scheme.AWQ, compressed("pack-quantized", INT4 | {"group_size": 128, "symmetric": False})),
    "int4_order": (Scheme.GPTQ_ORDER, compressed("pack-quantized", INT4 | {
        "group_size": 128, "symmetric": True, "actorder": "group"})),
    "nvfp4": (Scheme.NVFP4, compressed("nvfp4-pack-quantized", FLOAT4 | {
        "strategy": "tensor_group", "group_size": 16})),
    "mxfp4_packed": (Scheme.MXFP4, compressed("mxfp4-pack-quantized", FLOAT4 | {
        "strategy": "group", "group_size": 32})),
    "gptq": (Scheme.GPTQ, GPTQ),
    "gptq_32": (Scheme.GPTQ_32, GPTQ | {"group_size": 32}),
    "gptq_v2": (Scheme.GPTQ, GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq_zeros": (Scheme.AWQ, GPTQ | {"sym": False}),
    "gptq_order": (Scheme.GPTQ_ORDER, GPTQ | {"desc_act": True}),
    "gptq_order_32": (Scheme.GPTQ_ORDER_32, GPTQ | {"desc_act": True, "group_size": 32}),
    "awq": (Scheme.AWQ, AWQ),
    "awq_32": (Scheme.AWQ_32, AWQ | {"group_size": 32}),
    "gpt_oss_mxfp4": (Scheme.MXFP4, MXFP4),
}
