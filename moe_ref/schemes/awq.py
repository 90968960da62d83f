"""Asymmetric int4 codes with a zero point of 0 to 15 and a 16-bit scale of every group of columns.

scale = (max - min) / 15 and zero = round(-min / scale), where max and min are of the group and 0: so 0 is a code, as
AWQ (arXiv 2306.00978) has it. Its search for factors of the input channels comes before and is not done here. An
element is off by at most half a scale, and by what rounding the scale to 16 bits leaves beyond the last code.
"""

import torch

from moe_ref.contract.encoded import Encoded, packed
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from moe_ref.schemes.blocks import checked, in_blocks, quotient, spread
from moe_ref.schemes.half_scales import half_scales


def encode(scheme: Scheme, w_NK: torch.Tensor, *, scale_dtype: torch.dtype = torch.float16) -> Encoded:
    """Codes uint8, two to a byte, scales fp16 or bf16 and zeros uint8 of (L, N, K).

    Raises as `checked` and `half_scales` do.
    """
    values_NK, encoding = checked(w_NK), ENCODINGS[scheme]
    # What blocks are filled up with is 0, which belongs to the range.
    blocks = in_blocks(values_NK, encoding)
    low, high = blocks.amin((-3, -1)).clamp(max=0), blocks.amax((-3, -1)).clamp(min=0)
    scales = half_scales((high - low) / 15, scale_dtype)
    zeros = torch.round((-low / scales.double()).float()).clamp(0, 15)
    steps = torch.round(quotient(values_NK, scales, encoding))
    codes = (steps + spread(zeros, values_NK, encoding)).clamp(0, 15)
    return Encoded(scheme=scheme, codes=packed(codes), scales=scales, zeros=zeros.to(torch.uint8),
                   num_columns=values_NK.shape[-1])
