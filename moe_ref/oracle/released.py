"""The layer as released code computes it: every step in fp64, rounded where that code rounds.

It differs from the code it follows by the order of long sums and the last bit of exp, tanh and erf, so by a few
units in the last place; an expert choice that rests on rounded scores is the same up to exact ties.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_ref.contract.checks import check_router, check_routing, check_tokens
from moe_ref.contract.released import At, ReleasedNumerics
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP, MoESpec, Router
from moe_ref.contract.weights import ExpertWeights, WeightSource, check_weights
from moe_ref.oracle.capacity import kept_slots
from moe_ref.oracle.expert import softcap
from moe_ref.oracle.router import router_logits, top_ids

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Round = Callable[[torch.Tensor], torch.Tensor]


def moe_as_released(x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, released: ReleasedNumerics, *,
                    routing: Routing | None = None) -> torch.Tensor:
    """The whole layer with the rounding points of `released`, (T, H) in the dtype of x_TH; unsharded weights.

    Experts are added in the order of their ids. Raises UsageValueError / UsageTypeError on wrong shapes or dtypes.
    """
    check_tokens(x_TH, spec, DTYPES, "moe_as_released")
    check_weights(weights, spec, None, 0)
    if routing is None:
        routing = route_as_released(x_TH, weights, spec, released)
    check_routing(routing, spec, len(x_TH), "metadata")
    at_model, at_merge = to_dtype(x_TH.dtype), to_dtype(_dtype(released.merge, x_TH))
    product = to_dtype(torch.promote_types(_dtype(released.rows, x_TH), routing.weights_TK.dtype))
    y_TH = torch.zeros_like(x_TH, dtype=torch.float64)
    for e in range(spec.num_choices):
        token_R, slot_R = (routing.ids_TK == e).nonzero(as_tuple=True)
        if len(token_R) == 0:
            continue
        x_RH, w_R1 = x_TH[token_R].double(), routing.weights_TK[token_R, slot_R, None].double()
        if e >= spec.num_experts:
            row_RH = product(x_RH * w_R1)
        else:
            row_RH = _expert_rows(x_RH, w_R1, weights.expert(e), spec, released, x_TH.dtype, product)
        y_TH.index_put_((token_R,), at_merge(y_TH[token_R] + at_merge(row_RH)))
    y_TH = at_model(y_TH)
    if released.scale_on == "output" and spec.router is not None:
        y_TH = at_model(y_TH * spec.router.scaling_factor)
    y_TH = _add_shared(y_TH, x_TH, routing, weights, spec, released)
    if weights.output_bias_H is not None:
        y_TH = at_model(y_TH + weights.output_bias_H.double())
    return y_TH.to(x_TH.dtype)


def route_as_released(x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, released: ReleasedNumerics, *,
                      logits_TE: torch.Tensor | None = None) -> Routing:
    """Ids, weights and shared gates with the rounding points of `released`, in the dtypes that they have there.

    With scale_on "output" the scaling factor is not in the weights. logits_TE replaces x @ router^T + bias.
    """
    check_router(weights, spec)
    router = spec.router
    if router is None:
        ids_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64, device=x_TH.device)
        weights_TK = torch.ones_like(ids_TK, dtype=x_TH.dtype)
        return Routing(ids_TK, weights_TK, shared_TS=_sigmoid_gate(x_TH, weights, spec))
    at_score = to_dtype(_dtype(released.score, x_TH))
    logits_TE, score_TE, selection_TE = scores_as_released(x_TH, weights, router, released, logits_TE=logits_TE)
    ids_TK = top_ids(selection_TE, router.top_k)
    score_TK = score_TE.gather(1, ids_TK)
    if released.score_after_selection:
        score_TK = _score(score_TK, router, at_score)
    shared_TS = None
    if spec.shared is not None and spec.shared.gate == "router":
        assert weights.shared_gate_SH is not None
        at_logits = to_dtype(_dtype(released.logits, x_TH))
        shared_TS = _score(at_logits(x_TH.double() @ weights.shared_gate_SH.double().T), router, at_score)
    ids_TK, weights_TK, shared_TS = _weigh(score_TK, ids_TK, shared_TS, weights, router, released, at_score)
    dtype = _dtype(released.weight, x_TH)
    shared_TS = _sigmoid_gate(x_TH, weights, spec) if shared_TS is None else shared_TS.to(dtype)
    return Routing(ids_TK, weights_TK.to(dtype), logits_TE, shared_TS)


def scores_as_released(x_TH: torch.Tensor, weights: WeightSource, router: Router, released: ReleasedNumerics, *,
                       logits_TE: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits after their scale and cap, what is gathered for the weights, and what experts compete with.

    Each (T, E + Z) in fp64, rounded as `released` says. With score_after_selection logits are gathered.
    """
    at_logits, at_score = to_dtype(_dtype(released.logits, x_TH)), to_dtype(_dtype(released.score, x_TH))
    logits_TE = at_logits(router_logits(x_TH, weights) if logits_TE is None else logits_TE.double())
    if router.logit_scale != 1.0:
        logits_TE = at_score(logits_TE * router.logit_scale)
    if router.logit_softcap:
        logits_TE = at_score(softcap(logits_TE, router.logit_softcap))
    score_TE = logits_TE if released.score_after_selection else _score(logits_TE, router, at_score)
    selection_TE = _selection(score_TE, logits_TE, weights.selection_bias_E, router, _dtype(released.score, x_TH))
    return logits_TE, score_TE, selection_TE


