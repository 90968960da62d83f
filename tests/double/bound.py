"""How far two correct fp64 evaluations of the layer may lie apart, whatever their order of summation.

The activation is followed operation by operation (tests/double/rounded.py); everything after it is one sum of
products, for which the number of operations on the longest way and the sum of absolute values are enough. Two
evaluations may err in opposite directions, hence the factor 2 at the end.
"""

import math

import numpy as np

from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec, SharedExpert
from tests.double import routing_bound
from tests.double.layer import Arrays
from tests.double.rounded import OWN_ROUNDING, Rounded, contraction, exact, gamma
from tests.double.router import Choice

ERF_SLOPE = 1.13
"""Largest derivative of erf: 2 / sqrt(pi) = 1.1284 at 0."""

_erf = np.vectorize(math.erf, otypes=[float])


def layer_difference(x_TH: np.ndarray, choices: list[Choice], arrays: Arrays, spec: MoESpec, *,
                     parallel: Parallel | None = None, residual_TH: np.ndarray | None = None,
                     weights_TK: Rounded | None = None, gates_TS: Rounded | None = None) -> np.ndarray:
    """Largest difference of two correct results, (T, H).

    weights_TK and gates_TS: weights that the evaluations computed themselves; those of `choices` are exact
    otherwise. After the hidden neurons a term passes at most: a product with w2 and I sums, the weight, the shared
    gate, K + 1 slots and shared expert, the ranks, an exact halving, the output's bias, the residual; a bias of w2
    passes fewer.
    """
    ids_TK = np.array([choice.ids for choice in choices], dtype=int).reshape(-1, spec.top_k)
    if weights_TK is None:
        weights_TK = exact(np.array([choice.weights for choice in choices]).reshape(-1, spec.top_k))
    terms = _Terms(x_TH.shape)
    terms.factor = 0.5 if spec.shared is not None and spec.shared.merge == "mean" else 1.0
    _routed_terms(terms, x_TH, ids_TK, weights_TK, arrays, spec)
    widest = spec.intermediate_size
    if spec.shared is not None:
        if gates_TS is None:
            gates_TS = exact(np.array([choice.shared for choice in choices]).reshape(-1, spec.shared.num_gates)
                             if spec.shared.num_gates else np.zeros((len(x_TH), 0)))
        _shared_terms(terms, x_TH, gates_TS, arrays, spec.shared)
        widest = max(widest, spec.shared.intermediate_size)
    terms.factor = 1.0
    if spec.output_bias:
        terms.add(exact(arrays["output_bias_H"]))
    if residual_TH is not None:
        terms.add(exact(residual_TH))
    operations = widest + spec.top_k + (parallel.tp if parallel else 1) + 8
    return 2.0 * OWN_ROUNDING * (terms.carried_TH + gamma(operations) * terms.size_TH)


def whole_difference(x_TH: np.ndarray, choices: list[Choice], arrays: Arrays, spec: MoESpec, *,
                     parallel: Parallel | None = None, residual_TH: np.ndarray | None = None,
                     logits_TE: np.ndarray | None = None) -> np.ndarray:
    """The same with weights that both evaluations computed themselves, having made the same choices."""
    weights_TK, gates_TS = None, None
    if spec.shared is not None and spec.shared.gate == "sigmoid":
        gates_TS = routing_bound.sigmoid_gates(x_TH, arrays)
    if spec.router is not None:
        competition = routing_bound.compete(x_TH, arrays, spec, logits_TE)
        weights_TK, shared_TS = routing_bound.weights_bound(choices, competition, arrays, spec.router)
        gates_TS = gates_TS if shared_TS is None else shared_TS
    return layer_difference(x_TH, choices, arrays, spec, parallel=parallel, residual_TH=residual_TH,
                            weights_TK=weights_TK, gates_TS=gates_TS)


