"""The layer as released code computes it: every step in fp64, rounded where that code rounds.

It differs from the code it follows by the order of long sums and the last bit of exp, tanh and erf, so by a few
units in the last place; an expert choice that rests on rounded scores is the same up to exact ties.
"""

import torch

from moe_ref.contract.checks import check_devices, check_logits, check_routing, check_tokens
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.released import At, ReleasedNumerics, check_released
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP, MoESpec, Router
from moe_ref.contract.weights import (
    ExpertWeights,
    WeightSource,
    check_expert,
    check_shared,
    check_weights,
    check_whole_parameters,
)
from moe_ref.oracle.capacity import kept_slots
from moe_ref.oracle.expert import softcap
from moe_ref.oracle.released_mlp import Round, mlp_as_released, to_dtype
from moe_ref.oracle.router import router_gated, router_logits, sigmoid, softplus, top_ids

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def moe_as_released(x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, released: ReleasedNumerics, *,
                    routing: Routing | None = None) -> torch.Tensor:
    """The whole layer with the rounding points of `released`, (T, H) in the dtype of x_TH; unsharded weights.

    Experts are added in the order of their ids, an expert that a token has twice in the order of its slots. Raises
    UsageValueError / UsageTypeError on wrong shapes or dtypes, and where check_released does.
    """
    check_tokens(x_TH, spec, DTYPES, "moe_as_released")
    check_released(released, spec.router, spec.weight_on)
    check_weights(weights, spec, None, 0)
    if routing is None:
        routing = route_as_released(x_TH, weights, spec, released)
    check_routing(routing, spec, len(x_TH), "metadata")
    check_devices(x_TH, weights, routing)
    at_model = to_dtype(x_TH.dtype)
    y_TH = at_model(_routed(x_TH, routing, weights, spec, released))
    if released.scale_on == "output" and spec.router is not None:
        y_TH = at_model(y_TH * spec.router.scaling_factor)
    y_TH = _add_shared(y_TH, x_TH, routing, weights, spec, released)
    if weights.output_bias_H is not None:
        y_TH = at_model(y_TH + weights.output_bias_H.double())
    return y_TH.to(x_TH.dtype)


def route_as_released(x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, released: ReleasedNumerics, *,
                      logits_TE: torch.Tensor | None = None) -> Routing:
    """Ids, weights and shared gates with the rounding points of `released`, in the dtypes that they have there.

    With scale_on "output" the scaling factor is not in the weights of routed experts. logits_TE (T, E + Z)
    replaces x @ router^T + bias. Raises UsageValueError where check_released does, and on logits of another shape.
    """
    check_tokens(x_TH, spec, DTYPES, "route_as_released")
    check_whole_parameters(weights, spec)
    router = spec.router
    if router is None:
        ids_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64, device=x_TH.device)
        weights_TK = torch.ones_like(ids_TK, dtype=x_TH.dtype)
        return Routing(ids_TK, weights_TK, shared_TS=_sigmoid_gate(x_TH, weights, spec))
    logits_TE = router_logits(x_TH, weights) if logits_TE is None else logits_TE
    check_logits(logits_TE, spec, len(x_TH))
    at_logits, at_score = to_dtype(_dtype(released.logits, x_TH)), to_dtype(_dtype(released.score, x_TH))
    logits_TE = at_logits(logits_TE.double())
    _, score_TE, selection_TE = scores_as_released(x_TH, weights, router, released, logits_TE=logits_TE)
    ids_TK = top_ids(selection_TE, router.top_k)
    score_TK = score_TE.gather(1, ids_TK)
    if released.score_after_selection:
        score_TK = _score(score_TK, router, at_score)
    shared_TS = None
    if router_gated(spec):
        assert weights.shared_gate_SH is not None
        logits_TS = at_logits(x_TH.double() @ weights.shared_gate_SH.double().T)
        shared_TS = _score(_capped(logits_TS, router, at_score), router, at_score)
    ids_TK, weights_TK, shared_TS = _weigh(score_TK, ids_TK, shared_TS, weights, router, released, at_score)
    dtype = _dtype(released.weight, x_TH)
    shared_TS = _sigmoid_gate(x_TH, weights, spec) if shared_TS is None else shared_TS.to(dtype)
    return Routing(ids_TK, weights_TK.to(dtype), logits_TE, shared_TS)


