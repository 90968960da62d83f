"""Layers whose gradients are checked, one per family or feature, small, and how their inputs are drawn."""

from dataclasses import dataclass
from typing import get_args

import torch

import moe_ref
from moe_ref import MLP, Capacity, MoESpec, MoEWeights, Router, SharedExpert
from moe_ref.contract.spec import Activation
from moe_ref.contract.weights import parameter_shapes
from moe_ref.oracle.expert import activation, gate_up

SIGMOID = Router(num_experts=6, top_k=3, score="sigmoid", renormalize=True, renormalize_epsilon=0.125)
SOFTMAX = Router(num_experts=6, top_k=3)
SHARED = SharedExpert(intermediate_size=8)


def layer(router: Router | None = SOFTMAX, **options: object) -> MoESpec:
    """A layer of width 5 with experts of width 7: over three ranks every share is another one."""
    return MoESpec(hidden_size=5, intermediate_size=7, router=router, **options)  # type: ignore[arg-type]


def router(base: Router = SIGMOID, **options: object) -> MoESpec:
    """The layer with options of its router changed."""
    return layer(Router(**(vars(base) | options)))  # type: ignore[arg-type]


CASES = {
    "dense": layer(None),
    "dense, gated shared": layer(None, shared=SharedExpert(intermediate_size=8, gate="sigmoid")),
    "softmax": layer(),
    "softmax, renormalised": router(SOFTMAX, renormalize=True),
    "sigmoid": router(),
    "sigmoid, not renormalised": router(renormalize=False, renormalize_epsilon=0.0),
    "sqrt softplus": router(score="sqrt_softplus", scaling_factor=2.5),
    "epsilon clamp": router(renormalize_epsilon=1.5, epsilon_rule="clamp"),
    "logit bias": router(SOFTMAX, logit_bias=True, renormalize=True),
    "logit scale and softcap": router(logit_scale=1.5, logit_softcap=1.25),
    "selection bias": router(selection_bias="score", scaling_factor=2.5),
    "selection bias on logits": router(SOFTMAX, selection_bias="logit"),
    "groups": router(num_groups=3, num_groups_kept=2, group_score="top2_sum", selection_bias="score"),
    "groups filled with 0": router(SOFTMAX, num_groups=3, num_groups_kept=1, group_fill="zero"),
    "learned scale": router(learned_scale="layer"),
    "learned scale per expert": router(learned_scale="expert"),
    "identity experts": router(SOFTMAX, num_zero_experts=3, scaling_factor=2.0),
    "capacity by token": router(SOFTMAX, capacity=Capacity(factor=0.75, priority="token")),
    "capacity by choice": router(capacity=Capacity(tokens=2, priority="choice")),
    "capacity by weight": router(learned_scale="expert",
                                 capacity=Capacity(tokens=2, priority="weight", renormalize_after=True)),
    "capacity per sequence": router(learned_scale="layer",
                                    capacity=Capacity(tokens=2, sequence_length=4, renormalize_after=True)),
    "weight on input": layer(SIGMOID, weight_on="input", shared=SHARED),
    "shared": layer(shared=SHARED, experts=MLP(limit=0.75)),
    "gated shared": layer(shared=SharedExpert(intermediate_size=8, gate="sigmoid", mlp=MLP(bias=True))),
    "shared mean": layer(shared=SharedExpert(intermediate_size=8, merge="mean"), output_bias=True),
    "shared weighted by router": layer(
        Router(**(vars(SIGMOID) | {"learned_scale": "layer", "scaling_factor": 2.5})),
        shared=SharedExpert(intermediate_size=8, gate="router", num_experts=2, mlp=MLP(gate_softcap=1.5))),
    "shared weighted by router, capacity": layer(
        Router(**(vars(SIGMOID) | {"capacity": Capacity(tokens=1)})),
        shared=SharedExpert(intermediate_size=8, gate="router", num_experts=4)),
    "gpt-oss": layer(Router(num_experts=6, top_k=3, logit_bias=True, renormalize=True),
                     experts=MLP(bias=True, limit=0.75, sigmoid_scale=1.702, up_offset=1.0)),
    "limit after": layer(experts=MLP(limit=0.5, limit_at="after")),
    "softcaps": layer(experts=MLP(gate_softcap=1.25, up_softcap=1.5, sigmoid_scale=1.25, up_offset=0.5)),
    "output bias": layer(output_bias=True),
} | {f"{activation}{'' if gated else ', not gated'}": layer(
        experts=MLP(activation=activation, gated=gated, bias=not gated,
                    limit=None if activation == "silu" else 0.5))
     for activation in get_args(Activation) for gated in (True, False)}


@dataclass(frozen=True)
class Inputs:
    """Tokens, parameters, gradient of the output and residual; selection and learned scale as a model has them."""

    x_TH: torch.Tensor
    weights: MoEWeights
    grad_y_TH: torch.Tensor
    residual_TH: torch.Tensor


def draw(spec: MoESpec, seed: int = 0, num_tokens: int = 6, dtype: torch.dtype = torch.float64) -> Inputs:
    """Uniform numbers in (-1, 1) on the grid of `dtype`; learned scales around 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1).to(dtype)

    tensors = {name: uniform(*shape) for name, shape in parameter_shapes(spec).items()}
    if "weight_scale_E" in tensors:
        tensors["weight_scale_E"] = 1 + tensors["weight_scale_E"] / 2
    shape = (num_tokens, spec.hidden_size)
    return Inputs(uniform(*shape), MoEWeights(**tensors), uniform(*shape), uniform(*shape))


def decisions(inputs: Inputs, spec: MoESpec) -> list[torch.Tensor]:
    """What of a layer is piecewise constant: ids, drops, and on which side of each kink a value is."""
    routing, trace = moe_ref.route(inputs.x_TH, inputs.weights, spec), moe_ref.Trace()
    moe_ref.experts(inputs.x_TH, routing, inputs.weights, spec, trace=trace)
    sides = [routing.ids_TK]
    if spec.router is not None and spec.router.epsilon_rule == "clamp":
        sides.append(routing.weights_TK.sum(-1) < spec.router.scaling_factor * (1 - 2**-40))
    sides += _sides(trace.tensors[moe_ref.Stage.GATE_UP], spec.experts)
    shared = inputs.weights.shared_expert()
    if spec.shared is not None and shared is not None:
        sides += _sides(gate_up(inputs.x_TH, shared.w13_GIH, shared.w13_bias_GI), spec.shared.mlp)
    return sides


def _sides(gate_up_RGI: torch.Tensor, mlp: MLP) -> list[torch.Tensor]:
    gate_RI, sides = gate_up_RGI[:, 0], []
    if mlp.activation.startswith("relu"):
        sides.append(gate_RI > 0)
    if mlp.limit is not None:
        sides.append((gate_RI if mlp.limit_at == "before" else activation(gate_RI, mlp)) > mlp.limit)
        sides.append(gate_up_RGI[:, 1:].abs() > mlp.limit)
    return sides
