"""Triton's interpreter takes input_precision="tf32" and computes in fp32. 0: seen, 1: not seen, 2: cannot run here."""

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

SIZE, INNER = 32, 64


@triton.jit
def product(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, SIZE: tl.constexpr, INNER: tl.constexpr):
    row, inner = tl.arange(0, SIZE), tl.arange(0, INNER)
    a = tl.load(a_ptr + row[:, None] * INNER + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * SIZE + row[None, :])
    tl.store(out_ptr + row[:, None] * SIZE + row[None, :], tl.dot(a, b, input_precision=PRECISION))


def tf32(x, nearest):
    """fp32 with 10 mantissa bits, truncated or to nearest (ties away)."""
    return ((x.view(torch.int32) + (0x1000 if nearest else 0)) & ~0x1FFF).view(torch.float32)


def main() -> int:
    print(f"triton {triton.__version__}, torch {torch.__version__}, TRITON_INTERPRET=1")
    torch.manual_seed(0)
    a, b = torch.randn(SIZE, INNER), torch.randn(INNER, SIZE)
    got = {}
    for precision in ("ieee", "tf32"):
        got[precision] = torch.empty(SIZE, SIZE)
        product[(1,)](a, b, got[precision], precision, SIZE, INNER)
    want = {"fp32 operands": a.double() @ b.double()}
    for name, nearest in (("operands truncated to tf32", False), ("operands rounded to tf32", True)):
        want[name] = tf32(a, nearest).double() @ tf32(b, nearest).double()
    exact = want["fp32 operands"]
    errors = {name: float((got["tf32"] - other).norm() / exact.norm()) for name, other in want.items()}
    for name, error in errors.items():
        print(f'input_precision="tf32" against fp64 of {name}: {error:.1e}')
    equal = torch.equal(got["ieee"], got["tf32"])
    print(f'same bits as input_precision="ieee": {equal}')
    seen = equal and min(errors, key=errors.get) == "fp32 operands"
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
