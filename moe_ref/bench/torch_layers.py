"""The layer as one writes it with torch alone, twice: a loop over experts, and two grouped products over sorted rows.

Both are implementations like any other, with `moe` and `CAPABILITIES`: `moe-ref verify moe_ref.bench.torch_layers:loop`
judges them. They are what speeds are compared with, so nothing in them waits for the host that need not.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_ref.bench.kernels import part_range
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.checks import check_groups, check_injected, check_tokens
from moe_ref.contract.comm import Groups
from moe_ref.contract.errors import UsageTypeError, raise_faults
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Direction, Dtype, Format, Stage
from moe_ref.contract.weights import MoEWeights, WeightSource, check_weights

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"), "relu": F.relu}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Experts = Callable[[torch.Tensor, Routing, MoEWeights, MoESpec], torch.Tensor]
"""(x_TH, routing, weights, spec) -> merged_TH of the routed experts, in x's dtype."""


def route(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, logits_TE: torch.Tensor | None = None) -> Routing:
    """Ids (int64) and weights (fp32) from logits in fp32, as released code has them; gates of a shared expert too."""
    gates_TS = None
    if weights.shared_gate_SH is not None:
        gates_TS = torch.sigmoid(F.linear(x_TH.float(), weights.shared_gate_SH.float()))
    if spec.router is None:
        ids_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64, device=x_TH.device)
        return Routing(ids_TK, torch.ones(ids_TK.shape, device=x_TH.device), shared_TS=gates_TS)
    if logits_TE is None:
        assert weights.router_EH is not None
        logits_TE = F.linear(x_TH.float(), weights.router_EH.float())
    score_TE = torch.softmax(logits_TE, -1) if spec.router.score == "softmax" else torch.sigmoid(logits_TE)
    ids_TK = _selection(score_TE, weights.selection_bias_E, spec.router).topk(spec.router.top_k, dim=-1).indices
    weights_TK = score_TE.gather(1, ids_TK)
    if spec.router.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + spec.router.renormalize_epsilon)
    return Routing(ids_TK, weights_TK * spec.router.scaling_factor, logits_TE, gates_TS)


def _selection(score_TE: torch.Tensor, bias_E: torch.Tensor | None, router: Router) -> torch.Tensor:
    """Scores that experts compete with: biased, and -inf outside of the groups that stay."""
    selection_TE = score_TE if bias_E is None else score_TE + bias_E
    if router.num_groups == 1:
        return selection_TE
    score_TGE = selection_TE.unflatten(-1, (router.num_groups, -1))
    score_TG = score_TGE.amax(-1) if router.group_score == "max" else score_TGE.topk(2, dim=-1).values.sum(-1)
    kept_TK = score_TG.topk(router.num_groups_kept, dim=-1).indices
    dropped_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(1, kept_TK, False)
    return score_TGE.masked_fill(dropped_TG[..., None], -torch.inf).flatten(1)


def loop_experts(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights, spec: MoESpec) -> torch.Tensor:
    """One expert after the other, every operation in x's dtype, as MixtralSparseMoeBlock of transformers did it.

    Experts are unbound at once: the gradient of an index would be as large as all experts, once per expert.
    """
    weights_TK, activate = routing.weights_TK.to(x_TH.dtype), _ACTIVATIONS[spec.experts.activation]
    merged_TH = torch.zeros_like(x_TH)
    for e, (w13_GIH, w2_HI) in enumerate(zip(weights.w13_EGIH.unbind(), weights.w2_EHI.unbind(), strict=True)):
        with part_range("align"):
            token_R, slot_R = (routing.ids_TK == e).nonzero(as_tuple=True)
            if not len(token_R):
                continue
            x_RH = x_TH[token_R]
        with part_range("gate_up"):
            gate_RI, up_RI = (F.linear(x_RH, w_IH) for w_IH in w13_GIH.unbind())
            act_RI = activate(gate_RI) * up_RI
        with part_range("down"):
            down_RH = F.linear(act_RI, w2_HI)
        with part_range("combine"):
            merged_TH.index_add_(0, token_R, down_RH * weights_TK[token_R, slot_R, None])
    return merged_TH


