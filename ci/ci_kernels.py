"""The kernels that bench_interpreter.py measures; a module of their own, since Triton reads their source."""

import triton
import triton.language as tl


@triton.jit
def empty_kernel(x, w, y):
    """Nothing: what is left is the cost of a launch."""
    tl.program_id(0)


@triton.jit
def tile_kernel(x, w, y):
    """A 16 x 64 tile of x @ w in two steps of K = 64."""
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    column = tl.arange(0, 64)
    total = tl.zeros((16, 64), tl.float32)
    for start in range(0, 128, 64):
        k = start + tl.arange(0, 64)
        total = tl.dot(tl.load(x + row[:, None] * 128 + k[None, :]), tl.load(w + k[:, None] * 64 + column[None, :]),
                       total, input_precision="ieee")
    tl.store(y + row[:, None] * 64 + column[None, :], total)