def scores_as_released(x_TH: torch.Tensor, weights: WeightSource, router: Router, released: ReleasedNumerics, *,
                       logits_TE: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits after their scale and cap, what is gathered for the weights, and what experts compete with.

    Each (T, E + Z) in fp64, rounded as `released` says. With score_after_selection logits are gathered. Raises
    UsageValueError where check_released does.
    """
    check_released(released, router)
    at_logits, at_score = to_dtype(_dtype(released.logits, x_TH)), to_dtype(_dtype(released.score, x_TH))
    logits_TE = at_logits(router_logits(x_TH, weights) if logits_TE is None else logits_TE.double())
    logits_TE = _capped(logits_TE, router, at_score)
    score_TE = logits_TE if released.score_after_selection else _score(logits_TE, router, at_score)
    selection_TE = _selection(score_TE, logits_TE, weights.selection_bias_E, router, _dtype(released.score, x_TH))
    return logits_TE, score_TE, selection_TE


def _dtype(at: At, x_TH: torch.Tensor) -> torch.dtype:
    return x_TH.dtype if at == "model" else torch.float32


def _capped(logits: torch.Tensor, router: Router, rounded: Round) -> torch.Tensor:
    """logit_scale and logit_softcap, each rounded."""
    if router.logit_scale != 1.0:
        logits = rounded(logits * router.logit_scale)
    return rounded(softcap(logits, router.logit_softcap)) if router.logit_softcap else logits


def _score(logits: torch.Tensor, router: Router, rounded: Round) -> torch.Tensor:
    if router.score == "softmax":
        return rounded(torch.softmax(logits, dim=-1))
    if router.score == "sigmoid":
        return rounded(sigmoid(logits))
    return rounded(torch.sqrt(rounded(softplus(logits))))


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
    num_routed, shares = score_TK.shape[1], score_TK if shared_TS is None else torch.cat([score_TK, shared_TS], -1)
    after = router.capacity is not None and router.capacity.renormalize_after
    # Released code over softmax after the selection has nothing to renormalise: its sum is 1 already.
    divides = router.renormalize and not (released.score_after_selection and router.score == "softmax")
    if divides and not after:
        shares = _renormalized(shares, router, rounded)
    kept_TK = kept_slots(ids_TK, shares[:, :num_routed], router)
    if divides and after:
        # Not a product with 0: an infinite score times 0 is NaN.
        held_TK = torch.where(kept_TK, shares[:, :num_routed], 0.0)
        shares = _renormalized(torch.cat([held_TK, shares[:, num_routed:]], -1), router, rounded)
    weights_TK, columns_TS = shares[:, :num_routed], shares[:, num_routed:]
    if router.scaling_factor != 1.0:
        columns_TS = rounded(columns_TS * router.scaling_factor)
        if released.scale_on == "weights":
            weights_TK = rounded(weights_TK * router.scaling_factor)
    if weights.weight_scale_E is not None:
        scale_E, per_expert = weights.weight_scale_E.double(), router.learned_scale == "expert"
        weights_TK = rounded(weights_TK * (scale_E[ids_TK] if per_expert else scale_E))
        columns_TS = columns_TS if per_expert else rounded(columns_TS * scale_E)
    # A token whose every slot was dropped may have had no sum to divide by; that ends here.
    weights_TK = torch.where(kept_TK, weights_TK, 0.0)
    return torch.where(kept_TK, ids_TK, -1), weights_TK, None if shared_TS is None else columns_TS


def _renormalized(shares: torch.Tensor, router: Router, rounded: Round) -> torch.Tensor:
    """shares / (their sum + epsilon), or over the clamped sum, (T, K + S)."""
    sum_T1, epsilon = rounded(shares.sum(-1, keepdim=True)), router.renormalize_epsilon
    sum_T1 = rounded(sum_T1 + epsilon) if router.epsilon_rule == "add" else sum_T1.clamp(min=epsilon)
    return rounded(shares / sum_T1)


def _sigmoid_gate(x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec) -> torch.Tensor | None:
    if spec.shared is None or spec.shared.gate != "sigmoid":
        return None
    assert weights.shared_gate_SH is not None
    at_model = to_dtype(x_TH.dtype)
    return at_model(torch.sigmoid(at_model(x_TH.double() @ weights.shared_gate_SH.double().T))).to(x_TH.dtype)


def _routed(x_TH: torch.Tensor, routing: Routing, weights: WeightSource, spec: MoESpec,
            released: ReleasedNumerics) -> torch.Tensor:
    """Weighted rows of all experts, added up one after the other."""
    at_merge = to_dtype(_dtype(released.merge, x_TH))
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
            expert = check_expert(weights.expert(e), spec, Parallel(), 0, e)
            row_RH = _expert_rows(x_RH, w_R1, expert, spec, released, x_TH.dtype, product)
        # Every addition is rounded, and an injected routing may name an expert twice: one slot at a time.
        for slot in slot_R.unique().tolist():
            of_slot_R = slot_R == slot
            token_N = token_R[of_slot_R]
            y_TH[token_N] = at_merge(y_TH[token_N] + at_merge(row_RH[of_slot_R]))
    return y_TH


def _expert_rows(x_RH: torch.Tensor, w_R1: torch.Tensor, expert: ExpertWeights, spec: MoESpec,
                 released: ReleasedNumerics, dtype: torch.dtype, product: Round) -> torch.Tensor:
    """Weighted rows of one expert."""
    at_rows = to_dtype(dtype if released.rows == "model" else torch.float32)
    if spec.weight_on == "input":
        return mlp_as_released(to_dtype(dtype)(x_RH * w_R1), expert, spec.experts, released.activation, at_rows)
    if released.weight_at == "act":
        return mlp_as_released(x_RH, expert, spec.experts, released.activation, at_rows, w_R1)
    return product(w_R1 * mlp_as_released(x_RH, expert, spec.experts, released.activation, at_rows))


def _add_shared(y_TH: torch.Tensor, x_TH: torch.Tensor, routing: Routing, weights: WeightSource, spec: MoESpec,
                released: ReleasedNumerics) -> torch.Tensor:
    """The routed sum plus the shared expert, or their mean; the shared expert works in the model's dtype."""
    expert = check_shared(weights.shared_expert(), spec, Parallel(), 0)
    shared, at_model = spec.shared, to_dtype(x_TH.dtype)
    if shared is None or expert is None:
        return y_TH
    gate_TS = routing.shared_TS if routing.shared_TS is not None else _sigmoid_gate(x_TH, weights, spec)
    x64_TH, mlp = x_TH.double(), shared.mlp
    if shared.gate == "router":
        assert gate_TS is not None
        shared_TH = _router_weighted(x64_TH, expert, mlp, released.activation, at_model, gate_TS.double())
    else:
        shared_TH = mlp_as_released(x64_TH, expert, mlp, released.activation, at_model)
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
        total_TH = total_TH + mlp_as_released(x_TH, one, mlp, activation, at_model, gate_TS[:, s, None])
    return at_model(total_TH)
