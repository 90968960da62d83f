"""torchao: MX and NVFP4 tensors, fp8 with scales of any block, and its affine integers."""

import torch

from moe_ref.adapters.library import Library
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from tests.third_party.decoders.decoder import Decoder, codes_of

TORCHAO = Library(distribution="torchao", module="torchao", least="0.18", below="0.19")


def _mx(encoded: Encoded) -> torch.Tensor:
    from torchao.prototype.mx_formats.mx_tensor import to_dtype
    kind = torch.float8_e4m3fn if encoded.scheme is Scheme.MXFP8 else torch.float4_e2m1fn_x2
    return to_dtype(encoded.codes, encoded.scales.view(torch.float8_e8m0fnu), kind, 32, torch.float32)


def _nvfp4(encoded: Encoded) -> torch.Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    held = NVFP4Tensor(encoded.codes, encoded.scales, 16, torch.float32, encoded.second_scale)
    return held.dequantize(torch.float32)


def _float8(encoded: Encoded) -> torch.Tensor:
    from torchao.quantization.quant_primitives import _dequantize_affine_float8
    return _dequantize_affine_float8(encoded.codes, encoded.scales, torch.float32)


def _affine(encoded: Encoded) -> torch.Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine
    columns = ENCODINGS[encoded.scheme].columns or encoded.num_columns
    if encoded.scheme is Scheme.INT8:
        return dequantize_affine(encoded.codes, (1, columns), encoded.scales, None, torch.int8)
    zeros = torch.full_like(encoded.scales, 8, dtype=torch.int32) if encoded.zeros is None else encoded.zeros.int()
    return dequantize_affine(codes_of(encoded), (1, columns), encoded.scales, zeros, torch.uint8, 0, 15)


DECODERS = (
    Decoder(TORCHAO, "mx_tensor.to_dtype", (Scheme.MXFP4, Scheme.MXFP8), _mx),
    Decoder(TORCHAO, "NVFP4Tensor", (Scheme.NVFP4,), _nvfp4),
    Decoder(TORCHAO, "_dequantize_affine_float8", (Scheme.FP8_TENSOR, Scheme.FP8_ROW, Scheme.FP8_BLOCK), _float8),
    Decoder(TORCHAO, "dequantize_affine", (Scheme.INT8, Scheme.GPTQ, Scheme.GPTQ_32, Scheme.AWQ, Scheme.AWQ_32),
            _affine))
