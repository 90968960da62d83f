"""The layer token by token and slot by slot, one hidden neuron after the other.

Where the oracle gathers the tokens of an expert and multiplies matrices, this walks over tokens and sends
each to its experts in turn. Arrays are fp64 and go by the names of MoEWeights' fields.
"""

import math

import numpy as np

from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec
from tests.double.router import Choice, choose, dot, sigmoid, softcap

Arrays = dict[str, np.ndarray]


def route(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec,
          logits_TE: np.ndarray | None = None) -> list[Choice]:
    """One Choice per token; without a router everything goes to expert 0 with weight 1."""
    gates_TS = [[dot(x_H, row_H) for row_H in arrays.get("shared_gate_SH", ())] for x_H in x_TH]
    sigmoids_TS = [[sigmoid(logit) for logit in row] for row in gates_TS]
    if spec.router is None:
        return [Choice([0], [0], [1.0], row) for row in sigmoids_TS]
    if logits_TE is None:
        bias_E = arrays.get("router_bias_E", np.zeros(spec.num_choices))
        columns = list(zip(arrays["router_EH"], bias_E.tolist(), strict=True))
        logits_TE = [[dot(x_H, row_H) + bias for row_H, bias in columns] for x_H in x_TH]
    shared_columns = spec.shared is not None and spec.shared.gate == "router"
    choices = choose([[float(logit) for logit in row] for row in logits_TE],
                     gates_TS if shared_columns else [[] for _ in x_TH],
                     _list(arrays.get("selection_bias_E")), _list(arrays.get("weight_scale_E")), spec.router)
    if shared_columns:
        return choices
    return [Choice(choice.selected, choice.ids, choice.weights, row)
            for choice, row in zip(choices, sigmoids_TS, strict=True)]


def _list(array: np.ndarray | None) -> list[float] | None:
    return None if array is None else array.tolist()


def activation(gate: float, mlp: MLP) -> float:
    """The activation of one neuron's gate, its limit and cap included."""
    if mlp.limit is not None and mlp.limit_at == "before":
        gate = min(gate, mlp.limit)
    if mlp.activation == "silu":
        value = softcap(gate, mlp.gate_softcap) * sigmoid(mlp.sigmoid_scale * gate)
    elif mlp.activation == "gelu":
        value = gate * (1.0 + math.erf(gate / math.sqrt(2.0))) / 2.0
    elif mlp.activation == "gelu_tanh":
        inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate * gate * gate)
        value = gate * (1.0 + math.tanh(inner)) / 2.0
    else:
        value = max(gate, 0.0) * (max(gate, 0.0) if mlp.activation == "relu_squared" else 1.0)
    if mlp.limit is not None and mlp.limit_at == "after":
        value = min(value, mlp.limit)
    return value


def neuron(x_H: np.ndarray, w13_GIH: np.ndarray, bias_GI: np.ndarray | None, mlp: MLP, i: int) -> float:
    """What hidden neuron i hands to w2."""
    gate, *rest = [dot(w13_GIH[g, i], x_H) + (0.0 if bias_GI is None else float(bias_GI[g, i]))
                   for g in range(len(w13_GIH))]
    hidden = activation(gate, mlp)
    for up in rest:
        if mlp.limit is not None:
            up = max(-mlp.limit, min(up, mlp.limit))
        hidden *= softcap(up, mlp.up_softcap) + mlp.up_offset
    return hidden


def mlp_of_token(x_H: np.ndarray, w13_GIH: np.ndarray, w2_HI: np.ndarray, bias_GI: np.ndarray | None, mlp: MLP,
                 neurons: range) -> np.ndarray:
    """What the hidden neurons in `neurons` contribute to one token's output, (H,); without the bias of w2."""
    hidden = np.array([neuron(x_H, w13_GIH, bias_GI, mlp, i) for i in neurons])
    return np.array([dot(row_I[neurons.start:neurons.stop], hidden) for row_I in w2_HI])


