"""The layer token by token: a dense matrix of mixing weights, one hidden neuron after the other.

Where the oracle gathers the tokens of an expert and multiplies matrices, this walks over tokens and asks
for each how much of which expert it wants. Arrays are fp64 and go by the names of MoEWeights' fields.
"""

import math

import numpy as np

from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec
from tests.double.router import Choice, choose, dot, sigmoid

Arrays = dict[str, np.ndarray]


def route(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec,
          logits_TE: np.ndarray | None = None) -> list[Choice]:
    """One Choice per token; without a router everything goes to expert 0 with weight 1."""
    if spec.router is None:
        return [Choice([0], [1.0], math.inf) for _ in x_TH]
    bias = arrays["selection_bias_E"].tolist() if spec.router.selection_bias else None
    choices = []
    for t, x_H in enumerate(x_TH):
        logits = ([dot(x_H, row_H) for row_H in arrays["router_EH"]] if logits_TE is None
                  else [float(logit) for logit in logits_TE[t]])
        choices.append(choose(logits, bias, spec.router))
    return choices


def mixing_matrix(ids_TK: np.ndarray, weights_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """(T, E): how much of each expert a token gets; an id outside [0, E) adds nothing."""
    mixing_TE = np.zeros((len(ids_TK), num_experts))
    for (t, slot), e in np.ndenumerate(ids_TK):
        if 0 <= e < num_experts:
            mixing_TE[t, e] += weights_TK[t, slot]
    return mixing_TE


def activation(gate: float, mlp: MLP) -> float:
    """silu, gelu with math.erf, or gelu's tanh form."""
    if mlp.activation == "silu":
        return gate * sigmoid(gate)
    if mlp.activation == "gelu":
        return gate * (1.0 + math.erf(gate / math.sqrt(2.0))) / 2.0
    return gate * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate * gate * gate))) / 2.0


def mlp_of_token(x_H: np.ndarray, w13_GIH: np.ndarray, w2_HI: np.ndarray, mlp: MLP,
                 neurons: range) -> np.ndarray:
    """What the hidden neurons in `neurons` contribute to one token's output, (H,)."""
    hidden = [activation(dot(w13_GIH[0, i], x_H), mlp) * dot(w13_GIH[1, i], x_H) for i in neurons]
    return np.array([dot(row_I[neurons.start:neurons.stop], np.array(hidden)) for row_I in w2_HI])


def shared_gate(x_H: np.ndarray, arrays: Arrays, spec: MoESpec) -> float:
    """Factor of the shared expert for one token."""
    if spec.shared is not None and spec.shared.gate == "sigmoid":
        return sigmoid(dot(arrays["shared_gate_SH"][0], x_H))
    return 1.0


def partial_layer(x_TH: np.ndarray, mixing_TE: np.ndarray, arrays: Arrays, spec: MoESpec, parallel: Parallel,
                  rank: int) -> np.ndarray:
    """The share of one rank, (T, H): all tokens and experts, but only the hidden neurons it owns."""
    routed = range(*parallel.ranges(spec.intermediate_size)[rank])
    y_TH = np.zeros_like(x_TH)
    for t, x_H in enumerate(x_TH):
        for e in np.flatnonzero(mixing_TE[t]):
            expert_H = mlp_of_token(x_H, arrays["w13_EGIH"][e], arrays["w2_EHI"][e], spec.experts, routed)
            y_TH[t] += mixing_TE[t, e] * expert_H
        if spec.shared is not None:
            owned = range(*parallel.ranges(spec.shared.intermediate_size)[rank])
            w13_GIH, w2_HI = arrays["shared_w13_GIH"], arrays["shared_w2_HI"]
            shared_H = mlp_of_token(x_H, w13_GIH, w2_HI, spec.shared.mlp, owned)
            y_TH[t] += shared_gate(x_H, arrays, spec) * shared_H
    return y_TH


def layer(x_TH: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray, arrays: Arrays, spec: MoESpec,
          parallel: Parallel | None = None, residual_TH: np.ndarray | None = None) -> np.ndarray:
    """The whole layer from a given routing, (T, H): the ranks' shares, added up, and the residual once."""
    parallel = parallel or Parallel()
    mixing_TE = mixing_matrix(ids_TK, weights_TK, spec.num_experts)
    y_TH = np.zeros_like(x_TH) if residual_TH is None else residual_TH.copy()
    for rank in range(parallel.tp):
        y_TH += partial_layer(x_TH, mixing_TE, arrays, spec, parallel, rank)
    return y_TH


def moe(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, parallel: Parallel | None = None, *,
        logits_TE: np.ndarray | None = None, residual_TH: np.ndarray | None = None) -> np.ndarray:
    """Route, then the layer."""
    choices = route(x_TH, arrays, spec, logits_TE)
    ids_TK = np.array([choice.ids for choice in choices], dtype=int).reshape(-1, spec.top_k)
    weights_TK = np.array([choice.weights for choice in choices]).reshape(-1, spec.top_k)
    return layer(x_TH, ids_TK, weights_TK, arrays, spec, parallel, residual_TH)
