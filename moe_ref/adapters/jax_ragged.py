"""jax.lax.ragged_dot as a building block (jax 0.10.2): two grouped products with jax.nn.silu between, on XLA's CPU.

Tensors are shared by DLPack, contiguous as jax takes them; each operation is compiled and run on its own, so its result
is rounded to the dtype of the model. Gradients are those of jax.vjp. Process ranks are not declared: XLA keeps threads,
and a process that has run it cannot be forked; several ranks are virtual ones (`--ranks local`).
"""

import os
from collections.abc import Callable
from typing import Any

# Read when XLA starts: one thread per rank, and no search for accelerators.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax  # type: ignore[missing-import]
import torch
from torch.autograd.function import once_differentiable

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.grouped_rows import DECLARED, grouped_experts, rounded
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Direction, Dtype


def _to_jax(tensor: torch.Tensor) -> jax.Array:
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


class _Call(torch.autograd.Function):
    """A function of jax on torch's tensors, with its gradients."""

    @staticmethod
    def forward(ctx, function: Callable, *tensors: torch.Tensor) -> torch.Tensor:
        result, ctx.pull_back = jax.vjp(function, *(_to_jax(tensor) for tensor in tensors))
        return torch.from_dlpack(result).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return None, *(torch.from_dlpack(one).clone() for one in ctx.pull_back(_to_jax(gradient)))


def _product(rows_RK: torch.Tensor, w_EKN: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
    sizes_E = _to_jax(rows_E.to(torch.int32))

    def ragged(left_RK: jax.Array, right_EKN: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(left_RK, right_EKN, sizes_E, precision=jax.lax.Precision.HIGHEST)

    return _Call.apply(ragged, rows_RK, w_EKN)


def _activation(gate_RI: torch.Tensor, up_RI: torch.Tensor) -> torch.Tensor:
    return _Call.apply(lambda gate, up: jax.nn.silu(gate) * up, gate_RI, up_RI)


def experts(call: ExpertsCall) -> torch.Tensor:
    """Two ragged products with jax's silu between; rows are sorted and added up by torch."""
    return grouped_experts(call, _product, _activation)


RAGGED_DOT = ExpertsLayer(
    Capabilities(name="jax.ragged_dot", version=jax.__version__,
                 numerics={dtype: rounded(dtype) for dtype in Dtype}, features=(Feature.RESIDUAL,),
                 directions=tuple(Direction), devices=("cpu",), **DECLARED),
    experts)
