"""AutoGPTQ and AutoAWQ, whose files of int4 weights everybody reads: one source file of each, in plain torch."""

import torch

from moe_ref.adapters.library import Library
from moe_ref.adapters.single_file import load
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from tests.third_party.decoders.decoder import Decoder, codes_of, words

AUTO_GPTQ = Library(distribution="auto-gptq", module="auto_gptq", least="0.7.1", below="0.8",
                    hint="its wheel has a package `tests`, which hides this one: unpacked elsewhere, without that")
AUTO_AWQ = Library(distribution="autoawq", module="awq", least="0.2.9", below="0.3")
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which column of eight lies in the first, second ... four bits of a word."""


def _gptq(encoded: Encoded) -> torch.Tensor:
    """Codes along K, zero points less one along N; a product with the identity in fp32."""
    module, columns = load("auto_gptq.nn_modules.qlinear.qlinear_cuda", {}), ENCODINGS[encoded.scheme].columns
    num_rows, num_columns = encoded.shape
    layer = module.QuantLinear(4, columns, num_columns, num_rows, bias=False)
    layer.qweight = words(codes_of(encoded)).T.contiguous()
    layer.qzeros = words(torch.full((encoded.scales.shape[1], num_rows), 7))
    layer.scales = encoded.scales.T.float().contiguous()
    if encoded.groups is not None:
        layer.g_idx = encoded.groups
    return layer(torch.eye(num_columns)).T


def _awq(encoded: Encoded) -> torch.Tensor:
    """Codes and zero points along N, in AWQ's order of columns; scales handed over in fp32."""
    module, columns = load("awq.utils.packing_utils", {}), ENCODINGS[encoded.scheme].columns
    assert encoded.zeros is not None
    codes, zeros = (words(one.T.unflatten(-1, (-1, 8))[..., list(AWQ_COLUMNS)].flatten(-2))
                    for one in (codes_of(encoded), encoded.zeros))
    return module.dequantize_gemm(codes, zeros, encoded.scales.T.float(), 4, columns).T


DECODERS = (
    Decoder(AUTO_GPTQ, "QuantLinear", (Scheme.GPTQ, Scheme.GPTQ_32, Scheme.GPTQ_ORDER, Scheme.GPTQ_ORDER_32), _gptq,
            multiplies=True),
    Decoder(AUTO_AWQ, "dequantize_gemm", (Scheme.AWQ, Scheme.AWQ_32), _awq))
