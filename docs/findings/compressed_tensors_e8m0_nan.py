"""compressed-tensors: is the NaN of e8m0, scale 255, read as 2^128? 0: seen, 1: not seen, 2: cannot run here."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    import torch

    VERSION = version("compressed-tensors")
    COMPRESSORS = importlib.import_module("compressed_tensors.compressors")
    QUANTIZATION = importlib.import_module("compressed_tensors.quantization")
except (ImportError, PackageNotFoundError) as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

BLOCK = 32


def decompressed(name, num_bits, state):
    """What `decompress` makes of the state dict of a checkpoint."""
    arguments = QUANTIZATION.QuantizationArgs(num_bits=num_bits, type="float", strategy="group", group_size=BLOCK)
    scheme = QUANTIZATION.QuantizationScheme(targets=["Linear"], weights=arguments)
    return getattr(COMPRESSORS, name).decompress(state, scheme)["weight"].float().flatten()


def mxfp4(scale):
    """A row of two blocks, all 16 codes twice in each, the second under that scale."""
    codes = (torch.arange(2 * BLOCK) % 16).to(torch.uint8)
    state = {"weight_packed": (codes[0::2] | codes[1::2] << 4)[None],
             "weight_scale": torch.tensor([[127, scale]], dtype=torch.uint8)}
    return decompressed("MXFP4PackedCompressor", 4, state)


def mxfp8(scale):
    """The same with e4m3 codes 0 to 31."""
    codes = torch.arange(BLOCK, dtype=torch.uint8).repeat(2)[None].view(torch.float8_e4m3fn)
    state = {"weight": codes, "weight_scale": torch.tensor([[127, scale]], dtype=torch.uint8)}
    return decompressed("MXFP8QuantizationCompressor", 8, state)


def main() -> int:
    print(f"compressed-tensors {VERSION}, torch {torch.__version__}")
    print(f"torch's float8_e8m0fnu: 255 is {torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu).item()}")
    seen = []
    for scale in (252, 255):
        for name, function in (("mxfp4", mxfp4), ("mxfp8", mxfp8)):
            block = function(scale)[BLOCK:]
            nan, infinite = int(block.isnan().sum()), int(block.isinf().sum())
            print(f"scale {scale}, {name}: {nan} of {BLOCK} NaN, {infinite} infinite")
            seen.append(scale == 255 and nan < BLOCK)
    print("SEEN" if any(seen) else "NOT SEEN")
    return 0 if any(seen) else 1


if __name__ == "__main__":
    sys.exit(main())
