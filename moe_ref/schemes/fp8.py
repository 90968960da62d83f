"""e4m3 codes with scales in fp32: one of the matrix, one of each row, one of each block of 128 x 128.

scale = max |w| / 448 (DeepSeek-V3, arXiv 2412.19437, section 3.3), rounded to fp32, so that no code is beyond the last
but by that rounding: an element is off by at most half a step, 2^-4 of itself or 2^-10 scales, whichever is larger.
"""

import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from moe_ref.schemes.blocks import checked, e4m3, largest, quotient


def encode(scheme: Scheme, w_NK: torch.Tensor) -> Encoded:
    """Codes float8_e4m3fn and scales fp32 of (L, N, K); raises as `checked` does.

    A block whose scale is no normal fp32 number, below 2^-126, has scale 1 and codes of zero.
    """
    values_NK, encoding = checked(w_NK), ENCODINGS[scheme]
    scales = (largest(values_NK, encoding) / 448).float()
    scales = scales.where(scales >= torch.finfo(torch.float32).smallest_normal, 1.0)
    codes = e4m3(quotient(values_NK, scales, encoding))
    return Encoded(scheme=scheme, codes=codes, scales=scales, num_columns=values_NK.shape[-1])
