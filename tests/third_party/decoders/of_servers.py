"""vLLM and SGLang: what they write in torch beside their kernels, from single files, as the packages need a GPU."""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from moe_ref.adapters.library import Library
from moe_ref.adapters.single_file import absent, load
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from tests.third_party.decoders.decoder import NAN, Decoder

VLLM = Library(distribution="vllm", module="vllm", least="0.33", below="0.34")
SGLANG = Library(distribution="sglang", module="sglang", least="0.5.23", below="0.6")
_UTILS = "vllm.model_executor.layers.quantization.utils"
_QUANTIZATION = "sglang.srt.layers.quantization"
_PLATFORM = SimpleNamespace(fp8_dtype=lambda: torch.float8_e4m3fn, is_cuda_alike=lambda: False)


def _scalar_types() -> dict[str, object]:
    return vars(load("vllm.scalar_type", {}))


def _registered() -> dict[str, dict[str, object]]:
    return {"vllm.utils.torch_utils": {"direct_register_custom_op": lambda **_: None}}


def _scaled(encoded: Encoded) -> torch.Tensor:
    module = load(f"{_UTILS}.quant_utils", {
        "vllm.distributed.parallel_state": absent("get_ep_group", "get_tp_group"),
        "vllm.platforms": {"current_platform": _PLATFORM}, "vllm.scalar_type": _scalar_types()})
    encoding = ENCODINGS[encoded.scheme]
    shape = module.GroupShape(encoding.rows or encoded.shape[0], encoding.columns or encoded.num_columns)
    return module.scaled_dequantize(encoded.codes, encoded.scales, shape)


def _vllm_nvfp4(encoded: Encoded) -> torch.Tensor:
    module = load(f"{_UTILS}.nvfp4_emulation_utils", {
        "vllm.platforms": {"current_platform": _PLATFORM}, "vllm.scalar_type": _scalar_types(),
        "vllm.triton_utils": {"tl": tl, "triton": triton}, **_registered()})
    return module.dequantize_to_dtype(encoded.codes, encoded.scales, encoded.second_scale, torch.float32, 16,
                                      swizzle=False)


def _vllm_mxfp8(encoded: Encoded) -> torch.Tensor:
    return load(f"{_UTILS}.mxfp8_utils", _registered()).dequant_mxfp8_to_bf16(encoded.codes, encoded.scales)


def _sglang_fp8(encoded: Encoded) -> torch.Tensor:
    module = load(f"{_QUANTIZATION}.int8_utils", {
        "sglang.kernels.ops.gemm.int8_kernel": absent("w8a8_block_int8_matmul"),
        "sglang.kernels.ops.quantization.int8_kernel": absent("per_token_group_quant_int8")})
    return module.block_dequant(encoded.codes, encoded.scales, [128, 128])


def _sglang_nvfp4(encoded: Encoded) -> torch.Tensor:
    module = load(f"{_QUANTIZATION}.dequantization", {
        f"{_QUANTIZATION}.fp8_utils": absent("block_quant_dequant", "inverse_transform_scale_ue8m0"),
        "sglang.srt.utils": absent("set_weight_attrs")})
    return module.dequantize_nvfp4(encoded.codes, encoded.scales, encoded.second_scale, torch.float32)


def _sglang_mxfp4(encoded: Encoded) -> torch.Tensor:
    quantise = load(f"{_QUANTIZATION}.mxfp4_tensor", {}).MXFP4QuantizeUtil
    return quantise.dequantize(encoded.codes, torch.float32, encoded.scales, [32])


def _sglang_mxfp8(encoded: Encoded) -> torch.Tensor:
    return load(f"{_QUANTIZATION}.mxfp8_block_convert", {}).dequant_mxfp8_2d_to_bf16(encoded.codes, encoded.scales)


DECODERS = (
    Decoder(VLLM, "scaled_dequantize", (Scheme.FP8_TENSOR, Scheme.FP8_ROW, Scheme.FP8_BLOCK, Scheme.INT8), _scaled),
    Decoder(VLLM, "dequantize_to_dtype", (Scheme.NVFP4,), _vllm_nvfp4),
    Decoder(VLLM, "dequant_mxfp8_to_bf16", (Scheme.MXFP8,), _vllm_mxfp8, differs=NAN),
    Decoder(SGLANG, "block_dequant", (Scheme.FP8_BLOCK,), _sglang_fp8),
    Decoder(SGLANG, "dequantize_nvfp4", (Scheme.NVFP4,), _sglang_nvfp4),
    Decoder(SGLANG, "MXFP4QuantizeUtil.dequantize", (Scheme.MXFP4,), _sglang_mxfp4, differs=NAN),
    Decoder(SGLANG, "dequant_mxfp8_2d_to_bf16", (Scheme.MXFP8,), _sglang_mxfp8,
            differs=NAN | {0}))
