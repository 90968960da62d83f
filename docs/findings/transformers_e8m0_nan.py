"""transformers: is the NaN of e8m0, scale 255, read as 2^128? 0: seen, 1: not seen, 2: cannot run here."""

import sys

try:
    import torch
    import transformers
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

BLOCK = 32


def mxfp4(scale):
    """A row of two blocks, all 16 codes twice in each, the second under that scale; its numbers, fp32."""
    codes = torch.arange(BLOCK) % 16
    packed = (codes[0::2] | codes[1::2] << 4).to(torch.uint8).expand(1, 1, 2, BLOCK // 2).contiguous()
    scales = torch.tensor([[[127, scale]]], dtype=torch.uint8)
    by_name = {"convert_moe_packed_tensors": convert_moe_packed_tensors(packed, scales, dtype=torch.float32).flatten()}
    rows = packed.view(torch.int8).flatten(2)[0]
    by_name["Fp8Dequantize, mxfp4"] = Fp8Dequantize(None)._dequantize_one(rows, scales[0], torch.float32).flatten()
    return by_name


def mxfp8(scale):
    """The same with e4m3 codes 0 to 31."""
    codes = torch.arange(BLOCK, dtype=torch.uint8).repeat(2)[None].view(torch.float8_e4m3fn)
    scales = torch.tensor([[127, scale]], dtype=torch.uint8)
    return {"Fp8Dequantize, mxfp8": Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32).flatten()}


def main() -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"torch's float8_e8m0fnu: 255 is {torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu).item()}")
    seen = []
    for scale in (252, 255):
        for name, numbers in (mxfp4(scale) | mxfp8(scale)).items():
            block = numbers[BLOCK:]
            nan, infinite = int(block.isnan().sum()), int(block.isinf().sum())
            print(f"scale {scale}, {name}: {nan} of {BLOCK} NaN, {infinite} infinite")
            seen.append(scale == 255 and nan < BLOCK)
    print("SEEN" if any(seen) else "NOT SEEN")
    return 0 if any(seen) else 1


if __name__ == "__main__":
    sys.exit(main())