def grouped_experts(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights, spec: MoESpec) -> torch.Tensor:
    """Rows sorted by expert, two torch.nn.functional.grouped_mm, and a batched product that weighs and adds up slots.

    Ids must all be those of experts: a row of none would have no group. Raises UsageValueError where rows of x or of
    the activation are no multiple of 16 bytes, which grouped_mm asks for.
    """
    itemsize = x_TH.element_size()
    sizes = {"hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size}
    raise_faults("torch grouped_mm", [f"{name}={size} of {itemsize} bytes, but should be a multiple of 16 bytes"
                                      for name, size in sizes.items() if size * itemsize % 16])
    (num_tokens, top_k), hidden = routing.ids_TK.shape, x_TH.shape[1]
    with part_range("align"):
        sorted_R, order_R = routing.ids_TK.flatten().sort(stable=True)
        experts_E = torch.arange(spec.num_experts, dtype=sorted_R.dtype, device=x_TH.device)
        ends_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
        x_RH = x_TH[order_R // top_k]
    with part_range("gate_up"):
        gate_up = F.grouped_mm(x_RH, weights.w13_EGIH.flatten(1, 2).transpose(1, 2), offs=ends_E)
        gate_RI, up_RI = gate_up.chunk(2, dim=-1)
        act_RI = _ACTIVATIONS[spec.experts.activation](gate_RI) * up_RI
    with part_range("down"):
        down_RH = F.grouped_mm(act_RI, weights.w2_EHI.transpose(1, 2), offs=ends_E)
    with part_range("combine"):
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=x_TH.device))
        rows_TKH = down_RH[place_R].view(num_tokens, top_k, hidden)
        return torch.bmm(routing.weights_TK.to(x_TH.dtype)[:, None], rows_TKH).squeeze(1)


def shared_rows(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights, spec: MoESpec) -> torch.Tensor:
    """The shared expert's rows times its gate, (T, H) in x's dtype."""
    assert spec.shared is not None
    assert weights.shared_w13_GIH is not None
    assert weights.shared_w2_HI is not None
    gate_TI, up_TI = (F.linear(x_TH, w_IH) for w_IH in weights.shared_w13_GIH.unbind())
    shared_TH = F.linear(_ACTIVATIONS[spec.shared.mlp.activation](gate_TI) * up_TI, weights.shared_w2_HI)
    return shared_TH if routing.shared_TS is None else shared_TH * routing.shared_TS.to(x_TH.dtype)


class TorchLayer:
    """`moe` around one way to run the routed experts, on one rank; experts: as Experts. Differentiable by autograd.

    merges_in_model: every step of the merge is rounded to the dtype of the model, not only its end.
    """

    def __init__(self, name: str, experts: Experts, merges_in_model: bool) -> None:
        self._name, self._experts = name, experts
        self.CAPABILITIES = Capabilities(
            name=name, version=str(torch.__version__),
            numerics={dtype: _numerics(Format(dtype.value), merges_in_model) for dtype in Dtype},
            activations=tuple(_ACTIVATIONS), scores=("softmax", "sigmoid"), injected_routing=True,
            features=(Feature.DENSE, Feature.GROUPS, Feature.SELECTION_BIAS, Feature.SHARED_EXPERT, Feature.RESIDUAL),
            directions=tuple(Direction))

    def moe(self, x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
        """The contract's entry point, (T, H) in x's dtype; shows no stage. Raises UsageValueError / UsageTypeError."""
        check_tokens(x_TH, spec, _DTYPES, self._name)
        parallel, groups = check_groups(parallel, groups)
        raise_faults(self._name, [f"{parallel.size} ranks, but should be 1"] * (parallel.size > 1)
                     + [f"{reason} is not implemented" for reason in self.CAPABILITIES.refused_mathematics(spec)])
        check_weights(weights, spec, parallel, 0)
        check_injected(routing, logits_TE)
        if not isinstance(weights, MoEWeights):
            raise UsageTypeError(f"weights: {type(weights).__name__}, but should be MoEWeights [{self._name}]")
        if routing is None:
            with part_range("router"):
                routing = route(x_TH, weights, spec, logits_TE)
        y_TH = self._experts(x_TH, routing, weights, spec)
        if spec.shared is not None:
            with part_range("shared"):
                y_TH = y_TH + shared_rows(x_TH, routing, weights, spec)
        if residual_TH is not None:
            y_TH = y_TH + residual_TH
        return y_TH


def _numerics(model: Format, merges_in_model: bool) -> Numerics:
    """The router in fp32, its weights and the result of every other operation rounded to the dtype of the model."""
    rows = (Stage.WEIGHTS, Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED)
    return Numerics(storage={Stage.LOGITS: Format.FP32, **dict.fromkeys(rows, model)}, reduce=model, weight_at="merge",
                    activation=model, merge=model if merges_in_model else None)


loop = TorchLayer("torch loop", loop_experts, merges_in_model=True)
grouped = TorchLayer("torch grouped_mm", grouped_experts, merges_in_model=False)