def to_dtype(dtype: torch.dtype) -> Round:
    """Rounds fp64 values to `dtype` by way of fp32, where the hardware computes, and returns them in fp64."""
    return lambda value: value.float().to(dtype).double()


def _dtype(at: At, x_TH: torch.Tensor) -> torch.dtype:
    return x_TH.dtype if at == "model" else torch.float32


def _score(logits: torch.Tensor, router: Router, rounded: Round) -> torch.Tensor:
    if router.score == "softmax":
        return rounded(torch.softmax(logits, dim=-1))
    if router.score == "sigmoid":
        return rounded(torch.sigmoid(logits))
    return rounded(torch.sqrt(rounded(F.softplus(logits, threshold=100.0))))


def _selection(score_TE: torch.Tensor, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, router: Router,
               dtype: torch.dtype) -> torch.Tensor:
    """What experts compete with: sums are rounded to the wider dtype of score and bias."""
    rounded = to_dtype(dtype)
    if bias_E is not None:
        rounded = to_dtype(torch.promote_types(dtype, bias_E.dtype))
        score_TE = rounded((logits_TE if router.selection_bias == "logit" else score_TE) + bias_E.double())
    if router.num_groups == 1:
        return score_TE
    score_TGE = score_TE.unflatten(-1, (router.num_groups, -1))
    group_TG = rounded(score_TGE.topk(1 if router.group_score == "max" else 2, dim=-1).values.sum(-1))
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    kept_TG.scatter_(1, top_ids(group_TG, router.num_groups_kept), True)
    fill = -torch.inf if router.group_fill == "minus_inf" else 0.0
    return score_TGE.masked_fill(~kept_TG[..., None], fill).flatten(1)


def _weigh(score_TK: torch.Tensor, ids_TK: torch.Tensor, shared_TS: torch.Tensor | None, weights: WeightSource,
           router: Router, released: ReleasedNumerics,
           rounded: Round) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Ids after dropping, weights, and the shared experts' weights, every step rounded."""
    num_routed = score_TK.shape[1]
    kept_TK = kept_slots(ids_TK, score_TK, router)
    if router.capacity is not None and router.capacity.renormalize_after:
        score_TK = score_TK * kept_TK
    both = score_TK if shared_TS is None else torch.cat([score_TK, shared_TS], dim=-1)
    # Released code over softmax after the selection has nothing to renormalise: its sum is 1 already.
    if router.renormalize and not (released.score_after_selection and router.score == "softmax"):
        sum_T1, epsilon = rounded(both.sum(-1, keepdim=True)), router.renormalize_epsilon
        sum_T1 = rounded(sum_T1 + epsilon) if router.epsilon_rule == "add" else sum_T1.clamp(min=epsilon)
        both = rounded(both / torch.where(kept_TK.any(-1, keepdim=True), sum_T1, 1.0))
    if router.scaling_factor != 1.0 and released.scale_on == "weights":
        both = rounded(both * router.scaling_factor)
    if weights.weight_scale_E is not None:
        scale_E = weights.weight_scale_E.double()
        both = rounded(both * (scale_E if router.learned_scale == "layer" else scale_E[ids_TK]))
    weights_TK = torch.where(kept_TK, both[:, :num_routed], 0.0)
    return torch.where(kept_TK, ids_TK, -1), weights_TK, None if shared_TS is None else both[:, num_routed:]


def _sigmoid_gate(x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec) -> torch.Tensor | None:
    if spec.shared is None or spec.shared.gate != "sigmoid":
        return None
    assert weights.shared_gate_SH is not None
    at_model = to_dtype(x_TH.dtype)
    return at_model(torch.sigmoid(at_model(x_TH.double() @ weights.shared_gate_SH.double().T))).to(x_TH.dtype)


def _expert_rows(x_RH: torch.Tensor, w_R1: torch.Tensor, expert: ExpertWeights, spec: MoESpec,
                 released: ReleasedNumerics, dtype: torch.dtype, product: Round) -> torch.Tensor:
    """Weighted rows of one expert."""
    at_rows = to_dtype(dtype if released.rows == "model" else torch.float32)
    if spec.weight_on == "input":
        return _mlp(to_dtype(dtype)(x_RH * w_R1), expert, spec.experts, released.activation, at_rows)
    if released.weight_at == "act":
        return _mlp(x_RH, expert, spec.experts, released.activation, at_rows, w_R1)
    return product(w_R1 * _mlp(x_RH, expert, spec.experts, released.activation, at_rows))