class _Terms:
    """Sum of the absolute values of a result's terms, and of the errors they carry, both (T, H)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.size_TH, self.carried_TH, self.factor = np.zeros(shape), np.zeros(shape), 1.0

    def add(self, term: Rounded) -> None:
        """A term that broadcasts to (T, H)."""
        self.size_TH = self.size_TH + self.factor * term.size
        self.carried_TH = self.carried_TH + self.factor * term.error

    def add_products(self, hidden_TI: Rounded, w2_THI: np.ndarray) -> None:
        """Hidden neurons, their weight included, through w2: one term each."""
        value_TH, error_TH = (np.einsum("ti,thi->th", part, np.abs(w2_THI))
                              for part in (np.abs(hidden_TI.value), hidden_TI.error))
        self.add(Rounded(value_TH, error_TH))


def _routed_terms(terms: _Terms, x_TH: np.ndarray, ids_TK: np.ndarray, weights_TK: Rounded, arrays: Arrays,
                  spec: MoESpec) -> None:
    """Slot by slot; an id outside [0, E + Z) adds nothing."""
    for k in range(ids_TK.shape[1]):
        ids_T, weight_T1 = ids_TK[:, k], weights_TK[:, k:k + 1]
        identity_T1 = ((ids_T >= spec.num_experts) & (ids_T < spec.num_choices)).astype(float)[:, None]
        routed_T1 = ((ids_T >= 0) & (ids_T < spec.num_experts)).astype(float)[:, None]
        e_T = np.where(routed_T1[:, 0] > 0.0, ids_T, 0)
        terms.add(weight_T1 * x_TH * identity_T1)
        on_input = spec.weight_on == "input"
        token_TH = weight_T1 * x_TH if on_input else exact(x_TH)
        bias_TGI = arrays["w13_bias_EGI"][e_T] if spec.experts.bias else None
        hidden_TI = _hidden(token_TH, arrays["w13_EGIH"][e_T], bias_TGI, spec.experts)
        terms.add_products((hidden_TI if on_input else weight_T1 * hidden_TI) * routed_T1, arrays["w2_EHI"][e_T])
        if spec.experts.bias:
            terms.add(weight_T1 * arrays["w2_bias_EH"][e_T] * routed_T1)


def _shared_terms(terms: _Terms, x_TH: np.ndarray, gates_TS: Rounded, arrays: Arrays,
                  shared: SharedExpert) -> None:
    """Every block of a router-gated shared expert by its own weight; a single gate covers all of it."""
    bias_GI = arrays["shared_w13_bias_GI"] if shared.mlp.bias else None
    per_token = [np.broadcast_to(arrays[name], (len(x_TH), *arrays[name].shape))
                 for name in ("shared_w13_GIH", "shared_w2_HI")]
    hidden_TI = _hidden(exact(x_TH), per_token[0], bias_GI, shared.mlp)
    if shared.num_gates:
        owner_I = np.arange(shared.intermediate_size) // (shared.intermediate_size // shared.num_experts)
        hidden_TI = gates_TS[:, owner_I] * hidden_TI
    terms.add_products(hidden_TI, per_token[1])
    if shared.mlp.bias:
        bias_H = exact(arrays["shared_w2_bias_H"])
        terms.add(gates_TS * bias_H if shared.num_gates else bias_H)


def _hidden(x_TH: Rounded, w13_TGIH: np.ndarray, bias_GI: np.ndarray | None, mlp: MLP) -> Rounded:
    """activation(gate) * up, (T, I), operation by operation; a projection is a sum of H products and a bias."""
    projected_TGI = contraction("th,tgih->tgi", x_TH, w13_TGIH, x_TH.value.shape[1])
    projected_TGI = projected_TGI if bias_GI is None else projected_TGI + bias_GI
    act_TI = _activation(projected_TGI[:, 0], mlp)
    if not mlp.gated:
        return act_TI
    up_TI = projected_TGI[:, 1]
    if mlp.limit is not None:
        up_TI = up_TI.clamp(-mlp.limit, mlp.limit)
    if mlp.up_softcap:
        up_TI = _softcap(up_TI, mlp.up_softcap)
    return act_TI * (up_TI + mlp.up_offset if mlp.up_offset else up_TI)


def _activation(gate: Rounded, mlp: MLP) -> Rounded:
    """g / (1 + e^-g), which torch computes for silu, has one operation fewer than g * sigmoid(g)."""
    if mlp.limit is not None and mlp.limit_at == "before":
        gate = gate.clamp(-np.inf, mlp.limit)
    if mlp.activation == "silu":
        factor = _softcap(gate, mlp.gate_softcap) if mlp.gate_softcap else gate
        result = factor * routing_bound.sigmoid(gate * mlp.sigmoid_scale)
    elif mlp.activation == "gelu":
        result = gate * ((gate / math.sqrt(2.0)).function(_erf, ERF_SLOPE) + 1.0) * 0.5
    elif mlp.activation == "gelu_tanh":
        inner = (gate + gate * gate * gate * 0.044715) * math.sqrt(2.0 / math.pi)
        result = gate * (inner.function(np.tanh, 1.0) + 1.0) * 0.5
    else:
        result = gate.clamp(0.0, np.inf)
        result = result * result if mlp.activation == "relu_squared" else result
    return result.clamp(-np.inf, mlp.limit) if mlp.limit is not None and mlp.limit_at == "after" else result


def _softcap(value: Rounded, cap: float) -> Rounded:
    return (value / cap).function(np.tanh, 1.0) * cap
