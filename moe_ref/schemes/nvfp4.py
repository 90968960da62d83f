"""nvfp4: e2m1 codes with an e4m3 scale of every 16 columns and one fp32 scale of the matrix.

second = max |w| of the matrix / (6 * 448), rounded to fp32; scale = max |w| of the block / 6 / second, rounded to e4m3,
at least its smallest number, 2^-9 (NVIDIA's description of NVFP4; torchao keeps to the smallest normal one, 2^-6).
Rounding the scale may leave the largest value beyond 6 scales; an element is off by at most half a step or that.
"""

import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from moe_ref.schemes.blocks import checked, e2m1, e4m3, largest, quotient


def encode(scheme: Scheme, w_NK: torch.Tensor) -> Encoded:
    """Codes uint8, two to a byte, scales float8_e4m3fn, second_scale fp32 (L) of (L, N, K).

    A matrix whose second scale is no normal fp32 number, below 2^-126, has 1, and codes of zero. Raises as `checked`
    does.
    """
    values_NK, encoding = checked(w_NK), ENCODINGS[scheme]
    amax = largest(values_NK, encoding)
    second = (amax.amax((-2, -1)) / (6 * 448)).float()
    second = second.where(second >= torch.finfo(torch.float32).smallest_normal, 1.0)
    by_block = second.double()[..., None, None]
    scales = e4m3((amax / 6 / by_block).float().clamp(min=2.0**-9).where(amax > 0, 1.0))
    codes = e2m1(quotient(values_NK, scales.double() * by_block, encoding))
    return Encoded(scheme=scheme, codes=codes, scales=scales, second_scale=second, num_columns=values_NK.shape[-1])
