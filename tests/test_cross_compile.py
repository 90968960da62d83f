"""Every kernel compiles for the GPUs it is meant for, on a machine without one, in the process that interprets it.

The interpreter accepts programs that the compiler refuses (a variable defined in one branch, a changed
type in a loop), so a green matrix on a CPU says nothing about that. The launches are taken from a
real call of the layer with the tile sizes of a GPU; nothing is listed by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import moe_fast.kernels.align
import moe_fast.kernels.combine
import moe_fast.kernels.down
import moe_fast.kernels.gate_up
import moe_fast.kernels.router
import moe_fast.layer
from moe_fast.tiles import gemm_tile
from moe_ref import parse_case
from moe_ref.inputs.build import build_inputs, build_shards

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes per block; the compiler reports what a kernel wants and does not enforce this (CUDA C guide, table 15)."""

CASES = {
    # A decode-sized and a prefill-sized layer in each dtype; both score functions, groups and a shared expert.
    "v1-T1.H256.I128.E8.K2-bf16-norm": "decode, softmax",
    "v1-T512.H256.I128.E4.K2-bf16-sigmoid-norm-eps1em20-bias-g2.1-top2sum-sh64-shgate": "prefill, DeepSeek-V3 routing",
    "v1-T512.H256.I128.E4.K2-fp16-gelu": "prefill, fp16, gelu",
    "v1-T64.H256.I128.E8.K2-fp32-gelutanh-sh64": "fp32 on the plain units",
    "v1-T1.H256.I1.E2.K1-bf16": "every size that can be 1",
}


@dataclass(frozen=True)
class Launch:
    kernel: triton.JITFunction
    arguments: dict[str, object]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def compile(self, capability: int) -> triton.compiler.CompiledKernel:
        # A launch makes a constant of every integer that is 1, which a kernel must survive as well.
        constants = {parameter.name: self.arguments[parameter.name] for parameter in self.kernel.params
                     if parameter.is_constexpr or _is_one(self.arguments[parameter.name])}
        signature = {parameter.name: "constexpr" if parameter.name in constants else
                     _type(self.arguments[parameter.name]) for parameter in self.kernel.params}
        options = {name: self.arguments[name] for name in ("num_warps", "num_stages") if name in self.arguments}
        return triton.compile(ASTSource(self.kernel, signature, constants),
                              target=GPUTarget("cuda", capability, 32), options=options)


def _is_one(value: object) -> bool:
    return isinstance(value, int) and value == 1


def _type(value: object) -> str:
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    if isinstance(value, torch.Tensor):
        return names[value.dtype]
    return "fp32" if isinstance(value, float) else ("i32" if abs(value) < 2**31 else "i64")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Launch]]:
    """The launches of one call of the layer, with a GPU's tiles; none is run."""
    launches: list[Launch] = []

    def keep(kernel: triton.JITFunction, grid: tuple[int, ...], device: torch.device, **arguments: object) -> None:
        launches.append(Launch(kernel, arguments))

    def gpu_tile(device: torch.device, *arguments: object, **options: object) -> object:
        return gemm_tile(torch.device("cuda"), *arguments, **options)

    for module in (moe_fast.kernels.align, moe_fast.kernels.combine, moe_fast.kernels.down,
                   moe_fast.kernels.gate_up, moe_fast.kernels.router):
        monkeypatch.setattr(module, "launch", keep)
    for module in (moe_fast.layer, moe_fast.kernels.router):
        monkeypatch.setattr(module, "gemm_tile", gpu_tile)

    def call(case_id: str) -> list[Launch]:
        case = parse_case(case_id)
        inputs, shard = build_inputs(case.problem), build_shards(case.problem, case.parallel)[0]
        moe_fast.moe(inputs.x_TH, shard, case.problem.spec)
        return launches
    return call


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case_id", CASES)
def test_every_kernel_compiles_and_fits(case_id: str, capability: int, captured: Callable[[str], list[Launch]]) -> None:
    launches = {launch.name: launch for launch in captured(case_id)}
    assert {"count_kernel", "layout_kernel", "scatter_kernel", "gate_up_kernel", "down_kernel", "combine_kernel",
            "logits_kernel", "select_kernel"} == set(launches)
    for name, launch in launches.items():
        compiled = launch.compile(capability)
        assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[capability], f"{name}: {compiled.metadata.shared} bytes"


def test_bf16_products_run_on_tensor_cores(captured: Callable[[str], list[Launch]]) -> None:
    """A cast to fp32 before a dot would still be right, and an order of magnitude slower."""
    for launch in captured("v1-T512.H256.I128.E4.K2-bf16"):
        if launch.name in ("gate_up_kernel", "down_kernel"):
            assert "wgmma.mma_async" in launch.compile(90).asm["ptx"], launch.name
