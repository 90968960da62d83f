"""8-bit floats (e4m3, OCP FP8) by their bits, for architectures where Triton has no such type: sm_80 and gfx942.

One way for all of them makes codes the same everywhere, and lets a CPU check every one.
"""

import triton
import triton.language as tl


@triton.jit
def e4m3_of(value):
    """Code (uint8) of fp32: to nearest, ties to even; what is beyond 448 becomes 448, and NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    is_number = value == value
    size = tl.where(is_number, tl.minimum(tl.abs(value), 448.0), 0.0)
    # Below 2^-6 codes are multiples of 2^-9, the last place of 2^14: this addition rounds to one.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    wide = size.to(tl.int32, bitcast=True)
    normal = ((wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0.015625, small, normal)
    return (tl.where(is_number, code, 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_as_half(code):
    """The numbers that codes (uint8) stand for, in fp16, which holds all of them."""
    wide = code.to(tl.int16)
    magnitude = wide & 0x7F
    bits = ((wide & 0x80) << 8) | (magnitude << 7)
    # Exponents of both differ by 8. Times 2^8 subnormal ones come out right too.
    return tl.where(magnitude == 0x7F, float("nan"), bits.to(tl.float16, bitcast=True) * 256.0).to(tl.float16)


@triton.jit
def operand(tile):
    """A tile of codes as a product takes it: as it is where the architecture multiplies them, else in fp16."""
    if tile.dtype == tl.uint8:
        return e4m3_as_half(tile)
    else:
        return tile


@triton.jit
def scale_in_single(scale):
    """A weight's scale in fp32; of e8m0 (uint8) the power of two by its exponent plus 127, 255 being NaN."""
    if scale.dtype == tl.uint8:
        wide = scale.to(tl.int32)
        bits = tl.where(wide == 0, 0x00400000, wide << 23)
        return tl.where(wide == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        return scale
