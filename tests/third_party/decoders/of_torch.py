"""torch: its scaled product on a CPU, with the identity; a value is a sum of one term. Its grouped product, and blocks,
have no kernel for a CPU (torch 2.13)."""

import torch

from moe_ref.adapters.library import Library
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.vocabulary import Scheme
from tests.third_party.decoders.decoder import Decoder

TORCH = Library(distribution="torch", module="torch", least="2.11", below="3")


def _scaled_mm(encoded: Encoded) -> torch.Tensor:
    identity = torch.eye(encoded.num_columns).to(torch.float8_e4m3fn)
    if encoded.scheme is Scheme.FP8_TENSOR:
        scales = torch.ones(()), encoded.scales.reshape(())
    else:
        scales = torch.ones(encoded.num_columns, 1), encoded.scales.T.contiguous()
    return torch._scaled_mm(identity, encoded.codes.T, *scales, out_dtype=torch.float32).T


DECODERS = (Decoder(TORCH, "_scaled_mm", (Scheme.FP8_TENSOR, Scheme.FP8_ROW), _scaled_mm, multiplies=True),)
