"""Triton's interpreter misreads bf16 subnormals and fp8 NaN, infinity. 0: seen, 1: not seen, 2: cannot run here."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
try:
    import torch
    import triton
    import triton.language as tl
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

FORMATS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def upcast(x_ptr, y_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(y_ptr + index, tl.load(x_ptr + index).to(tl.float32))


def patterns(dtype):
    """Every bit pattern of a format."""
    bits = 8 * dtype.itemsize
    codes = torch.arange(1 << bits, dtype=torch.int32)
    return codes.to(torch.int16 if bits == 16 else torch.uint8).view(dtype)


def main() -> int:
    print(f"triton {triton.__version__}, torch {torch.__version__}, TRITON_INTERPRET=1, every bit pattern")
    wrong_patterns = 0
    for dtype in FORMATS:
        x = patterns(dtype)
        got = torch.empty(len(x))
        upcast[(1,)](x, got, len(x))
        want = x.float()  # exact: fp32 holds every value of these formats
        wrong = ~((got == want) | (got.isnan() & want.isnan()))
        kinds = {"NaN": want.isnan(), "infinite": want.isinf(),
                 "subnormal": (want != 0) & (want.abs() < torch.finfo(dtype).smallest_normal)}
        said = ", ".join(f"{int((wrong & kind).sum())} of {int(kind.sum())} {name}" for name, kind in kinds.items())
        rest = int((wrong & ~torch.stack(list(kinds.values())).any(0)).sum())
        print(f"{str(dtype)[6:]}: {int(wrong.sum())} of {len(x)} wrong: {said}, {rest} others")
        if wrong.any():
            first = int(wrong.nonzero()[0])
            print(f"{str(dtype)[6:]}: pattern {first:#x} is {want[first].item():.6g}, read as {got[first].item():.6g}")
        wrong_patterns += int(wrong.sum())
    print("SEEN" if wrong_patterns else "NOT SEEN")
    return 0 if wrong_patterns else 1


if __name__ == "__main__":
    sys.exit(main())
