"""Every adapter: name, where it is, what it needs. Imports no library and no torch."""

from dataclasses import dataclass
from typing import Literal

from moe_ref.adapters.library import Library

Kernels = Literal["own", "torch"]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One implementation of somebody else.

    name: what `moe-ref verify` calls it. target: module:attribute with `moe` and `CAPABILITIES`. libraries: what it
    needs, the one that it is an adapter of first. what: a few words. kernels: "own" where the library brings kernels
    of its own that run, "torch" where it calls those of torch. lineage: implementations that descend from one source
    share it, and count as one. devices: where it runs; one for "cuda" alone is declared and runs in the GPU lane.
    """

    name: str
    target: str
    libraries: tuple[Library, ...]
    what: str
    kernels: Kernels
    lineage: str
    devices: tuple[str, ...] = ("cpu", "cuda")

    def lacking(self) -> str | None:
        """What is missing to load it, in words; None where everything is here."""
        return "; ".join(filter(None, (library.lacking() for library in self.libraries))) or None


TORCH = Library(distribution="torch", module="torch", least="2.11", below="2.14")
TRITON = Library(distribution="triton", module="triton", least="3.6", below="3.9")
TRANSFORMERS = Library(distribution="transformers", module="transformers", least="5.23", below="5.24")
LIGER = Library(distribution="liger-kernel", module="liger_kernel", least="0.8.5", below="0.9")
VLLM = Library(distribution="vllm", module="vllm", least="0.33", below="0.34")
SGLANG = Library(distribution="sglang", module="sglang", least="0.5.23", below="0.6")
FLASHINFER = Library(distribution="flashinfer-python", module="flashinfer", least="0.4", below="1")
DEEPGEMM = Library(distribution="deep_gemm", module="deep_gemm", least="2.1", below="3",
                   hint="built from github.com/deepseek-ai/DeepGEMM")
TORCHTITAN = Library(distribution="torchtitan", module="torchtitan", least="0.3", below="0.4")
SPMD_TYPES = Library(distribution="spmd_types", module="spmd_types", least="0.2.3", below="0.3")
TYRO = Library(distribution="tyro", module="tyro", least="1.0", below="2")
DOCSTRING_PARSER = Library(distribution="docstring_parser", module="docstring_parser", least="0.16", below="1")
JAX = Library(distribution="jax", module="jax", least="0.10", below="0.11")
TORCHAO = Library(distribution="torchao", module="torchao", least="0.18", below="0.19")
MLX = Library(distribution="mlx", module="mlx", least="0.32", below="0.33", hint="pip install 'mlx[cpu]'")

ADAPTERS: tuple[Adapter, ...] = (
    Adapter(name="torch.grouped_mm", target="moe_ref.adapters.torch_grouped:GROUPED_MM", libraries=(TORCH,),
            what="torch.nn.functional.grouped_mm, twice, with torch's silu between", kernels="own", lineage="torch"),
    Adapter(name="transformers.eager", target="moe_ref.adapters.transformers_blocks.subjects:EAGER",
            libraries=(TRANSFORMERS,), what="blocks of transformers, one expert after the other", kernels="torch",
            lineage="transformers"),
    Adapter(name="transformers.grouped_mm", target="moe_ref.adapters.transformers_blocks.subjects:GROUPED_MM",
            libraries=(TRANSFORMERS,), what="blocks of transformers, its default experts", kernels="torch",
            lineage="transformers"),
    Adapter(name="transformers.batched_mm", target="moe_ref.adapters.transformers_blocks.subjects:BATCHED_MM",
            libraries=(TRANSFORMERS,), what="blocks of transformers, the matrices of every slot gathered",
            kernels="torch", lineage="transformers"),
    Adapter(name="transformers.tp_plan", target="moe_ref.adapters.transformers_blocks.plans:TP_PLAN",
            libraries=(TRANSFORMERS,), what="blocks of transformers that its tensor-parallel plan has sharded",
            kernels="torch", lineage="transformers", devices=("cpu",)),
    Adapter(name="transformers.ep_plan", target="moe_ref.adapters.transformers_blocks.plans:EP_PLAN",
            libraries=(TRANSFORMERS,), what="blocks of transformers that its expert-parallel plan has sharded",
            kernels="torch", lineage="transformers", devices=("cpu",)),
    Adapter(name="liger", target="moe_ref.adapters.liger:LAYER", libraries=(LIGER, TRITON),
            what="Liger-Kernel's LigerFusedMoEFunction, forward and backward", kernels="own", lineage="liger"),
    Adapter(name="vllm.fused_moe", target="moe_ref.adapters.vllm_fused_moe:LAYER", libraries=(VLLM, TRITON),
            what="vLLM's fused_experts_impl, its Triton kernel twice", kernels="own", lineage="vllm"),
    Adapter(name="vllm.fused_moe.int8_w8a8", target="moe_ref.adapters.vllm_fused_moe:INT8_ROWS",
            libraries=(VLLM, TRITON), what="the same with int8 weights and rows rounded to int8", kernels="own",
            lineage="vllm"),
    Adapter(name="vllm.torch", target="moe_ref.adapters.vllm_torch:LAYER", libraries=(VLLM, TRITON),
            what="vLLM's reference, NaiveBatchedExperts", kernels="torch", lineage="vllm"),
    Adapter(name="sglang.fused_moe", target="moe_ref.adapters.sglang_fused_moe:LAYER", libraries=(SGLANG, TRITON),
            what="SGLang's fused_experts_impl, its Triton kernel twice", kernels="own", lineage="vllm"),
    Adapter(name="sglang.fused_moe.int8_w8a8", target="moe_ref.adapters.sglang_fused_moe:INT8_ROWS",
            libraries=(SGLANG, TRITON), what="the same with int8 weights and rows rounded to int8", kernels="own",
            lineage="vllm"),
    Adapter(name="sglang.torch", target="moe_ref.adapters.sglang_torch:LAYER", libraries=(SGLANG, TRITON),
            what="SGLang's moe_forward_native", kernels="torch", lineage="vllm"),
    Adapter(name="triton_kernels.torch", target="moe_ref.adapters.triton_kernels_torch:LAYER", libraries=(VLLM, TRITON),
            what="OpenAI's references routing_torch, matmul_ogs_torch, swiglu_torch", kernels="torch",
            lineage="triton_kernels"),
    Adapter(name="triton_kernels.matmul_ogs", target="moe_ref.adapters.triton_kernels_matmul_ogs:LAYER",
            libraries=(VLLM, TRITON), what="OpenAI's matmul_ogs with swiglu fused; never run", kernels="own",
            lineage="triton_kernels", devices=("cuda",)),
    Adapter(name="flashinfer", target="moe_ref.adapters.flashinfer_cutlass:LAYER", libraries=(FLASHINFER,),
            what="FlashInfer's cutlass_fused_moe; never run", kernels="own", lineage="tensorrt_llm", devices=("cuda",)),
    Adapter(name="deepgemm", target="moe_ref.adapters.deepgemm:LAYER", libraries=(DEEPGEMM,),
            what="DeepGEMM's m_grouped_bf16_gemm_nt_contiguous, twice; never run", kernels="own", lineage="deepgemm",
            devices=("cuda",)),
    Adapter(name="torch.scaled_grouped_mm", target="moe_ref.adapters.torch_scaled:SCALED_GROUPED_MM",
            libraries=(TORCH,), kernels="own", lineage="torch", devices=("cuda",),
            what="torch.nn.functional.scaled_grouped_mm, operands in e4m3 by row; never run"),
    Adapter(name="torchtitan.moe", target="moe_ref.adapters.torchtitan_moe:LAYER",
            libraries=(TORCHTITAN, TORCH, SPMD_TYPES, TYRO, DOCSTRING_PARSER),
            what="MoE: router, dispatcher, grouped or gpt-oss experts, shared expert", kernels="torch",
            lineage="torchtitan", devices=("cpu",)),
    Adapter(name="jax.ragged_dot", target="moe_ref.adapters.jax_ragged:RAGGED_DOT", libraries=(JAX,),
            what="jax.lax.ragged_dot, twice, with jax.nn.silu between", kernels="own", lineage="xla",
            devices=("cpu",)),
    Adapter(name="mlx.gather_mm", target="moe_ref.adapters.mlx_gather:GATHER_MM", libraries=(MLX,),
            what="mlx.core.gather_mm, twice, with mlx.nn.silu between, on its CPU backend", kernels="own",
            lineage="mlx", devices=("cpu",)),
    Adapter(name="torchao.mxfp8", target="moe_ref.adapters.torchao_experts:MXFP8", libraries=(TORCHAO, TORCH),
            what="grouped product of MXFP8 training, twice, kernels emulated, forward", kernels="torch",
            lineage="torchao"),
    Adapter(name="torchao.fp8_rowwise", target="moe_ref.adapters.torchao_rowwise:FP8_ROWWISE",
            libraries=(TORCHAO, TORCH, TRITON), what="grouped product of fp8 rowwise training, twice; never run",
            kernels="own", lineage="torchao", devices=("cuda",)),
)


def find(name: str) -> Adapter | None:
    """The adapter of that name."""
    return next((one for one in ADAPTERS if one.name == name), None)
