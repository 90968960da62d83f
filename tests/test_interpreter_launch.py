"""One launch of the interpreter shim: what it takes, and that it leaves nothing behind."""

import os
import threading

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction

from moe_fast.interpreter import OutOfBoundsError, checking, interpret
from moe_ref.contract.errors import UsageTypeError, UsageValueError


@triton.jit
def twice(x, FACTOR: tl.constexpr = 2):
    """Innermost device function."""
    return x * FACTOR


@triton.jit
def softmax_row(x):
    """Device function that calls another one, and tl.standard's."""
    shifted = tl.exp(twice(x) - tl.max(twice(x), 0))
    return shifted / tl.sum(shifted, 0)


@triton.jit
def nested_kernel(x_N, y_N, N, BLOCK: tl.constexpr):
    """y = softmax(2 x) in one block, with tl.cdiv for the number of steps."""
    total = 0
    for _ in tl.range(0, tl.cdiv(N, BLOCK), num_stages=2):
        total += 1
    offsets = tl.arange(0, BLOCK)
    tl.store(y_N + offsets, softmax_row(tl.load(x_N + offsets)) * total)


@triton.jit
def shifted_kernel(x_N, y_N, shift, BLOCK: tl.constexpr):
    """y[i] = x[i + shift]."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_N + offsets, tl.load(x_N + offsets + shift))


@triton.jit
def store_kernel(y_N, stride, BLOCK: tl.constexpr):
    """Program p stores its number to y[p * stride ...]."""
    offsets = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_N + offsets, tl.program_id(0) + tl.zeros((BLOCK,), tl.int32))


def language_state() -> list[tuple[object, str, object]]:
    """Every attribute a launch could change."""
    spaces = (tl, tl.core, tl.math, tl.tensor, tl.block_type, tl.dtype, tl.core.tensor_descriptor_base,
              JITFunction, upstream, upstream.InterpreterBuilder, upstream.TensorHandle, upstream.ReduceOps,
              upstream.ScanOps)
    states = [(space, name, value) for space in spaces for name, value in vars(space).items()]
    kernel_globals = [(globals(), name, value) for name, value in globals().items()]
    return states + kernel_globals + [(upstream.interpreter_builder, *item)
                                      for item in vars(upstream.interpreter_builder).items()]


def assert_same_state(before: list, after: list) -> None:
    assert [(id(space), name) for space, name, _ in before] == [(id(space), name) for space, name, _ in after]
    changed = [name for (_, name, old), (_, _, new) in zip(before, after, strict=True) if old is not new]
    assert changed == []


def launch_shifted(shift: int) -> torch.Tensor:
    y = torch.empty(4)
    interpret(shifted_kernel, (1,), {"x_N": torch.arange(4.0), "y_N": y, "shift": shift, "BLOCK": 4})
    return y


def compile_nested() -> str:
    signature = {"x_N": "*fp32", "y_N": "*fp32", "N": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=nested_kernel, signature=signature, constexprs={"BLOCK": 16})
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True  # past Triton's disk cache
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


class TestScope:
    def test_nothing_is_left_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also TRITON_INTERPRET stays unset: Triton's knob would export it to child processes."""
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        before = language_state()
        launch_shifted(0)
        assert_same_state(before, language_state())
        assert "TRITON_INTERPRET" not in os.environ

    def test_the_language_is_tritons_own_after_a_launch(self) -> None:
        """Looks at Triton itself, so that a leak of an earlier launch shows too."""
        launch_shifted(0)
        assert tl.core.is_builtin(tl.load)
        assert tl.load is tl.core.load
        assert isinstance(vars(tl.tensor)["sum"], JITFunction)
        assert tl.range is tl.core.range
        assert isinstance(tl.range, type)

    def test_nothing_is_left_behind_by_a_kernel_that_raises(self) -> None:
        before = language_state()
        with pytest.raises(OutOfBoundsError):
            launch_shifted(99)
        assert_same_state(before, language_state())

    def test_device_function_outside_a_kernel_still_refuses(self) -> None:
        """Triton's own protection is back after a launch."""
        with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
            twice(2)

    def test_compile_interpret_compile(self) -> None:
        """One process compiles and interprets the same kernel; the PTX is the same before and after."""
        before = compile_nested()
        y = torch.empty(16)
        interpret(nested_kernel, (1,), {"x_N": torch.zeros(16), "y_N": y, "N": 16, "BLOCK": 16})
        assert torch.equal(y, torch.full((16,), 1 / 16))
        assert compile_nested() == before

    def test_nested_device_functions(self) -> None:
        """Device functions two levels deep, a default constexpr, tl.standard functions, a counter."""
        x, y = torch.tensor([0.0, 0.0, 0.0, 50.0]), torch.empty(4)
        interpret(nested_kernel, (1,), {"x_N": x, "y_N": y, "N": 9, "BLOCK": 4})
        # exp(-100) is 3.7e-44, below half an ulp of the sum 1; N = 9 in steps of 4 is 3 steps
        assert y[3].item() == 3.0
        assert y[0].item() == y[1].item() < 1e-42

    def test_closure_variables(self) -> None:
        """A kernel made inside a function sees its enclosing variables as they are at the launch."""
        step = tl.constexpr(3)

        @triton.jit
        def closure_kernel(y_N, BLOCK: tl.constexpr):
            tl.store(y_N + tl.arange(0, BLOCK), tl.arange(0, BLOCK) * step)

        y = torch.empty(4, dtype=torch.int32)
        interpret(closure_kernel, (1,), {"y_N": y, "BLOCK": 4})
        assert y.tolist() == [0, 3, 6, 9]
        step = tl.constexpr(5)
        interpret(closure_kernel, (1,), {"y_N": y, "BLOCK": 4})
        assert y.tolist() == [0, 5, 10, 15]

    def test_threads_take_turns(self) -> None:
        """Eight threads launch at once; each launch sees its own grid position, arguments and checks."""
        results: dict[int, torch.Tensor] = {}
        barrier = threading.Barrier(8)

        def work(thread: int) -> None:
            barrier.wait()
            with checking(bounds=thread % 2 == 0, races=thread % 2 == 0, overflow=True):
                for _ in range(5):
                    y = torch.full((64,), -1, dtype=torch.int32)
                    interpret(store_kernel, (thread + 1,), {"y_N": y, "stride": 4, "BLOCK": 4})
            results[thread] = y

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for thread in range(8):
            wanted = [index // 4 if index < 4 * (thread + 1) else -1 for index in range(64)]
            assert results[thread].tolist() == wanted


class TestCalls:
    def test_a_failing_self_test_stops_the_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A Triton that routes casts elsewhere must stop the launch, not return wrong numbers."""
        def failing(builder: object) -> None:
            raise RuntimeError("interpreter self-test")

        monkeypatch.setattr("moe_fast.interpreter.launch.check_numerics", failing)
        with pytest.raises(RuntimeError, match="interpreter self-test"):
            launch_shifted(0)

    def test_grid_of_zero_programs_does_nothing(self) -> None:
        y = torch.full((4,), 7, dtype=torch.int32)
        interpret(store_kernel, (0,), {"y_N": y, "stride": 4, "BLOCK": 4})
        assert y.tolist() == [7] * 4

    def test_launch_options_are_dropped(self) -> None:
        y = torch.zeros(4, dtype=torch.int32)
        interpret(store_kernel, (1,), {"y_N": y, "stride": 4, "BLOCK": 4, "num_warps": 8, "num_stages": 3})

    def test_faults_are_listed_together(self) -> None:
        """A misspelt and a missing argument; a negative grid."""
        with pytest.raises(UsageValueError, match=r"grid \(-1,\).*'strid'"):
            interpret(store_kernel, (-1,), {"y_N": torch.zeros(4), "strid": 4, "BLOCK": 4})
        with pytest.raises(UsageValueError, match="stride is missing; argument BLOCK is missing"):
            interpret(store_kernel, (1,), {"y_N": torch.zeros(4)})

    def test_plain_function_is_refused(self) -> None:
        with pytest.raises(UsageTypeError, match=r"should be a triton\.JITFunction"):
            interpret(store_kernel.fn, (1,), {})

    def test_tensor_elsewhere_is_refused(self) -> None:
        with pytest.raises(UsageTypeError, match="y_N: a tensor on meta"):
            interpret(store_kernel, (1,), {"y_N": torch.zeros(4, device="meta"), "stride": 4, "BLOCK": 4})

    def test_races_need_bounds(self) -> None:
        with pytest.raises(UsageValueError, match="races=True should come with bounds=True"), \
                checking(bounds=False, races=True, overflow=False):
            pass
