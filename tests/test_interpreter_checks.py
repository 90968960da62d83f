"""What the interpreter shim catches: accesses out of bounds, store races, overflow, device asserts."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from moe_fast.interpreter import (
    DeviceAssertError,
    IntegerOverflowError,
    OutOfBoundsError,
    StoreRaceError,
    checking,
    interpret,
)


@triton.jit
def copy_kernel(x_N, y_N, N, BLOCK: tl.constexpr):
    """y = x in y's dtype: the cast is the implicit one of tl.store."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_N + offsets, tl.load(x_N + offsets, mask=offsets < N), mask=offsets < N)


@triton.jit
def shifted_kernel(x_N, y_N, shift, BLOCK: tl.constexpr):
    """y[i] = x[i + shift]."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_N + offsets, tl.load(x_N + offsets + shift))


@triton.jit
def packed_kernel(y_N):
    """Sums of uint32 beyond 2**32, brought back by a difference, and a product."""
    lanes = tl.arange(0, 2)
    one = tl.where(lanes == 0, 0xFFFF0001, 0xFFFFFFFF).to(tl.uint32)
    other = tl.where(lanes == 0, 0xFFFF0000, 0).to(tl.uint32)
    total = tl.where(lanes == 0, one + one + 0xFFFD - other, one * 0x10000)
    tl.store(y_N + lanes, total.to(tl.int64))


@triton.jit
def store_kernel(y_N, stride, BLOCK: tl.constexpr):
    """Program p stores its number to y[p * stride ...]."""
    offsets = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_N + offsets, tl.program_id(0) + tl.zeros((BLOCK,), tl.int32))


@triton.jit
def same_lane_kernel(y_N, BLOCK: tl.constexpr):
    """Two neighbouring lanes store to one element."""
    tl.store(y_N + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK))


@triton.jit
def atomic_kernel(total_1, x_N, BLOCK: tl.constexpr):
    """total += x, all lanes on one address."""
    tl.atomic_add(total_1 + tl.zeros((BLOCK,), tl.int32), tl.load(x_N + tl.arange(0, BLOCK)))


@triton.jit
def offset_kernel(y_N, rows, columns):
    """Stores rows * columns, as a careless offset computation would."""
    tl.store(y_N, rows * columns)


@triton.jit
def asserting_kernel(y_N, limit):
    """Asserts that the program number stays below a limit."""
    tl.device_assert(tl.program_id(0) < limit, "program below limit")
    tl.store(y_N + tl.program_id(0), 1)


@triton.jit
def hinting_kernel(y_N, first, SIZE: tl.constexpr):
    """Tells the compiler that `first` is a multiple of 16, by a number, and that neighbours are."""
    start = tl.multiple_of(first, 16) + tl.max_contiguous(tl.arange(0, SIZE), SIZE)
    tl.store(y_N + start, start)


@triton.jit
def transpose_kernel(x_MN, y_NM, row_stride, column_stride, M: tl.constexpr, N: tl.constexpr):
    """y = x.T for an x with any strides."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_MN + m[:, None] * row_stride + n[None, :] * column_stride)
    tl.store(y_NM + n[:, None] * M + m[None, :], x.T)


def launch_shifted(x_N: torch.Tensor, shift: int, programs: int = 1) -> None:
    """y = x[shift:] with 4 elements per program."""
    interpret(shifted_kernel, (programs,),
              {"x_N": x_N, "y_N": torch.ones(4 * programs), "shift": shift, "BLOCK": 4})


