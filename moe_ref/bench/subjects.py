"""Who is timed: torch's two layers, peers that are installed, and implementations as `moe-ref verify` finds them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from moe_ref.bench.peers import PEERS
from moe_ref.bench.problem import Batch, Operation, RankLayer
from moe_ref.bench.torch_layers import grouped, loop
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.routing import Routing
from moe_ref.contract.vocabulary import Direction
from moe_ref.contract.weights import MoEWeights
from moe_ref.verify.run.subjects import load_subject

TORCH = {"torch:loop": loop, "torch:grouped": grouped}


@dataclass(frozen=True)
class Subject:
    """implementation: what holds `moe` and `CAPABILITIES`; None where `missing` says why there is none."""

    name: str
    implementation: ModuleType | Any = None
    missing: str = ""

    @property
    def capabilities(self) -> Capabilities:
        """What it declares of itself."""
        return self.implementation.CAPABILITIES

    def refusal(self, layer: RankLayer, operation: Operation, device: str) -> str:
        """Why it is not timed on this, or ""."""
        if self.missing:
            return self.missing
        declared = self.capabilities
        refused = [
            (layer.dtype not in declared.numerics, f"dtype {layer.dtype}"),
            (device not in declared.devices, f"device {device}"),
            (operation is not Operation.LAYER and not declared.injected_routing, "an injected routing"),
            (operation is Operation.BACKWARD and Direction.BACKWARD not in declared.directions, "direction bwd"),
            (operation is Operation.LAYER and self.name in PEERS, "its own router, which is not compared"),
        ]
        reasons = [words for refuses, words in refused if refuses] + declared.refused_mathematics(layer.spec)
        return f"not declared: {', '.join(reasons)}" if reasons else ""

    def numerics(self, layer: RankLayer) -> Numerics:
        """How it says that it rounds."""
        return self.capabilities.numerics[layer.dtype]

    def call(self, operation: Operation, layer: RankLayer, weights: MoEWeights, batch: Batch) -> Callable[[], Any]:
        """What is timed; it returns the output, or the gradients by name."""
        if operation is Operation.BACKWARD:
            return _backward_call(self.implementation.moe, layer, weights, batch)
        given = {} if operation is Operation.LAYER else {"routing": batch.routing}

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return self.implementation.moe(batch.x_TH, weights, layer.spec, **given)
        return forward


def find_subject(name: str) -> Subject:
    """The subject of that name; a peer that is not installed has `missing`. UsageValueError on other unknown names."""
    if name in TORCH:
        return Subject(name, TORCH[name])
    if name not in PEERS:
        return Subject(name, load_subject(name))
    try:
        return Subject(name, PEERS[name]())
    except ImportError as error:
        return Subject(name, missing=f"not installed: {str(error).partition(chr(10))[0]}")
    except (AttributeError, RuntimeError) as error:
        return Subject(name, missing=f"installed in another version: {str(error).partition(chr(10))[0]}")


_OF_EXPERTS = ("w13_EGIH", "w2_EHI", "w13_bias_EGI", "w2_bias_EH", "shared_w13_GIH", "shared_w2_HI",
               "shared_w13_bias_GI", "shared_w2_bias_H")


def _backward_call(moe: Any, layer: RankLayer, weights: MoEWeights,
                   batch: Batch) -> Callable[[], dict[str, torch.Tensor]]:
    """The backward pass alone; the forward pass is run here, once, on the stream of whoever calls."""
    leaves = {"x_TH": batch.x_TH, "weights_TK": batch.routing.weights_TK,
              **{name: tensor for name, tensor in weights.named_tensors() if name in _OF_EXPERTS}}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    held = MoEWeights(**{name: leaves.get(name, tensor) for name, tensor in weights.named_tensors()})
    routing = Routing(batch.routing.ids_TK, leaves["weights_TK"], shared_TS=batch.routing.shared_TS)
    with torch.enable_grad():
        y_TH = moe(leaves["x_TH"], held, layer.spec, routing=routing)

    def backward() -> dict[str, torch.Tensor]:
        # In this thread, so that a profiler sees what belongs to the call.
        with torch.autograd.set_multithreading_enabled(False):
            found = torch.autograd.grad(y_TH, list(leaves.values()), batch.grad_TH, retain_graph=True)
        return dict(zip(leaves, found, strict=True))
    return backward
