"""How far two right fp64 evaluations of a layer's gradients may be apart: a majorant's gradient times roundings.

The majorant is the layer with absolute values for all inputs and, for each nonlinear function f, a polynomial F
with positive coefficients and F'(abs(g)) >= abs(f'(g)) + abs(f''(g) g): the first term carries what is summed, the
second the error of f' where its argument is off. Its gradient is then, element by element, at least the sum of the
absolute values of all terms that the gradient sums, times what their factors lose (Higham 2002, section 3.1). To
first order an evaluation errs by at most n 2^-53 times that, n being the roundings along a path: every sum of the
layer at most eight times forward and backward, and under 128 for the elementwise functions, some 30 of at most
4 ulp each.
"""

from dataclasses import fields

import torch

import moe_ref
from moe_ref import MLP, ExpertWeights, MoESpec, MoEWeights, Routing
from moe_ref.contract.gradients import Gradients
from moe_ref.oracle.expert import gate_up
from tests.backward_cases import Inputs

Named = dict[str, torch.Tensor | None]
"""Gradients by field of moe_ref.contract.gradients.Gradients."""


def named(gradients: Gradients) -> Named:
    """The fields of a result, by name."""
    return {field.name: getattr(gradients, field.name) for field in fields(gradients)}


def num_roundings(spec: MoESpec, num_tokens: int) -> int:
    """n of the module's docstring."""
    shared = spec.shared.intermediate_size + spec.shared.num_gates if spec.shared else 0
    sums = spec.hidden_size + spec.intermediate_size + shared + spec.num_choices + spec.top_k
    return 8 * (sums + num_tokens * spec.top_k) + 128


