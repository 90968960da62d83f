"""transformers: gpt-oss's mxfp4, and what its fp8 quantiser reads when a checkpoint is dequantised."""

import torch

from moe_ref.adapters.library import Library
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.vocabulary import Scheme
from tests.third_party.decoders.decoder import NAN, Decoder

TRANSFORMERS = Library(distribution="transformers", module="transformers", least="5.23", below="5.24")


def _moe_packed(encoded: Encoded) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    blocks = encoded.codes.unflatten(-1, (-1, 16))[None]
    return convert_moe_packed_tensors(blocks, encoded.scales[None], dtype=torch.float32)[0].T


def _fp8_dequantize(encoded: Encoded) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    codes = encoded.codes.view(torch.int8) if encoded.scheme is Scheme.MXFP4 else encoded.codes
    return Fp8Dequantize(None)._dequantize_one(codes, encoded.scales, torch.float32)


def _fp8_weight(encoded: Encoded) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
    return _dequantize_fp8_weight(encoded.codes, encoded.scales, [128, 128], torch.float32)


DECODERS = (
    Decoder(TRANSFORMERS, "convert_moe_packed_tensors", (Scheme.MXFP4,), _moe_packed, differs=NAN),
    Decoder(TRANSFORMERS, "Fp8Dequantize", (Scheme.FP8_TENSOR, Scheme.FP8_ROW, Scheme.FP8_BLOCK), _fp8_dequantize),
    Decoder(TRANSFORMERS, "Fp8Dequantize", (Scheme.MXFP8, Scheme.MXFP4), _fp8_dequantize, differs=NAN),
    Decoder(TRANSFORMERS, "_dequantize_fp8_weight", (Scheme.FP8_BLOCK,), _fp8_weight))
