"""Triton's interpreter computes with the bit patterns of bf16. 0: seen, 1: not seen, 2: cannot run here."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
try:
    import numpy as np
    import torch
    import triton
    import triton.language as tl
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

SIZE = 16


@triton.jit
def compute(a_ptr, b_ptr, out_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + index), tl.load(b_ptr + index)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "multiply":
        result = a * b
    elif OPERATION == "less":
        result = tl.where(a < b, 1.0, 0.0)
    elif OPERATION == "sum":
        result = tl.sum(a, 1)[:, None] + tl.zeros((SIZE, SIZE), tl.float32)
    else:
        result = tl.dot(a, b)
    tl.store(out_ptr + index, result)


REFERENCE = {"add": torch.add, "multiply": torch.mul, "less": lambda a, b: (a < b).double(),
             "sum": lambda a, b: a.sum(1, keepdim=True).expand(SIZE, SIZE), "dot": torch.matmul}


def main() -> int:
    print(f"triton {triton.__version__}, torch {torch.__version__}, numpy {np.__version__}, TRITON_INTERPRET=1")
    torch.manual_seed(0)
    # Small integers: exact in both formats, and so is every result.
    whole = [torch.randint(-2, 3, (SIZE, SIZE)) for _ in range(2)]
    seen, control = [], []
    with np.errstate(over="ignore"):
        for name, reference in REFERENCE.items():
            want = reference(*(tensor.double() for tensor in whole))
            said = []
            for dtype in (torch.float16, torch.bfloat16):
                wide = name in ("less", "sum", "dot")
                out = torch.empty(SIZE, SIZE, dtype=torch.float32 if wide else dtype)
                compute[(1,)](*(tensor.to(dtype) for tensor in whole), out, name, SIZE)
                error = (out.double() - want).abs()
                error = torch.where(error.isnan(), torch.inf, error)
                said.append(f"{str(dtype)[6:]} {int((error > 0).sum())} of {error.numel()} wrong by up to "
                            f"{error.max():.2g}")
                (seen if dtype == torch.bfloat16 else control).append(bool(error.max() > 0))
            print(f"{name:8s} largest result {want.abs().max():.0f}: {'; '.join(said)}")
    if any(control):
        raise RuntimeError("fp16 is wrong too: this script does not measure what it says")
    print("SEEN" if any(seen) else "NOT SEEN")
    return 0 if any(seen) else 1


if __name__ == "__main__":
    sys.exit(main())
