"""Other projects' kernels as implementations, imported only when asked for.

Written after their sources and not yet run: what they return is compared with the truth before it is timed.

    vllm            vllm-project/vllm at 35d3c24, model_executor/layers/fused_moe: fused_experts, its Triton path
    triton_kernels  triton-lang/triton at 0223f69, python/triton_kernels: matmul with gather and scatter; activation and
                    the sum over slots are torch's, since its fused SwiGLU is another formula (it adds 1 to up)
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moe_ref.bench.kernels import part_range
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.comm import Groups
from moe_ref.contract.errors import UsageValueError, raise_faults
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.contract.weights import MoEWeights

Experts = Callable[[torch.Tensor, Routing, MoEWeights], torch.Tensor]


class Peer:
    """`moe` around a function that runs gated silu experts for a given routing; forward, on one rank, on CUDA."""

    def __init__(self, name: str, version: str, experts: Experts, numerics: Callable[[Format], Numerics]) -> None:
        self._name, self._experts = name, experts
        self.CAPABILITIES = Capabilities(
            name=name, version=version, injected_routing=True, devices=("cuda",),
            numerics={dtype: numerics(Format(dtype.value)) for dtype in (Dtype.FP16, Dtype.BF16)})

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None) -> torch.Tensor:
        """(T, H) in x's dtype; UsageValueError without a routing, since only its experts are compared."""
        raise_faults(self._name, self.CAPABILITIES.refused_mathematics(spec))
        if routing is None:
            raise UsageValueError(f"{self._name}: needs a given routing: its own router is not compared")
        return self._experts(x_TH, routing, weights)


def vllm() -> Peer:
    """vLLM's fused_experts; ImportError where vLLM is not installed."""
    package, layer = importlib.import_module("vllm"), importlib.import_module("vllm.model_executor.layers.fused_moe")

    def experts(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights) -> torch.Tensor:
        return layer.fused_experts(x_TH, weights.w13_EGIH.flatten(1, 2), weights.w2_EHI, routing.weights_TK,
                                   routing.ids_TK)

    def numerics(model: Format) -> Numerics:
        rows = (Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED)
        return Numerics(storage=dict.fromkeys(rows, model), reduce=model, activation=model, merge=model)
    return Peer("vllm", package.__version__, experts, numerics)


def triton_kernels() -> Peer:
    """triton_kernels' matmul; ImportError where it is not installed."""
    matmul = importlib.import_module("triton_kernels.matmul").matmul
    ragged = importlib.import_module("triton_kernels.tensor").make_ragged_tensor_metadata

    def experts(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights) -> torch.Tensor:
        return _ragged_experts(x_TH, routing, weights, matmul, ragged)

    def numerics(model: Format) -> Numerics:
        rows = (Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED)
        return Numerics(storage=dict.fromkeys(rows, model), reduce=model, activation=model)
    return Peer("triton_kernels", importlib.import_module("triton").__version__, experts, numerics)


def _ragged_experts(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights, matmul: Any,
                    ragged: Any) -> torch.Tensor:
    (num_tokens, top_k), num_experts = routing.ids_TK.shape, len(weights.w2_EHI)
    with part_range("align"):
        sorted_R, order_R = routing.ids_TK.flatten().sort(stable=True)
        experts_E = torch.arange(num_experts + 1, dtype=sorted_R.dtype, device=x_TH.device)
        sizes_E = torch.searchsorted(sorted_R, experts_E, out_int32=True).diff()
        rows = ragged(sizes_E, len(order_R))
    with part_range("gate_up"):
        gate_up = matmul(x_TH, weights.w13_EGIH.flatten(1, 2).transpose(1, 2), None, a_ragged_metadata=rows,
                         gather_indx=(order_R // top_k).int())
        gate_RI, up_RI = gate_up.chunk(2, dim=-1)
        act_RI = F.silu(gate_RI) * up_RI
    with part_range("down"):
        down_RH = matmul(act_RI, weights.w2_EHI.transpose(1, 2), None, a_ragged_metadata=rows,
                         scatter_indx=order_R.int(), gammas=routing.weights_TK.flatten()[order_R])
    with part_range("combine"):
        return down_RH.view(num_tokens, top_k, -1).sum(1)


PEERS = {"vllm": vllm, "triton_kernels": triton_kernels}
"""By the name that a command asks for; each makes the implementation or raises ImportError."""
