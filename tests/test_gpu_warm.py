"""What is compiled ahead must be what a start looks for, or it is compiled twice: with a driver that only pretends."""

import pytest
import torch

from ci.gpu_warm import case_ids, compile_all, launches
from moe_fast.compile.recorder import Launch
from tests.test_compiled_launch import LAYER, _pretended_gpu

pretended = pytest.fixture(autouse=True)(_pretended_gpu.__wrapped__)  # type: ignore[attr-defined]


def test_a_start_finds_what_was_compiled_ahead() -> None:
    """From shapes alone, for tensors that have addresses."""
    some = [one for one in launches([LAYER], "sm_90") if one.kernel.fn.__name__ in ("combine_kernel", "gate_up_kernel")]
    assert len(some) == 2
    assert compile_all(some) == []
    for one in some:
        kernels = one.kernel.device_caches[0][0]
        count = len(kernels)
        real = {name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
                for name, value in one.arguments.items()}
        assert one.kernel.warmup(grid=(1,), **real) is not None
        assert len(kernels) == count > 0


def test_what_does_not_compile_is_named() -> None:
    """And the others are compiled all the same."""
    one = next(one for one in launches([LAYER], "sm_90") if one.kernel.fn.__name__ == "combine_kernel")
    broken = Launch(one.kernel, one.arguments | {"BLOCK_T": 3})
    assert [text.partition(":")[0] for text in compile_all([broken, one])] == ["combine_kernel"]


def test_every_case_is_one_and_none_is_compiled_twice() -> None:
    """What a mistake in a list would cost on a GPU."""
    names = case_ids()
    assert len(set(names)) == len(names)
    once = launches(names[:2], "sm_90")
    assert len(launches([*names[:2], *names[:2]], "sm_90")) == len(once) > 5
