"""The interpreter shim's numerics: casts, arithmetic, reductions and dots, each through a real kernel.

Casts are compared with torch bit for bit; NaN is compared as NaN, since its payload is free. Inputs are fixed
arrays or exact small integers, so nothing here depends on a seed.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as upstream

from moe_fast.interpreter import interpret
from moe_fast.interpreter.selftest import check_numerics

FP8 = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5,
       torch.float8_e4m3fnuz: tl.float8e4b8, torch.float8_e5m2fnuz: tl.float8e5b16}


@triton.jit
def copy_kernel(x_N, y_N, N, BLOCK: tl.constexpr):
    """y = x in y's dtype: the cast is the implicit one of tl.store."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_N + offsets, tl.load(x_N + offsets, mask=offsets < N), mask=offsets < N)


@triton.jit
def cast_kernel(x_N, y_N, N, BLOCK: tl.constexpr, DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """y = x with an explicit cast."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_N + offsets, mask=offsets < N)
    tl.store(y_N + offsets, x.to(DTYPE, fp_downcast_rounding=ROUNDING), mask=offsets < N)


@triton.jit
def dot_kernel(a_MK, b_KN, c_MN, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """c = a @ b of one square tile."""
    rows = tl.arange(0, SIZE)
    tile = rows[:, None] * SIZE + rows[None, :]
    tl.store(c_MN + tile, tl.dot(tl.load(a_MK + tile), tl.load(b_KN + tile), input_precision=PRECISION))


@triton.jit
def arithmetic_kernel(x_N, y_N, out_XN, N: tl.constexpr):
    """Row by row: x + y, x * y, x - y, fma(x, y, x), max, min, where(x < y, x, y)."""
    n = tl.arange(0, N)
    x, y = tl.load(x_N + n), tl.load(y_N + n)
    tl.store(out_XN + n, x + y)
    tl.store(out_XN + N + n, x * y)
    tl.store(out_XN + 2 * N + n, x - y)
    tl.store(out_XN + 3 * N + n, tl.fma(x, y, x))
    tl.store(out_XN + 4 * N + n, tl.maximum(x, y))
    tl.store(out_XN + 5 * N + n, tl.minimum(x, y))
    tl.store(out_XN + 6 * N + n, tl.where(x < y, x, y))


@triton.jit
def reduce_kernel(x_MN, out_3M, M: tl.constexpr, N: tl.constexpr):
    """Per row: sum, maximum, minimum."""
    m = tl.arange(0, M)
    x = tl.load(x_MN + m[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out_3M + m, tl.sum(x, 1))
    tl.store(out_3M + M + m, x.max(1))
    tl.store(out_3M + 2 * M + m, tl.min(x, 1))


@triton.jit
def atomic_kernel(total_1, x_N, BLOCK: tl.constexpr):
    """total += x, all lanes on one address."""
    tl.atomic_add(total_1 + tl.zeros((BLOCK,), tl.int32), tl.load(x_N + tl.arange(0, BLOCK)))


@triton.jit
def scale_kernel(x_N, y_N, factor, BLOCK: tl.constexpr):
    """y = x * factor, where factor is a launch argument."""
    offsets = tl.arange(0, BLOCK)
    tl.store(y_N + offsets, tl.load(x_N + offsets) * factor)


def run_copy(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    interpret(copy_kernel, (triton.cdiv(x.numel(), 4096),),
              {"x_N": x, "y_N": y, "N": x.numel(), "BLOCK": 4096})
    return y


def run_cast(x: torch.Tensor, dtype: torch.dtype, tl_dtype: tl.dtype, rounding: str | None) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    interpret(cast_kernel, (triton.cdiv(x.numel(), 4096),),
              {"x_N": x, "y_N": y, "N": x.numel(), "BLOCK": 4096, "DTYPE": tl_dtype, "ROUNDING": rounding})
    return y


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Bit for bit, any NaN equal to any NaN."""
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    nan = wanted.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    assert torch.equal(got.view(integers)[~nan], wanted.view(integers)[~nan])


def all_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def around_bf16_ties() -> torch.Tensor:
    """fp32 values with a fraction of zero, below, at and above the bf16 tie, for every 7th bf16 pattern."""
    high = torch.arange(0, 65536, 7, dtype=torch.int64)[:, None] * 65536
    bits = (high + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001])).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def small_integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Integers from -4 to 4: products and sums of a few hundred of them are exact in fp32."""
    count = int(np.prod(shape))
    return ((torch.arange(count) * 5) % 9 - 4).reshape(shape).to(dtype)


class TestCasts:
    def test_implicit_cast_of_a_store_rounds_to_nearest_even(self) -> None:
        """Upstream truncates here; half of all elements of a bf16 output would be off by one."""
        x = around_bf16_ties()
        assert_same(run_copy(x, torch.bfloat16), x.to(torch.bfloat16))

    def test_explicit_cast_to_bf16(self) -> None:
        x = around_bf16_ties()
        assert_same(run_cast(x, torch.bfloat16, tl.bfloat16, None), x.to(torch.bfloat16))

    def test_fp16_to_bf16(self) -> None:
        """All 65536 fp16 patterns: subnormals of fp16 are normal in bf16."""
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
        assert_same(run_copy(x, torch.bfloat16), x.to(torch.bfloat16))

    def test_fp64_to_bf16_rounds_once(self) -> None:
        """1 + 2**-8 + 2**-40 is above a tie; fp32 in between would put it on the tie and round it down."""
        x = torch.tensor([1 + 2**-8 + 2**-40, 1 + 2**-8, -1 - 2**-8 - 2**-40], dtype=torch.float64)
        wanted = torch.tensor([1 + 2**-7, 1.0, -1 - 2**-7], dtype=torch.bfloat16)
        assert_same(run_copy(x, torch.bfloat16), wanted)

    def test_rtz_truncates_when_asked(self) -> None:
        """Rounding toward zero drops the lower half of fp32; an overflow stays finite."""
        x = around_bf16_ties()
        finite = x[x.isfinite()]
        wanted = (finite.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        assert_same(run_cast(finite, torch.bfloat16, tl.bfloat16, "rtz"), wanted)

    def test_every_bf16_pattern_widens_exactly(self) -> None:
        """Upstream misreads subnormals."""
        assert_same(run_copy(all_bf16(), torch.float32), all_bf16().float())

    @pytest.mark.parametrize("dtype", FP8, ids=str)
    def test_every_fp8_code_widens_exactly(self, dtype: torch.dtype) -> None:
        """NaN and infinity included; e4m3fn has no infinity, the fnuz formats have one NaN and no -0."""
        x = torch.arange(256, dtype=torch.uint8).view(dtype)
        assert_same(run_cast(x, torch.float32, tl.float32, None), x.float())

    @pytest.mark.parametrize("dtype", FP8, ids=str)
    def test_fp32_to_fp8(self, dtype: torch.dtype) -> None:
        """Every fp16 value: ties, carries, subnormals; beyond the range the largest finite value."""
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
        limit = torch.finfo(dtype).max
        assert_same(run_cast(x, dtype, FP8[dtype], None), x.clamp(-limit, limit).to(dtype))

    def test_fp8_mantissa_carry(self) -> None:
        """1.984 is nearest to 2.0 in e4m3 and e5m2; upstream drops the carry and stores 1.0."""
        x = torch.tensor([1.984, -1.984, 1e9, float("inf")])
        assert run_cast(x, torch.float8_e4m3fn, tl.float8e4nv, None).tolist() == [2.0, -2.0, 448.0, 448.0]
        assert run_cast(x, torch.float8_e5m2, tl.float8e5, None).tolist() == [2.0, -2.0, 57344.0, 57344.0]


class TestArithmetic:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_elementwise(self, dtype: torch.dtype) -> None:
        """bf16 operands are values, not uint16; each result is the fp64 result rounded once."""
        n = 128
        x = (torch.arange(n) * 37 % 101 - 50).div(8).to(dtype)
        y = (torch.arange(n) * 53 % 97 - 48).div(16).to(dtype)
        out = torch.empty(7, n, dtype=dtype)
        interpret(arithmetic_kernel, (1,), {"x_N": x, "y_N": y, "out_XN": out, "N": n})
        a, b = x.double(), y.double()
        wanted = torch.stack([a + b, a * b, a - b, a * b + a, torch.maximum(a, b), torch.minimum(a, b),
                              torch.where(a < b, a, b)]).to(dtype)
        assert_same(out, wanted)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_reductions(self, dtype: torch.dtype) -> None:
        """Sums of small integers are exact, so only a wrong representation can differ."""
        x = small_integers(16, 32, dtype=dtype)
        out = torch.empty(3, 16, dtype=dtype)
        interpret(reduce_kernel, (1,), {"x_MN": x, "out_3M": out, "M": 16, "N": 32})
        assert_same(out, torch.stack([x.double().sum(1), x.double().amax(1), x.double().amin(1)]).to(dtype))

    def test_bf16_atomic_add_rounds_after_every_lane(self) -> None:
        """256 + 1 is a tie that rounds back to 256 in bf16, so seven ones are lost one by one."""
        x = torch.tensor([256.0, *[1.0] * 7], dtype=torch.bfloat16)
        total = torch.zeros(1, dtype=torch.bfloat16)
        interpret(atomic_kernel, (1,), {"total_1": total, "x_N": x, "BLOCK": 8})
        assert total.item() == 256.0

    def test_fp32_atomic_add_counts_duplicates(self) -> None:
        total = torch.zeros(1)
        interpret(atomic_kernel, (3,), {"total_1": total, "x_N": torch.ones(8), "BLOCK": 8})
        assert total.item() == 24.0

    def test_float_argument_is_fp32(self) -> None:
        """A compiled kernel computes bf16 * an argument 0.1 in fp32; upstream rounds 0.1 to bf16."""
        x = torch.arange(1, 17).to(torch.bfloat16)
        y = torch.empty(16)
        interpret(scale_kernel, (1,), {"x_N": x, "y_N": y, "factor": 0.1, "BLOCK": 16})
        assert_same(y, x.float() * torch.tensor(0.1))


class TestDot:
    @staticmethod
    def run(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
        c = torch.empty(a.shape, dtype=torch.float32)
        interpret(dot_kernel, (1,),
                  {"a_MK": a, "b_KN": b, "c_MN": c, "SIZE": a.shape[0], "PRECISION": precision})
        return c

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, *FP8], ids=str)
    def test_exact_products(self, dtype: torch.dtype) -> None:
        """Small integers are exact in every format; upstream multiplies bf16 bit patterns."""
        a = small_integers(32, 32, dtype=dtype)
        b = a.float().T.contiguous().to(dtype)
        assert torch.equal(self.run(a, b, "ieee"), a.float() @ b.float())

    def test_ieee_is_the_plain_matmul(self) -> None:
        """fp32 with "ieee" adds no rounding of its own: the bits are NumPy's."""
        a = torch.linspace(-3, 7, 1024).reshape(32, 32)
        b = torch.linspace(5, -2, 1024).reshape(32, 32)
        assert torch.equal(self.run(a, b, "ieee"), torch.from_numpy(np.matmul(a.numpy(), b.numpy())))

    def test_tf32_rounds_operands_to_ten_bits(self) -> None:
        """With one nonzero product per output the result is exactly the rounded operand, ties to even."""
        cases = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, 1 + 2**-10, -1 - 2**-12])
        a = torch.diag(torch.nn.functional.pad(cases, (0, 11)))
        identity = torch.eye(16)
        wanted = torch.tensor([1.0, 1 + 2**-9, 1 + 2**-10, 1 + 2**-10, -1.0])
        assert torch.equal(self.run(a, identity, "tf32").diag()[:5], wanted)
        assert torch.equal(self.run(a, identity, "ieee").diag()[:5], cases)

    def test_tf32x3_recovers_the_operand(self) -> None:
        """hi + lo holds 22 bits, enough for these."""
        a = torch.diag(torch.full((16,), 1 + 2**-11 + 2**-20))
        assert torch.equal(self.run(a, torch.eye(16), "tf32x3"), a)


def test_upstream_still_needs_the_corrections() -> None:
    """When this fails, Triton's interpreter passes the self-test: delete casts.py, most of arithmetic.py."""
    with pytest.raises(RuntimeError, match="interpreter self-test"):
        check_numerics(upstream.InterpreterBuilder())