def act_majorant(gate: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """F for every activation: 2 (g + g^2), and g^4 / 8 for the cube inside gelu_tanh, whose rounding counts."""
    return 2 * (gate + gate**2) + (gate**4 / 8 if mlp.activation == "gelu_tanh" else 0.0)


def weight_majorant(value: torch.Tensor, logits: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """A routing weight w with value w (1 + 5 m) and slope w (5 + 10 m) scale per logit, m = scale * largest logit.

    Per unit of logit: the slopes of log w over all logits add up to at most 2 in absolute value (own score and
    divisor), which bounds what w loses to errors of logits; a row of second derivatives of w to at most w times
    4 + 3 + 1.54 (slope squared, curvature, a softcap of at least 1), which bounds what its slope loses.
    """
    largest = scale * logits.detach().amax(-1, keepdim=True)
    moved = scale * (logits - logits.detach()).sum(-1, keepdim=True)  # 0; it is there for its slope
    return value.detach().abs() * (1 + 5 * largest + (5 + 10 * largest) * moved)


def bounds(inputs: Inputs, spec: MoESpec, routing: Routing, logits_TE: torch.Tensor | None = None,
           injected: bool = False) -> Named:
    """Bound on the difference of two evaluations, for every gradient; of the whole layer, unsharded.

    routing is what the layer uses; injected: it is an input itself; logits_TE: injected logits.
    """
    leaves, total = _majorant(inputs, spec, routing, logits_TE, injected)
    total.backward()
    factor = 2 * num_roundings(spec, len(inputs.x_TH)) * 2**-53
    return {name: None if leaf.grad is None else factor * leaf.grad for name, leaf in leaves.items()}


def value_bound(inputs: Inputs, spec: MoESpec, routing: Routing) -> float:
    """Bound on the error of one evaluation of sum(grad_y * moe(...))."""
    _, total = _majorant(inputs, spec, routing, None, False)
    return float(total.detach()) * num_roundings(spec, len(inputs.x_TH)) * 2**-53


def _majorant(inputs: Inputs, spec: MoESpec, routing: Routing, logits_TE: torch.Tensor | None,
              injected: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs by name and the majorant of sum(grad_y * moe(...)) as a function of them."""
    leaves = {name: _leaf(tensor) for name, tensor in inputs.weights.named_tensors()}
    leaves |= {"x_TH": _leaf(inputs.x_TH), "residual_TH": _leaf(inputs.residual_TH)}
    if logits_TE is not None:
        leaves["logits_TE"] = _leaf(logits_TE)
    weights = MoEWeights(**{name: leaves[name] for name, _ in inputs.weights.named_tensors()})
    if injected:
        weights_TK, leaves["weights_TK"] = [_leaf(routing.weights_TK)] * 2
        shared_TS = None if routing.shared_TS is None else _leaf(routing.shared_TS)
        leaves |= {} if shared_TS is None else {"shared_TS": shared_TS}
    else:
        weights_TK, shared_TS = _routing(leaves, weights, inputs.weights, spec, routing)
    y_TH = _experts(leaves["x_TH"], weights, spec, routing.ids_TK, weights_TK)
    y_TH = y_TH + _shared(leaves["x_TH"], weights, spec, shared_TS) + leaves["residual_TH"]
    if weights.output_bias_H is not None:
        y_TH = y_TH + weights.output_bias_H
    return leaves, (y_TH * inputs.grad_y_TH.double().abs()).sum()


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().abs().requires_grad_()


def _routing(leaves: dict[str, torch.Tensor], majorant: MoEWeights, weights: MoEWeights, spec: MoESpec,
             routing: Routing) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Majorants of routing weights and shared gates as functions of tokens, router and scales."""
    x_TH, weights_TK, shared_TS, router = leaves["x_TH"], routing.weights_TK, routing.shared_TS, spec.router
    gates_TS = None if majorant.shared_gate_SH is None else x_TH @ majorant.shared_gate_SH.T
    if spec.shared is not None and spec.shared.gate == "sigmoid":
        assert shared_TS is not None
        assert gates_TS is not None
        shared_TS = weight_majorant(shared_TS, gates_TS)
    if router is None:
        return weights_TK, shared_TS
    logits_TE = leaves.get("logits_TE")
    if logits_TE is None:
        assert majorant.router_EH is not None
        logits_TE = x_TH @ majorant.router_EH.T
        logits_TE = logits_TE if majorant.router_bias_E is None else logits_TE + majorant.router_bias_E
    columns = spec.shared is not None and spec.shared.gate == "router" and gates_TS is not None
    all_TN = torch.cat([logits_TE, gates_TS], 1) if columns else logits_TE
    weights_TK = weight_majorant(weights_TK, all_TN, router.logit_scale)
    if columns:
        shared_TS = weight_majorant(shared_TS, all_TN, router.logit_scale)
    if majorant.weight_scale_E is not None:
        relative_E = majorant.weight_scale_E / weights.weight_scale_E.double().abs()
        weights_TK = weights_TK * (relative_E if router.learned_scale == "layer" else relative_E[routing.ids_TK])
        shared_TS = shared_TS * relative_E if columns and router.learned_scale == "layer" else shared_TS
    return weights_TK, shared_TS


def _experts(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, ids_TK: torch.Tensor,
             weights_TK: torch.Tensor) -> torch.Tensor:
    """Majorant of the routed sum."""
    y_TH = torch.zeros_like(x_TH)
    for e in range(spec.num_choices):
        token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
        w_R1, x_RH = weights_TK[token_R, slot_R, None], x_TH[token_R]
        if e >= spec.num_experts:
            rows_RH = w_R1 * x_RH
        elif spec.weight_on == "input":
            rows_RH = _mlp(w_R1 * x_RH, weights.expert(e), spec.experts)
        else:
            rows_RH = w_R1 * _mlp(x_RH, weights.expert(e), spec.experts)
        y_TH = y_TH.index_add(0, token_R, rows_RH)
    return y_TH


def _shared(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec,
            shared_TS: torch.Tensor | None) -> torch.Tensor:
    """Majorant of the shared expert, its mean counted as a sum."""
    expert = weights.shared_expert()
    if spec.shared is None or expert is None:
        return torch.zeros_like(x_TH)
    if spec.shared.gate == "router":
        assert shared_TS is not None
        factor_TI = shared_TS.repeat_interleave(spec.shared.intermediate_size // spec.shared.num_experts, dim=1)
        return _mlp(x_TH, expert, spec.shared.mlp, factor_TI)
    rows_TH = _mlp(x_TH, expert, spec.shared.mlp)
    return rows_TH if shared_TS is None else rows_TH * shared_TS


def _mlp(x_RH: torch.Tensor, expert: ExpertWeights, mlp: MLP,
         factor_RI: torch.Tensor | None = None) -> torch.Tensor:
    """Majorant of one expert; clamps change nothing, a softcap of up has F = u + u^2 / (2 cap)."""
    gate_up_RGI = gate_up(x_RH, expert.w13_GIH, expert.w13_bias_GI)
    act_RI = act_majorant(gate_up_RGI[:, 0], mlp)
    if mlp.gated:
        up_RI = gate_up_RGI[:, 1]
        up_RI = up_RI + up_RI**2 / (2 * mlp.up_softcap) if mlp.up_softcap else up_RI
        act_RI = act_RI * (up_RI + abs(mlp.up_offset))
    rows_RH = (act_RI if factor_RI is None else act_RI * factor_RI) @ expert.w2_HI.T
    return rows_RH if expert.w2_bias_H is None else rows_RH + expert.w2_bias_H


def excess(one: Named, other: Named, allowed: Named) -> dict[str, float]:
    """Largest difference over its bound, by field; infinite where one has a gradient and the other has not."""
    result = {}
    for name, bound in allowed.items():
        first, second = one.get(name), other.get(name)
        if first is None or second is None or bound is None:
            nothing = all(tensor is None or not tensor.any() for tensor in (first, second))
            result[name] = 0.0 if nothing else float("inf")
            continue
        off = (first - second).abs()
        ratio = torch.where(off == 0, 0.0, off / bound)  # a bound of 0 allows nothing but equality
        result[name] = float(ratio.nan_to_num(nan=float("inf")).max()) if ratio.numel() else 0.0
    return result


def shard(allowed: Named, spec: MoESpec, parallel: moe_ref.Parallel, rank: int) -> Named:
    """Bounds of this rank's part of every parameter; all else is complete on every rank."""
    parameters = {field.name for field in fields(MoEWeights)}
    present = {name: tensor for name, tensor in allowed.items() if name in parameters and tensor is not None}
    return allowed | dict(MoEWeights(**present).shard(parallel, rank).named_tensors())