def routed_slot(x_H: np.ndarray, e: int, weight: float, arrays: Arrays, spec: MoESpec, neurons: range,
                first: bool) -> np.ndarray:
    """One slot's contribution on one rank; `first` is the rank that adds what is not cut."""
    if not 0 <= e < spec.num_choices:
        return np.zeros_like(x_H)
    if e >= spec.num_experts:
        return weight * x_H if first else np.zeros_like(x_H)
    bias_GI = arrays["w13_bias_EGI"][e] if spec.experts.bias else None
    token_H = weight * x_H if spec.weight_on == "input" else x_H
    y_H = mlp_of_token(token_H, arrays["w13_EGIH"][e], arrays["w2_EHI"][e], bias_GI, spec.experts, neurons)
    if spec.experts.bias and first:
        y_H = y_H + arrays["w2_bias_EH"][e]
    return y_H if spec.weight_on == "input" else weight * y_H


def shared_expert(x_H: np.ndarray, gates: list[float], arrays: Arrays, spec: MoESpec, owned: range,
                  first: bool) -> np.ndarray:
    """The shared expert's contribution on one rank; with gate "router" block by block."""
    shared = spec.shared
    w13_GIH, w2_HI = arrays["shared_w13_GIH"], arrays["shared_w2_HI"]
    bias_GI = arrays["shared_w13_bias_GI"] if shared.mlp.bias else None
    y_H, width = np.zeros_like(x_H), shared.intermediate_size // shared.num_experts
    for block in range(shared.num_experts):
        mine = range(max(owned.start, block * width), max(owned.start, min(owned.stop, (block + 1) * width)))
        block_H = mlp_of_token(x_H, w13_GIH, w2_HI, bias_GI, shared.mlp, mine) if len(mine) else np.zeros_like(x_H)
        y_H += block_H if shared.gate != "router" else gates[block] * block_H
    if shared.mlp.bias and first:
        y_H = y_H + arrays["shared_w2_bias_H"]
    return gates[0] * y_H if shared.gate == "sigmoid" else y_H


def partial_token(x_H: np.ndarray, choice: Choice, arrays: Arrays, spec: MoESpec, parallel: Parallel,
                  rank: int) -> np.ndarray:
    """The share of one rank of one token, (H,): all its experts, but only the hidden neurons the rank owns."""
    neurons = range(*parallel.ranges(spec.intermediate_size)[rank])
    y_H = np.zeros_like(x_H)
    for e, weight in zip(choice.ids, choice.weights, strict=True):
        y_H += routed_slot(x_H, e, weight, arrays, spec, neurons, rank == 0)
    if spec.shared is not None:
        owned = range(*parallel.ranges(spec.shared.intermediate_size)[rank])
        y_H += shared_expert(x_H, choice.shared, arrays, spec, owned, rank == 0)
        if spec.shared.merge == "mean":
            y_H /= 2.0
    return y_H + arrays["output_bias_H"] if spec.output_bias and rank == 0 else y_H


def layer(x_TH: np.ndarray, choices: list[Choice], arrays: Arrays, spec: MoESpec,
          parallel: Parallel | None = None, residual_TH: np.ndarray | None = None) -> np.ndarray:
    """The whole layer from a given routing, (T, H): the ranks' shares, added up, and the residual once."""
    parallel = parallel or Parallel()
    y_TH = np.zeros_like(x_TH) if residual_TH is None else residual_TH.copy()
    for t, choice in enumerate(choices):
        for rank in range(parallel.tp):
            y_TH[t] += partial_token(x_TH[t], choice, arrays, spec, parallel, rank)
    return y_TH


def moe(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, parallel: Parallel | None = None, *,
        logits_TE: np.ndarray | None = None, residual_TH: np.ndarray | None = None) -> np.ndarray:
    """Route, then the layer."""
    return layer(x_TH, route(x_TH, arrays, spec, logits_TE), arrays, spec, parallel, residual_TH)
