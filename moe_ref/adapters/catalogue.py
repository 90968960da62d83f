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
    Adapter(name="torch.scaled_grouped_mm", target="moe_ref.adapters.torch_scaled:SCALED_GROUPED_MM",
            libraries=(TORCH,), kernels="own", lineage="torch", devices=("cuda",),
            what="torch.nn.functional.scaled_grouped_mm, operands in e4m3 by row; never run, judged in no dtype"),
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
)


def find(name: str) -> Adapter | None:
    """The adapter of that name."""
    return next((one for one in ADAPTERS if one.name == name), None)
