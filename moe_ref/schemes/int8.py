"""int8 codes with one fp32 scale of each row, symmetric: code -128 is never given.

scale = max |w| / 127 (Dettmers et al., arXiv 2208.07339, section 2.1), rounded to fp32; an element is off by at most
half a scale.
"""

import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from moe_ref.schemes.blocks import checked, largest, quotient


def encode(scheme: Scheme, w_NK: torch.Tensor) -> Encoded:
    """Codes int8 and scales fp32 of (L, N, K); raises as `checked` does.

    A row whose scale is no normal fp32 number, below 2^-126, has scale 1 and codes of zero.
    """
    values_NK, encoding = checked(w_NK), ENCODINGS[scheme]
    scales = (largest(values_NK, encoding) / 127).float()
    scales = scales.where(scales >= torch.finfo(torch.float32).smallest_normal, 1.0)
    codes = torch.round(quotient(values_NK, scales, encoding)).clamp(-127, 127).to(torch.int8)
    return Encoded(scheme=scheme, codes=codes, scales=scales, num_columns=values_NK.shape[-1])
