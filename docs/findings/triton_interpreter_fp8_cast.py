"""Triton's interpreter loses the carry of casts to fp8 and misrounds. 0: seen, 1: not seen, 2: cannot run here."""

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


@triton.jit
def cast(x_ptr, y_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    x = tl.load(x_ptr + index)
    tl.store(y_ptr + index, x.to(y_ptr.dtype.element_ty))


def main() -> int:
    print(f"triton {triton.__version__}, torch {torch.__version__}, TRITON_INTERPRET=1")
    # Every fp16 value that both formats hold as a finite one, as fp32; 63488 of them are finite.
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    lost_carries = 0
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(dtype).max
        smallest = torch.finfo(dtype).smallest_normal
        x = torch.where(every.abs() <= largest, every, 0.0)
        got = torch.empty(len(x), dtype=dtype)
        cast[(1,)](x, got, len(x))
        got, nearest = got.float(), x.to(dtype).float()
        normal, kept = x.abs() >= smallest, got == nearest
        # Round to nearest puts these on a power of two above x; without the carry they fall to the one below.
        carry = normal & ~kept & (got.abs() == nearest.abs() / 2)
        tie = normal & ~kept & ~carry
        ends = x[tie].abs() * 2 == got[tie].abs() + nearest[tie].abs()
        subnormal = ~normal & ~kept
        name = str(dtype)[6:]
        print(f"{name}: {int((~kept).sum())} of {int((every.abs() <= largest).sum())} values are not the nearest: "
              f"{int(carry.sum())} are half of it, {int(tie.sum())} other normal ones "
              f"({int(ends.sum())} of them ties), {int(subnormal.sum())} subnormal ones")
        for value in (1.984, 7.897, 126.24):
            one = torch.tensor([value])
            out = torch.empty(1, dtype=dtype)
            cast[(1,)](one, out, 1)
            print(f"{name}: {value} -> {out.float().item()}, nearest {one.to(dtype).float().item()}")
        lost_carries += int(carry.sum())
    print("SEEN" if lost_carries else "NOT SEEN")
    return 0 if lost_carries else 1


if __name__ == "__main__":
    sys.exit(main())
