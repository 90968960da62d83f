"""Triton's interpreter truncates fp32 to bf16 instead of rounding. 0: seen, 1: not seen, 2: cannot run here."""

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

COUNT = 1 << 16


@triton.jit
def store(x_ptr, y_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(y_ptr + index, tl.load(x_ptr + index))


@triton.jit
def cast(x_ptr, y_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(y_ptr + index, tl.load(x_ptr + index).to(tl.bfloat16, fp_downcast_rounding="rtne"))


def main() -> int:
    print(f"triton {triton.__version__}, torch {torch.__version__}, TRITON_INTERPRET=1")
    torch.manual_seed(0)
    x = torch.randn(COUNT)
    nearest = x.to(torch.bfloat16)
    truncated = (x.view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
    seen = []
    for name, kernel in (("tl.store to a bf16 pointer", store), ('.to(bf16, fp_downcast_rounding="rtne")', cast)):
        got = torch.empty(COUNT, dtype=torch.bfloat16)
        kernel[(1,)](x, got, COUNT)
        ulp = torch.exp2(torch.floor(torch.log2(x.abs())) - 7)
        bias = ((got.float() - x) * x.sign() / ulp).mean()
        print(f"{name}: {int((got == nearest).sum())} of {COUNT} are the nearest bf16, "
              f"{int((got == truncated).sum())} the truncated one; mean error {bias:+.3f} units")
        seen.append(not torch.equal(got, nearest) and torch.equal(got, truncated))
    bias = ((nearest.float() - x) * x.sign() / ulp).mean()
    print(f"torch's cast: all are the nearest; mean error {bias:+.3f} units")
    print("SEEN" if any(seen) else "NOT SEEN")
    return 0 if any(seen) else 1


if __name__ == "__main__":
    sys.exit(main())