def _mlp(x_RH: torch.Tensor, expert: ExpertWeights, mlp: MLP, activation: At, at_rows: Round,
         act_weight_R1: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of one MLP; act_weight_R1 multiplies the stored activation, and so the bias of the rows."""
    w13_GIH, w2_HI, w13_bias_GI, w2_bias_H = expert
    gate_up_RGI = at_rows((x_RH @ w13_GIH.double().flatten(0, 1).T).unflatten(1, w13_GIH.shape[:2]))
    if w13_bias_GI is not None:
        gate_up_RGI = at_rows(gate_up_RGI + w13_bias_GI.double())
    act_RI = at_rows(_activate(gate_up_RGI, mlp, at_rows if activation == "model" else lambda value: value))
    if act_weight_R1 is not None:
        act_RI = at_rows(act_RI * act_weight_R1)
    down_RH = at_rows(act_RI @ w2_HI.double().T)
    if w2_bias_H is None:
        return down_RH
    bias_RH = w2_bias_H.double() if act_weight_R1 is None else at_rows(act_weight_R1 * w2_bias_H.double())
    return at_rows(down_RH + bias_RH)


def _activate(gate_up_RGI: torch.Tensor, mlp: MLP, rounded: Round) -> torch.Tensor:
    """activation(gate) * (up + offset), `rounded` after every elementwise step."""
    gate_RI, limit = gate_up_RGI[:, 0], mlp.limit
    if limit is not None and mlp.limit_at == "before":
        gate_RI = gate_RI.clamp(max=limit)
    act_RI = _activation(gate_RI, mlp, rounded)
    if limit is not None and mlp.limit_at == "after":
        act_RI = act_RI.clamp(max=limit)
    if not mlp.gated:
        return act_RI
    up_RI = gate_up_RGI[:, 1]
    if limit is not None:
        up_RI = up_RI.clamp(-limit, limit)
    if mlp.up_softcap:
        up_RI = rounded(softcap(up_RI, mlp.up_softcap))
    if mlp.up_offset:
        up_RI = rounded(up_RI + mlp.up_offset)
    return rounded(act_RI * up_RI)


def _activation(gate_RI: torch.Tensor, mlp: MLP, rounded: Round) -> torch.Tensor:
    if mlp.activation == "silu" and (mlp.gate_softcap or mlp.sigmoid_scale != 1.0):
        scaled_RI = gate_RI if mlp.sigmoid_scale == 1.0 else rounded(gate_RI * mlp.sigmoid_scale)
        factor_RI = rounded(softcap(gate_RI, mlp.gate_softcap)) if mlp.gate_softcap else gate_RI
        return rounded(factor_RI * rounded(torch.sigmoid(scaled_RI)))
    if mlp.activation == "silu":
        return rounded(F.silu(gate_RI))
    if mlp.activation in ("gelu", "gelu_tanh"):
        return rounded(F.gelu(gate_RI, approximate="tanh" if mlp.activation == "gelu_tanh" else "none"))
    relu_RI = torch.relu(gate_RI)
    return relu_RI if mlp.activation == "relu" else rounded(relu_RI.square())


def _add_shared(y_TH: torch.Tensor, x_TH: torch.Tensor, routing: Routing, weights: WeightSource, spec: MoESpec,
                released: ReleasedNumerics) -> torch.Tensor:
    """The routed sum plus the shared expert, or their mean; the shared expert works in the model's dtype."""
    expert, shared, at_model = weights.shared_expert(), spec.shared, to_dtype(x_TH.dtype)
    if shared is None or expert is None:
        return y_TH
    gate_TS = routing.shared_TS if routing.shared_TS is not None else _sigmoid_gate(x_TH, weights, spec)
    x64_TH, mlp = x_TH.double(), shared.mlp
    if shared.gate == "router":
        assert gate_TS is not None
        shared_TH = _router_weighted(x64_TH, expert, mlp, released.activation, at_model, gate_TS.double())
    else:
        shared_TH = _mlp(x64_TH, expert, mlp, released.activation, at_model)
    if shared.gate == "sigmoid":
        assert gate_TS is not None
        shared_TH = at_model(shared_TH * gate_TS.double())
    y_TH = at_model(y_TH + shared_TH)
    return at_model(y_TH / 2) if shared.merge == "mean" else y_TH


def _router_weighted(x_TH: torch.Tensor, expert: ExpertWeights, mlp: MLP, activation: At, at_model: Round,
                     gate_TS: torch.Tensor) -> torch.Tensor:
    """Shared experts one by one, each weighted on its activation; their rows are stored and added in fp32."""
    total_TH = torch.zeros_like(x_TH)
    width = expert.w2_HI.shape[1] // gate_TS.shape[1]
    for s in range(gate_TS.shape[1]):
        columns = slice(s * width, (s + 1) * width)
        one = ExpertWeights(expert.w13_GIH[:, columns], expert.w2_HI[:, columns])
        total_TH = total_TH + _mlp(x_TH, one, mlp, activation, at_model, gate_TS[:, s, None])
    return at_model(total_TH)
