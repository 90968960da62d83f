"""mxfp4 and mxfp8: e2m1 and e4m3 codes with a power of two as the scale of every 32 columns.

OCP Microscaling 1.0, section 6.3: the exponent of the scale is floor(log2(max |w|)) - emax, with emax the exponent of
the largest number, 2 of e2m1 and 8 of e4m3. The largest values, up to 8 and 512 scales, saturate at 6 and 448: up to 2
and 64 scales off where half a step is 1 and 16. With rounding="ceil" the scale is max |w| / 6 or / 448, rounded up to a
power of two (torchao's RCEIL): nothing saturates, an element is off by at most half a step.
"""

from typing import Literal

import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import one_of_faults, raise_faults
from moe_ref.contract.schemes import ENCODINGS, Codes
from moe_ref.contract.vocabulary import Scheme
from moe_ref.numerics.formats import power_of_two
from moe_ref.schemes.blocks import checked, e2m1, e4m3, largest, quotient

Rounding = Literal["floor", "ceil"]

_LARGEST = {Codes.E2M1: (6, 2), Codes.E4M3: (448, 8)}
"""The largest number and its exponent."""


def encode(scheme: Scheme, w_NK: torch.Tensor, *, rounding: Rounding = "floor") -> Encoded:
    """Codes uint8, two to a byte, or float8_e4m3fn, and scales uint8, the exponent plus 127, of (L, N, K).

    Exponents are clamped to -127 to 127. UsageValueError for another rounding; else raises as `checked` does.
    """
    raise_faults("mx scales", one_of_faults("rounding", rounding, Rounding))
    values_NK, encoding = checked(w_NK), ENCODINGS[scheme]
    last, last_exponent = _LARGEST[encoding.codes]
    amax = largest(values_NK, encoding)
    if rounding == "floor":
        exponent = torch.frexp(amax).exponent - 1 - last_exponent
    else:
        mantissa, exponent = torch.frexp(amax / last)
        exponent = exponent - (mantissa == 0.5).int()
    exponent = exponent.clamp(-127, 127).where(amax > 0, 0)
    values_NK = quotient(values_NK, power_of_two(exponent), encoding)
    codes = e2m1(values_NK) if encoding.codes is Codes.E2M1 else e4m3(values_NK)
    return Encoded(scheme=scheme, codes=codes, scales=(exponent + 127).to(torch.uint8), num_columns=w_NK.shape[-1])
