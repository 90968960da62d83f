"""Every kernel compiles for the GPUs it is meant for, on a machine without one, in the process that interprets it.

The interpreter accepts programs that the compiler refuses (a variable defined in one branch, a changed
type in a loop), so a green matrix on a CPU says nothing about that. The launches are taken from a
real call of the layer with the tile sizes of a GPU; nothing is listed by hand.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import moe_fast
from moe_fast.kernels.act_gradient import three_product_tile
from moe_fast.launch import launch as start
from moe_fast.tiles import Tile, gemm_tile
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
    "v1-T64.H256.I128.E8.K3-bf16-norm-eps0.5-bias-g4.2-scale2.5-fillzero-epsclamp-learnscale-routerbias-logitcap1.5":
        "most options of a router",
    "v1-T64.H256.I128.E8.K3-bf16-sigmoid-norm-biaslogit-cap8-capweight-capafter": "a capacity by weight",
    "v1-T64.H256.I128.E6.K3-bf16-norm-sqrtsoftplus-expertscale-capfactor1-capchoice-capseq16": "and by choice",
    "v1-T512.H256.I128.E4.K2-bf16-mlpbias-limit7-alpha1.702-up1": "gpt-oss's experts",
    "v1-T1.H256.I128.E8.K1-bf16-sigmoid-relu2-nogate-sh64-shgatecap2-shupcap2-weightinput": "one projection, softcaps",
    "v1-T64.H256.I128.E8.K2-fp32-mlpbias-limit1-limitafter-sh64-shrelu-shmean-outbias": "a mean, every bias, fp32",
}
ROUTER_KERNELS = {"product_kernel", "select_kernel", "select_gradient_kernel"}
DROP_KERNELS = {"drop_kernel", "drop_gradient_kernel"}


@dataclass(frozen=True)
class Launch:
    kernel: triton.JITFunction
    arguments: dict[str, object]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def types(self) -> tuple[torch.dtype, ...]:
        """Of its tensors: one kernel is compiled for each combination."""
        return tuple(value.dtype for value in self.arguments.values() if isinstance(value, torch.Tensor))

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
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
             torch.int64: "*i64"}
    if isinstance(value, torch.Tensor):
        return names[value.dtype]
    return "fp32" if isinstance(value, float) else ("i32" if abs(value) < 2**31 else "i64")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Launch]]:
    """The launches of one call of the layer and of its gradients, with a GPU's tiles; none is run."""
    launches: list[Launch] = []

    def keep(kernel: triton.JITFunction, grid: tuple[int, ...], device: torch.device, **arguments: object) -> None:
        launches.append(Launch(kernel, arguments))

    def on_gpu(choose: Callable[..., Tile]) -> Callable[..., Tile]:
        return lambda device, *arguments, **options: choose(torch.device("cuda"), *arguments, **options)

    replacements = {start: keep, gemm_tile: on_gpu(gemm_tile), three_product_tile: on_gpu(three_product_tile)}
    for name, module in list(sys.modules.items()):
        for function, replacement in replacements.items() if name.startswith("moe_fast.") else ():
            if vars(module).get(function.__name__) is function:
                monkeypatch.setattr(module, function.__name__, replacement)

    def call(case_id: str) -> list[Launch]:
        case = parse_case(case_id)
        inputs, shard = build_inputs(case.problem), build_shards(case.problem, case.parallel)[0]
        for _, tensor in shard.named_tensors():
            tensor.requires_grad_()
        y_TH = moe_fast.moe(inputs.x_TH.requires_grad_(), shard, case.problem.spec)
        y_TH.backward(torch.ones_like(y_TH))
        return launches
    return call


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case_id", CASES)
def test_every_kernel_compiles_and_fits(case_id: str, capability: int, captured: Callable[[str], list[Launch]]) -> None:
    launches = {(launch.name, launch.types): launch for launch in captured(case_id)}
    optional = {"bias_gradient_kernel", "bias_product_kernel"}
    assert {"count_kernel", "layout_kernel", "scatter_kernel", "gate_up_kernel", "down_kernel", "combine_kernel",
            "act_gradient_kernel", "row_gradient_kernel", "weight_gradient_kernel", *ROUTER_KERNELS,
            *(DROP_KERNELS if "-cap" in case_id else ())} == {name for name, _ in launches} - optional
    assert optional <= {name for name, _ in launches} or "mlpbias" not in case_id
    for (name, _), launch in launches.items():
        compiled = launch.compile(capability)
        assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT[capability], f"{name}: {compiled.metadata.shared} bytes"


def test_bf16_products_run_on_tensor_cores(captured: Callable[[str], list[Launch]]) -> None:
    """A cast to fp32 before a dot would still be right, and an order of magnitude slower."""
    for launch in captured("v1-T512.H256.I128.E4.K2-bf16"):
        if launch.name in ("gate_up_kernel", "down_kernel", "act_gradient_kernel", "row_gradient_kernel",
                           "weight_gradient_kernel"):
            assert "wgmma.mma_async" in launch.compile(90).asm["ptx"], launch.name
