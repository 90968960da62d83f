"""Protects the start of a kernel on a GPU, which no CPU run reaches: Triton's own path, to where a device is needed.

A driver that only knows what it is stands in. Its target is compiled for, and nothing is started.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moe_fast.compile.recorder import Launch, record
from moe_ref.contract.case_id import parse_case

LAYER = "v1-T33.H128.I96.E4.K2-bf16-norm-limit7"


@pytest.fixture(autouse=True)
def _pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a start asks of the driver before the device: current device and stream, target, and how code is loaded."""
    monkeypatch.setattr(driver, "_active", SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32), launcher_cls=lambda *arguments: None,
        utils=SimpleNamespace(load_binary=lambda *arguments: (0, 0, 0, 0, 0),
                              get_device_properties=lambda device: {"max_shared_mem": 232448})))


def launched(name: str) -> Launch:
    """A kernel of the layer, with tensors that have addresses."""
    found = next(one for one in record(parse_case(LAYER), "sm_90") if one.kernel.fn.__name__ == name)
    return Launch(found.kernel, {key: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor)
                                 else value for key, value in found.arguments.items()})


def compiled(launch: Launch, **changed: object) -> Any:
    """What a start would run."""
    return launch.kernel.warmup(grid=(1,), **launch.arguments | changed)


@pytest.mark.parametrize("name", ["gate_up_kernel", "select_kernel", "combine_kernel"])
def test_a_second_start_compiles_nothing(name: str) -> None:
    """Its key is made of every argument, a form of an expert among them: equal ones have to have equal keys."""
    launch, again = launched(name), launched(name)
    assert compiled(launch) is compiled(again)


def test_another_form_is_another_kernel() -> None:
    """One number of it is enough; a key that leaves it out would run the other model's activation."""
    launch = launched("gate_up_kernel")
    form = launch.arguments["FORM"]
    other = compiled(launch, FORM=replace(form, limit=8.0))  # type: ignore[type-var]
    assert other is not compiled(launch)
    assert other.asm["ptx"] != compiled(launch).asm["ptx"]
