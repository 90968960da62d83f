"""Kernels with something wrong, for the cross-compile gate to find. The interpreter runs all of them."""

import triton
import triton.language as tl


@triton.jit
def one_branch_kernel(x, y, size, BLOCK: tl.constexpr):
    """A variable defined in one branch alone, which only the compiler refuses."""
    at = tl.arange(0, BLOCK)
    if size > 2:
        value = tl.load(x + at)
    tl.store(y + at, value)


@triton.jit
def product_kernel(x, y, SIZE: tl.constexpr, COPIES: tl.constexpr, UPCAST: tl.constexpr):
    """y = the sum of COPIES products of x with itself, COPIES accumulators at a time."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for copy in tl.static_range(COPIES):
        tile = tl.load(x + copy * SIZE * SIZE + at)
        if UPCAST:
            tile = tile.to(tl.float32)
        total = tl.dot(tile, tile, total, input_precision="ieee")
    tl.store(y + at, total)
