"""mlx.core.gather_mm as a building block (MLX 0.32.4, its CPU backend): what SwitchLinear of mlx-lm calls.

A product takes the matrix of each row's expert by number, with rows sorted by it; mlx.nn.silu stands between. The CPU
backend has gather_mm in fp32 alone ("[GatherMM::eval] Currently only supports float32."). Gradients are those of
mlx.vjp, which runs the forward pass again. Process ranks are not declared: MLX keeps a thread, which no fork survives.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx  # type: ignore[missing-import]
import mlx.nn  # type: ignore[missing-import]
import numpy as np
import torch
from torch.autograd.function import once_differentiable

from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.grouped_rows import DECLARED, grouped_experts, rounded
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Direction, Dtype


def _to_mlx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.detach().contiguous().numpy())


def _to_torch(array: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


class _Call(torch.autograd.Function):
    """A function of mlx on torch's tensors, with its gradients."""

    @staticmethod
    def forward(ctx, function: Callable, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return _to_torch(function(*(_to_mlx(tensor) for tensor in tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        arrays = [_to_mlx(tensor) for tensor in ctx.saved_tensors]
        _, gradients = mx.vjp(ctx.function, arrays, [_to_mlx(gradient)])
        return None, *map(_to_torch, gradients)


def _product(rows_RK: torch.Tensor, w_EKN: torch.Tensor, rows_E: torch.Tensor) -> torch.Tensor:
    ids_R = _to_mlx(torch.repeat_interleave(rows_E).to(torch.int32))

    def gathered(left_RK: mx.array, right_EKN: mx.array) -> mx.array:
        return mx.gather_mm(left_RK[:, None], right_EKN, rhs_indices=ids_R, sorted_indices=True)[:, 0]

    return _Call.apply(gathered, rows_RK, w_EKN)


def _activation(gate_RI: torch.Tensor, up_RI: torch.Tensor) -> torch.Tensor:
    return _Call.apply(lambda gate, up: mlx.nn.silu(gate) * up, gate_RI, up_RI)


def experts(call: ExpertsCall) -> torch.Tensor:
    """Two gathered products with mlx's silu between; rows are sorted and added up by torch."""
    return grouped_experts(call, _product, _activation)


GATHER_MM = ExpertsLayer(
    Capabilities(name="mlx.gather_mm", version=version("mlx"), numerics={Dtype.FP32: rounded(Dtype.FP32)},
                 features=(Feature.RESIDUAL,), directions=tuple(Direction), devices=("cpu",), **DECLARED),
    experts)
