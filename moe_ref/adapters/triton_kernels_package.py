"""OpenAI's triton_kernels as vLLM brings it along, in vllm/third_party (seen: vllm 0.33.0).

PyPI's triton-kernels is another package. It is imported without vLLM, and its torch functions are lent a torch that
knows a CPU: matmul_ogs_torch writes `device="cuda"` out, and routing_torch asks for a histogram of integers, which
torch has on a GPU alone.
"""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from moe_ref.adapters.experts_layer import ExpertsCall
from moe_ref.adapters.interpreted import target_without_device
from moe_ref.contract.errors import UsageValueError, raise_faults


class _TorchOnCpu(ModuleType):
    """torch, but for the two functions above."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def arange(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """On the CPU, whatever device is named."""
        return torch.arange(*args, **kwargs)

    @staticmethod
    def histc(values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Of the same integers as floats."""
        return torch.histc(values.float(), **kwargs)


def package() -> SimpleNamespace:
    """Its modules `routing`, `matmul_ogs` and `swiglu`; raises UsageValueError where vLLM has no such folder."""
    found = importlib.util.find_spec("vllm")
    folders = found.submodule_search_locations or () if found else ()
    third_party = [str(Path(folder) / "third_party") for folder in folders]
    if not any((Path(folder) / "triton_kernels" / "matmul_ogs.py").exists() for folder in third_party):
        raise UsageValueError("vllm: no third_party/triton_kernels/matmul_ogs.py, but it should bring it along")
    sys.path[:0] = third_party
    try:
        with target_without_device():
            names = ("routing", "matmul_ogs", "swiglu")
            modules = {name: importlib.import_module(f"triton_kernels.{name}") for name in names}
    finally:
        del sys.path[:len(third_party)]
    if not torch.cuda.is_available():
        for module in (modules["routing"], modules["matmul_ogs"]):
            vars(module)["torch"] = _TorchOnCpu("torch")
    return SimpleNamespace(**modules)


def routed(routing: Any, call: ExpertsCall) -> tuple[Any, Any, Any]:
    """RoutingData, gather and scatter indices by `routing_torch` for given ids, with the given weights."""
    num_tokens, top_k = call.ids_TK.shape
    logits_TE = torch.zeros(num_tokens, call.spec.num_experts, device=call.x_TH.device)
    with target_without_device():
        data, gather, scatter = routing.routing_torch(logits_TE, top_k, expt_indx=call.ids_TK)
    return replace(data, gate_scal=call.weights_TK.flatten()[gather.src_indx.long()]), gather, scatter


def interleaved(call: ExpertsCall) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """w13 (E, H, 2 I) and its bias, gate and up in turn, and whether swiglu is the activation.

    Raises UsageValueError for a spec that is neither theirs, up + 1, nor plain silu.
    """
    mlp, weights = call.spec.experts, call.weights
    plain = (mlp.limit, mlp.sigmoid_scale, mlp.up_offset) == (None, 1.0, 0.0)
    raise_faults("triton_kernels", [] if plain or (mlp.up_offset == 1.0 and mlp.limit_at == "before") else [
        f"up_offset={mlp.up_offset}, limit_at={mlp.limit_at}, but swiglu should have 1.0 and before"])
    bias_EGI = weights.w13_bias_EGI
    bias_EN = None if bias_EGI is None else bias_EGI.transpose(1, 2).flatten(1, 2).float()
    return weights.w13_EGIH.transpose(1, 2).flatten(1, 2).transpose(1, 2), bias_EN, not plain
