"""Protects the way foreign Triton kernels start on a CPU: arguments as their hosts write them, checks on."""

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver

from moe_fast.interpreter import OutOfBoundsError
from moe_ref.adapters.interpreted import interpret_on_cpu, target_without_device
from moe_ref.contract.errors import UsageValueError


@triton.jit
def twice(x):
    """A function of kernels: it must stay what they call."""
    return x * 2


@triton.jit
def scale_kernel(x_N, y_N, N, FACTOR: tl.constexpr, BLOCK: tl.constexpr = 8):
    """y = x * 2 * FACTOR."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_N + offsets, twice(tl.load(x_N + offsets, mask=offsets < N)) * FACTOR, mask=offsets < N)


@triton.autotune([triton.Config({"BLOCK": 4}, num_warps=2), triton.Config({"BLOCK": 64})], key=["N"])
@triton.heuristics({"FACTOR": lambda given: given["N"]})
@triton.jit
def tuned_kernel(x_N, y_N, N, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """y = x * N, in the tiles of the configuration."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_N + offsets, tl.load(x_N + offsets, mask=offsets < N) * FACTOR, mask=offsets < N)


@pytest.fixture(scope="module", autouse=True)
def _started_here() -> Iterator[None]:
    kernels = [twice, scale_kernel, tuned_kernel]
    module = ModuleType("library")
    vars(module).update(twice=twice, scale=scale_kernel, tuned=tuned_kernel, other=SimpleNamespace())
    interpret_on_cpu(module)
    interpret_on_cpu(module)
    yield
    for kernel in kernels:
        del kernel.run


X_N = torch.arange(10, dtype=torch.bfloat16)


def test_positional_arguments_defaults_and_launch_options() -> None:
    """As a library writes it: pointers by position, a constexpr by name, another left out, options of the compiler."""
    y_N = torch.zeros(10, dtype=torch.bfloat16)
    scale_kernel[lambda meta: (triton.cdiv(10, meta["BLOCK"]),)](X_N, y_N, 10, FACTOR=3, num_warps=8, num_stages=2)
    assert torch.equal(y_N, X_N * 6)


def test_the_first_configuration_without_a_measurement() -> None:
    """4 lanes a program need 3 programs for 10 numbers; with the second configuration the same grid would do 192."""
    grids = []
    y_N = torch.zeros(10, dtype=torch.bfloat16)
    tuned_kernel[lambda meta: grids.append(meta["BLOCK"]) or (triton.cdiv(meta["N"], meta["BLOCK"]),)](X_N, y_N, N=10)
    assert grids == [4]
    assert torch.equal(y_N, X_N * 10)


def test_checks_stay_on() -> None:
    """What a kernel does beside its tensors is an error, not memory of somebody else."""
    with pytest.raises(OutOfBoundsError, match="load out of bounds of argument x_N"):
        scale_kernel[(2,)](X_N, torch.zeros(16, dtype=torch.bfloat16), 16, 1)


def test_an_unknown_option_is_refused() -> None:
    """A misspelt constexpr would be a launch option that nobody reads."""
    with pytest.raises(UsageValueError, match="argument 'FAKTOR', but should be one of"):
        scale_kernel[(2,)](X_N, X_N.clone(), 10, 1, FAKTOR=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is active where there is a GPU")
def test_other_tensors_go_the_compiled_way() -> None:
    """Which asks for a driver; a stand-in answers for the target inside its block alone."""
    with pytest.raises(RuntimeError, match="0 active drivers"):
        scale_kernel[(2,)](X_N.to("meta"), X_N.to("meta"), 10, 1)
    with target_without_device():
        assert driver.active.get_current_target().backend == "cuda"
    with pytest.raises(RuntimeError, match="0 active drivers"):
        driver.active.get_current_target()
