"""compressed-tensors: `decompress` of every format that has a scheme here, from the state dict of a checkpoint."""

from typing import Any

import torch

from moe_ref.adapters.library import Library
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from tests.third_party.decoders.decoder import NAN, Decoder, codes_of, words

COMPRESSED = Library(distribution="compressed-tensors", module="compressed_tensors", least="0.20", below="0.21",
                     hint="with loguru and psutil")
STRATEGIES: dict[Scheme, dict[str, Any]] = {
    Scheme.FP8_TENSOR: {"strategy": "tensor"}, Scheme.FP8_ROW: {"strategy": "channel"},
    Scheme.FP8_BLOCK: {"strategy": "block", "block_structure": [128, 128]}, Scheme.INT8: {"strategy": "channel"}}


def _decompressed(compressor: str, state: dict[str, torch.Tensor], **arguments: Any) -> torch.Tensor:
    from compressed_tensors import compressors
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    return getattr(compressors, compressor).decompress(state, scheme)["weight"]


def _naive(encoded: Encoded) -> torch.Tensor:
    kind = {"num_bits": 8, "type": "int" if encoded.scheme is Scheme.INT8 else "float", **STRATEGIES[encoded.scheme]}
    scales = encoded.scales.reshape(1) if encoded.scheme is Scheme.FP8_TENSOR else encoded.scales
    return _decompressed("NaiveQuantizationCompressor", {"weight": encoded.codes, "weight_scale": scales}, **kind)


def _packed(encoded: Encoded) -> torch.Tensor:
    state = {"weight_packed": words(codes_of(encoded)), "weight_scale": encoded.scales,
             "weight_shape": torch.tensor(encoded.shape)}
    if encoded.zeros is not None:
        state["weight_zero_point"] = words(encoded.zeros.T).T.contiguous()
    return _decompressed("PackedQuantizationCompressor", state, num_bits=4, type="int", strategy="group",
                         group_size=ENCODINGS[encoded.scheme].columns, symmetric=encoded.zeros is None)


def _nvfp4(encoded: Encoded) -> torch.Tensor:
    assert encoded.second_scale is not None
    state = {"weight_packed": encoded.codes, "weight_scale": encoded.scales,
             "weight_global_scale": 1 / encoded.second_scale.reshape(1)}
    return _decompressed("NVFP4PackedCompressor", state, num_bits=4, type="float", strategy="tensor_group",
                         group_size=16)


def _mxfp4(encoded: Encoded) -> torch.Tensor:
    state = {"weight_packed": encoded.codes, "weight_scale": encoded.scales}
    return _decompressed("MXFP4PackedCompressor", state, num_bits=4, type="float", strategy="group", group_size=32)


def _mxfp8(encoded: Encoded) -> torch.Tensor:
    state = {"weight": encoded.codes, "weight_scale": encoded.scales}
    return _decompressed("MXFP8QuantizationCompressor", state, num_bits=8, type="float", strategy="group",
                         group_size=32)


DECODERS = (
    Decoder(COMPRESSED, "float-quantized, int-quantized", tuple(STRATEGIES), _naive),
    Decoder(COMPRESSED, "pack-quantized", (Scheme.GPTQ, Scheme.GPTQ_32, Scheme.AWQ, Scheme.AWQ_32), _packed),
    Decoder(COMPRESSED, "nvfp4-pack-quantized", (Scheme.NVFP4,), _nvfp4, exact_second=False),
    Decoder(COMPRESSED, "mxfp4-pack-quantized", (Scheme.MXFP4,), _mxfp4, differs=NAN),
    Decoder(COMPRESSED, "mxfp8-quantized", (Scheme.MXFP8,), _mxfp8, differs=NAN))
