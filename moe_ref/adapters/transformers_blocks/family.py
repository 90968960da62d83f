"""What an adapter knows of one block of transformers: how it is configured, how it rounds, what it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.features import Feature
from moe_ref.contract.spec import MLP, Activation, MoESpec
from moe_ref.contract.vocabulary import Direction, Dtype, Format, Ranks, Stage

Backend = Literal["eager", "grouped_mm", "batched_mm"]
Experts = Literal["stacked", "ungated", "transposed", "interleaved"]
At = Literal["model", "fp32"]
Options = Callable[[MoESpec, int], dict[str, Any]]
"""Options of a configuration class, for a spec and a rank's share of its intermediate size."""

ACTIVATIONS: dict[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh",
                                      "relu": "relu", "relu_squared": "relu2"}
"""Our words and transformers' for the same functions."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    module, config, block: transformers.models.<module>, its configuration and the class that runs
    options:      of the configuration
    wanted:       the spec as the block computes it; what differs from the one that is asked for is refused
    experts:      how gate and up are stored: "stacked" (E, 2I, H), "ungated" up alone, "transposed" (E, H, 2I),
                  "interleaved" the same with gate and up in turns, and biases
    gate, shared: names of the router and of the shared expert; shared_gate: of what multiplies the shared expert
    logits, weights: the dtype of the router's logits, and of the weights that it hands over
    one_sum:      the experts' weighted rows are added up and stored once, with nothing in between, by these backends
    """

    module: str
    config: str
    block: str
    options: Options
    wanted: Callable[[MoESpec], MoESpec]
    experts: Experts = "stacked"
    gate: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None
    logits: At = "model"
    weights: At = "model"
    one_sum: tuple[Backend, ...] = ()
    backends: tuple[Backend, ...] = ("eager", "grouped_mm", "batched_mm")
    scores: tuple[str, ...] = ("softmax",)
    activations: tuple[str, ...] = ("silu",)
    features: tuple[Feature, ...] = ()
    needs: tuple[str, ...] = ()
    injected_routing: bool = True

    def numerics(self, dtype: Dtype, backend: Backend) -> Numerics:
        """Torch rounds what every operation returns; a router in fp32 has its tokens and weights converted first."""
        model = Format(dtype.value)
        rows = (Stage.PERMUTE, Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED)
        router = {Stage.LOGITS: self.logits, Stage.WEIGHTS: self.weights}
        storage = {stage: model if at == "model" else Format.FP32 for stage, at in router.items()}
        return Numerics(storage=storage | dict.fromkeys(rows, model), activation=model, reduce=model,
                        weight_at="merge", merge=None if backend in self.one_sum else model)

    def capabilities(self, name: str, version: str, backend: Backend) -> Capabilities:
        """Its part of what an implementation declares whose ranks' blocks are of their share of the columns."""
        return Capabilities(name=name, version=version, stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.MERGED),
                            numerics={dtype: self.numerics(dtype, backend) for dtype in Dtype}, max_tp=64,
                            ranks=(Ranks.LOCAL, Ranks.GLOO), scores=self.scores, activations=self.activations,
                            features=(Feature.RESIDUAL, *self.features), needs=self.needs, directions=tuple(Direction),
                            injected_routing=self.injected_routing, collectives_through_groups=True)

    def rounded(self, at: At, model: torch.dtype) -> torch.dtype:
        """The dtype of a place that is in the model's or in fp32."""
        return model if at == "model" else torch.float32


def hidden_act(mlp: MLP) -> str:
    """The name of its activation in transformers."""
    return ACTIVATIONS[mlp.activation]