class TestMemory:
    def test_load_beyond_the_end(self) -> None:
        """The message names kernel, program, argument, lanes, offset and size."""
        with pytest.raises(OutOfBoundsError) as caught:
            launch_shifted(torch.ones(8), shift=1, programs=2)
        assert str(caught.value).startswith(
            "kernel shifted_kernel, program (1, 0, 0): load out of bounds of argument x_N: 1 lanes, the "
            "first at byte offset 32, but 4 bytes should fit in the 32 bytes of shape (8,), strides (1,)")

    def test_load_before_the_start(self) -> None:
        with pytest.raises(OutOfBoundsError, match=r"x_N: 1 lanes, the first at byte offset -4,"):
            launch_shifted(torch.ones(8), shift=-1, programs=2)

    def test_store_beyond_the_end(self) -> None:
        y = torch.zeros(6, dtype=torch.int32)
        message = r"program \(1, 0, 0\): store out of bounds of argument y_N: 2 lanes"
        with pytest.raises(OutOfBoundsError, match=message):
            interpret(store_kernel, (2,), {"y_N": y, "stride": 4, "BLOCK": 4})
        assert y.tolist() == [0] * 6  # program 0 stored zeros, program 1 nothing

    def test_masked_lanes_may_point_anywhere(self) -> None:
        """The ragged edge of every tile: only active lanes count."""
        x, y = torch.arange(5.0), torch.empty(5)
        interpret(copy_kernel, (1,), {"x_N": x, "y_N": y, "N": 5, "BLOCK": 4096})
        assert torch.equal(y, x)

    def test_a_view_is_bounded_by_itself(self) -> None:
        """A rank's shard is a view of the whole tensor: reading the next rank's rows must not pass."""
        whole = torch.arange(16.0)
        with pytest.raises(OutOfBoundsError, match="argument x_N: 4 lanes, the first at byte offset 32"):
            launch_shifted(whole[:8], shift=8)

    def test_empty_tensor(self) -> None:
        """Its pointer is null; the access is caught with the argument's name instead of a crash."""
        with pytest.raises(OutOfBoundsError, match=r"argument x_N: 4 lanes.*in the 0 bytes"):
            launch_shifted(torch.ones(0), shift=0)

    def test_atomic_out_of_bounds(self) -> None:
        with pytest.raises(OutOfBoundsError, match="atomic out of bounds of argument total_1"):
            interpret(atomic_kernel, (1,), {"total_1": torch.zeros(0), "x_N": torch.ones(8), "BLOCK": 8})

    def test_two_programs_race(self) -> None:
        """Tiles of 4 at a stride of 3 share one element."""
        y = torch.zeros(16, dtype=torch.int32)
        with checking(bounds=True, races=True, overflow=True), pytest.raises(
                StoreRaceError, match=r"\(0, 0, 0\) and \(1, 0, 0\) both store byte 12 of argument y_N"):
            interpret(store_kernel, (2,), {"y_N": y, "stride": 3, "BLOCK": 4})

    def test_disjoint_tiles_do_not_race(self) -> None:
        y = torch.zeros(16, dtype=torch.int32)
        with checking(bounds=True, races=True, overflow=True):
            for _ in range(2):  # a later launch may store again
                interpret(store_kernel, (4,), {"y_N": y, "stride": 4, "BLOCK": 4})
        assert y.tolist() == [index // 4 for index in range(16)]

    def test_two_lanes_race(self) -> None:
        y = torch.zeros(8, dtype=torch.int32)
        with checking(bounds=True, races=True, overflow=True), pytest.raises(
                StoreRaceError, match="two lanes of one store write byte 0 of argument y_N"):
            interpret(same_lane_kernel, (1,), {"y_N": y, "BLOCK": 8})

    def test_races_are_looked_for_by_default_and_can_be_allowed(self) -> None:
        y = torch.zeros(16, dtype=torch.int32)
        with pytest.raises(StoreRaceError):
            interpret(store_kernel, (2,), {"y_N": y, "stride": 3, "BLOCK": 4})
        with checking(bounds=True, races=False, overflow=True):
            interpret(store_kernel, (2,), {"y_N": y, "stride": 3, "BLOCK": 4})
        assert y[:7].tolist() == [0, 0, 0, 1, 1, 1, 1]

    @pytest.mark.parametrize("view", [
        lambda x: x[::2, 1:33:2], lambda x: x.T[:16, :16], lambda x: x[5, :16].expand(16, 16)],
        ids=["strided", "transposed", "expanded"])
    def test_views(self, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Strided, transposed and expanded arguments are used in place."""
        x = view(torch.arange(32.0 * 40).reshape(32, 40))
        y = torch.empty(16, 16)
        interpret(transpose_kernel, (1,), {"x_MN": x, "y_NM": y, "row_stride": x.stride(0),
                                           "column_stride": x.stride(1), "M": 16, "N": 16})
        assert torch.equal(y, x.T)

    def test_store_into_a_view_changes_its_storage_only_there(self) -> None:
        whole = torch.zeros(12, dtype=torch.int32)
        interpret(store_kernel, (1,), {"y_N": whole[4:8], "stride": 4, "BLOCK": 4})
        interpret(store_kernel, (2,), {"y_N": whole[0:8], "stride": 4, "BLOCK": 4})
        assert whole.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]


class TestOverflow:
    def test_int32_overflow(self) -> None:
        """65536 * 32768 is 2**31: one more than int32 holds, a wrong address on a GPU."""
        y = torch.zeros(1, dtype=torch.int32)
        message = r"kernel offset_kernel, program \(0, 0, 0\): int32 overflow in mul: 2147483648,"
        with pytest.raises(IntegerOverflowError, match=message):
            interpret(offset_kernel, (1,), {"y_N": y, "rows": 65536, "columns": 32768})

    def test_largest_int32_is_no_overflow(self) -> None:
        y = torch.zeros(1, dtype=torch.int32)
        interpret(offset_kernel, (1,), {"y_N": y, "rows": 2**31 - 1, "columns": 1})
        assert y.item() == 2**31 - 1

    def test_unsigned_integers_wrap(self) -> None:
        """Modulo 2**32, compiled and here: a key packed above a count (Liger-Kernel's _keyed_add), a random number."""
        y = torch.zeros(2, dtype=torch.int64)
        interpret(packed_kernel, (1,), {"y_N": y})
        assert y.tolist() == [2**32 - 1, 2**32 - 2**16]

    def test_wraps_when_the_check_is_off(self) -> None:
        y = torch.zeros(1, dtype=torch.int32)
        with checking(bounds=True, races=False, overflow=False):
            interpret(offset_kernel, (1,), {"y_N": y, "rows": 65536, "columns": 32768})
        assert y.item() == -2**31

    def test_device_assert(self) -> None:
        y = torch.zeros(3, dtype=torch.int32)
        with pytest.raises(DeviceAssertError, match=r"\(2, 0, 0\): tl\.device_assert failed: program below"):
            interpret(asserting_kernel, (3,), {"y_N": y, "limit": 2})
        assert y.tolist() == [1, 1, 0]

    def test_a_hint_that_does_not_hold(self) -> None:
        """A compiler would load sixteen at once from an address that it takes for aligned: undefined on a GPU."""
        y = torch.zeros(48, dtype=torch.int32)
        interpret(hinting_kernel, (1,), {"y_N": y, "first": 32, "SIZE": 16})
        assert y.tolist() == [0] * 32 + list(range(32, 48))
        with pytest.raises(DeviceAssertError, match=r"tl\.multiple_of\(24, 16\), but 24 is no multiple of 16"):
            interpret(hinting_kernel, (1,), {"y_N": y, "first": 24, "SIZE": 16})
