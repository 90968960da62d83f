"""The layer of moe_fast: checks, operators and the ranks' sums; no mathematics of its own.

The router runs on this rank's tokens. tokens.py brings those of the tp group together and gives back the sums, merge.py
runs the experts in the form that the schedule asks for.
"""

import torch

from moe_fast.capabilities import check_scheme, check_supported
from moe_fast.held import FP8Weights, Held
from moe_fast.merge import merged_tokens, shared_rows
from moe_fast.observe import check_forward_only, check_untracked, record_routing
from moe_fast.operators.drop import before_drop, drop_by
from moe_fast.operators.route import route_by
from moe_fast.operators.router_logits import router_logits
from moe_fast.operators.select import select_by
from moe_fast.overlap import overlaps, summed_in_chunks
from moe_fast.tokens import agreed_tokens, complete, enter_tokens, router_over_tokens
from moe_fast.whole import with_whole_shared
from moe_ref.contract.checks import (
    check_capacity,
    check_groups,
    check_injected,
    check_logits,
    check_partial,
    check_residual,
    check_routing,
    check_tokens,
)
from moe_ref.contract.comm import Groups
from moe_ref.contract.errors import UsageTypeError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights, check_held
from moe_ref.contract.rank import Rank
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import MoEWeights, WeightSource, check_whole_parameters

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Made once: torch.compile cannot make them inside a graph.
ONE_RANK, ALONE = Parallel(), Groups()
SIGMOID_GATE = Router(num_experts=1, top_k=1, score="sigmoid")


def route(x_TH: torch.Tensor, weights: WeightSource | QuantisedWeights, spec: MoESpec, *,
          logits_TE: torch.Tensor | None = None) -> Routing:
    """Ids (int32), weights, logits and shared gate, computed and stored in fp32.

    logits_TE, if given, replaces x @ router^T. Raises UsageValueError / UsageTypeError on wrong metadata.
    """
    check_tokens(x_TH, spec, DTYPES, "moe_fast")
    check_supported(spec)
    check_whole_parameters(weights, spec)
    if logits_TE is not None:
        check_logits(logits_TE, spec, len(x_TH))
    return _route(x_TH, weights, spec, logits_TE)


def _route(x_TH: torch.Tensor, weights: WeightSource | QuantisedWeights, spec: MoESpec,
           logits_TE: torch.Tensor | None) -> Routing:
    router = spec.router
    if router is None:
        ids_TK = torch.zeros(len(x_TH), 1, dtype=torch.int32, device=x_TH.device)
        weights_TK = torch.ones_like(ids_TK, dtype=torch.float32)
        return Routing(ids_TK, weights_TK, shared_TS=_shared_gate(x_TH, weights, spec))
    shared_logits_TS = None
    if spec.shared is not None and spec.shared.gate == "router":
        assert weights.shared_gate_SH is not None
        shared_logits_TS = router_logits(x_TH, weights.shared_gate_SH, None)
    chosen_by, scale_E = (router, weights.weight_scale_E) if router.capacity is None else (before_drop(router), None)
    given = shared_logits_TS, weights.selection_bias_E, scale_E
    if logits_TE is None:
        assert weights.router_EH is not None
        ids_TK, weights_TK, shared_TS, logits_TE = route_by(chosen_by, x_TH, weights.router_EH, weights.router_bias_E,
                                                            *given)
    else:
        logits_TE = logits_TE.to(torch.float32)
        ids_TK, weights_TK, shared_TS = select_by(chosen_by, logits_TE, *given)
    if router.capacity is not None:
        ids_TK, weights_TK, shared_TS = drop_by(router, ids_TK, weights_TK, shared_TS, weights.weight_scale_E)
    return Routing(ids_TK, weights_TK, logits_TE,
                   _shared_gate(x_TH, weights, spec) if shared_logits_TS is None else shared_TS)


def _shared_gate(x_TH: torch.Tensor, weights: WeightSource | QuantisedWeights, spec: MoESpec) -> torch.Tensor | None:
    """The sigmoid gate is a router with one expert, so the router's operator computes it."""
    if spec.shared is None or spec.shared.gate != "sigmoid":
        return None
    assert weights.shared_gate_SH is not None
    return route_by(SIGMOID_GATE, x_TH, weights.shared_gate_SH, None, None, None, None)[1]


def experts(x_TH: torch.Tensor, routing: Routing, weights: WeightSource | QuantisedWeights, spec: MoESpec,
            parallel: Parallel | None = None, groups: Groups | None = None, *, reduce: bool = True,
            trace: Trace | None = None, check: str = "metadata") -> torch.Tensor:
    """Experts, shared expert and weighted merge, (T, H) in x's dtype; reduce=False returns the partial sum.

    Tokens and routing are this rank's own, a partial sum is one of all tokens of the tp group. Products accumulate in
    fp32; act, down, shared and merged rows are rounded to x's dtype. An id outside [0, E) contributes nothing; with
    check="values" it raises. Gradients of x, routing weights and gates are complete on every rank. Raises before any
    kernel starts, also where a trace is given while gradients are recorded.
    """
    rank, in_memory = _check_layer(x_TH, weights, spec, parallel, groups)
    check_routing(routing, spec, len(x_TH), check)
    if not reduce:
        check_partial(rank.parallel)
    _check_gradients(trace, in_memory, x_TH, routing.weights_TK, routing.shared_TS)
    return _experts(agreed_tokens(x_TH, rank), routing, in_memory, spec, rank, reduce, trace)


def _check_layer(x_TH: torch.Tensor, weights: WeightSource | QuantisedWeights, spec: MoESpec, parallel: Parallel | None,
                 groups: Groups | None) -> tuple[Rank, Held]:
    """The rank, and the weights, which kernels read from one tensor for all experts of a rank."""
    check_tokens(x_TH, spec, DTYPES, "moe_fast")
    check_supported(spec, isinstance(weights, FP8Weights))
    parallel, groups = check_groups(parallel or ONE_RANK, groups or ALONE)
    check_held(weights, spec, parallel, groups.rank)
    if not isinstance(weights, MoEWeights | QuantisedWeights):
        raise UsageTypeError(f"weights: {type(weights).__name__}, but should be MoEWeights or QuantisedWeights, all "
                             "experts in memory [moe_fast]")
    if isinstance(weights, QuantisedWeights):
        check_scheme(weights.scheme, x_TH.dtype)
    rank = Rank(parallel, groups)
    return rank, router_over_tokens(weights, rank)


def _check_gradients(trace: Trace | None, weights: Held, *given: torch.Tensor | None) -> None:
    """Raise where autograd would have to follow what a trace looks into, or codes."""
    is_encoded = isinstance(weights, QuantisedWeights)
    if trace is None and not is_encoded:
        return
    tensors = *given, *(tensor for _, tensor in weights.named_tensors())
    if is_encoded:
        check_forward_only(tensors)
    if trace is not None:
        check_untracked(tensors)


def _experts(x_TH: torch.Tensor, routing: Routing, weights: Held, spec: MoESpec, rank: Rank, reduce: bool,
             trace: Trace | None) -> torch.Tensor:
    """The merged tokens of the tp group, completed, and a shared expert that is whole on every rank."""
    if trace is not None:
        record_routing(trace, routing)
    given_TS = routing.shared_TS
    gate_TS = given_TS if given_TS is not None and given_TS.shape[1] else _shared_gate(x_TH, weights, spec)
    tokens = enter_tokens(x_TH, routing, gate_TS, rank)
    if reduce and trace is None and overlaps(tokens, weights, rank):
        y_TH = summed_in_chunks(tokens, lambda some: merged_tokens(some, weights, spec, rank, None), rank)
    else:
        merged_TH = merged_tokens(tokens, weights, spec, rank, trace)
        if trace is not None:
            trace.record(Stage.MERGED, merged_TH)
        if not reduce:
            return merged_TH
        y_TH = merged_TH if rank.by_slot else complete(merged_TH, tokens.counts, rank)
    if not rank.whole_shared:
        return y_TH
    shared_TH = None
    if spec.shared is not None:
        whole_gate_TS = None if gate_TS is None else gate_TS.to(torch.float32)
        shared_TH = shared_rows(x_TH, whole_gate_TS, weights, weights.shared_w2_bias_H, spec, rank.with_other_tokens,
                                (0, spec.shared.intermediate_size))
        if trace is not None:
            trace.record(Stage.SHARED, shared_TH)
    return with_whole_shared(y_TH, shared_TH, weights, spec, rank)


def moe(x_TH: torch.Tensor, weights: WeightSource | QuantisedWeights, spec: MoESpec, parallel: Parallel | None = None,
        groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
        residual_TH: torch.Tensor | None = None, trace: Trace | None = None,
        check: str = "metadata") -> torch.Tensor:
    """The whole layer, (T, H) in x's dtype: route (unless injected), experts, the ranks' sums, residual once.

    Tokens, routing, logits and residual are this rank's own, weights its shard. Raises UsageValueError /
    UsageTypeError on wrong shapes, dtypes or group sizes before any kernel starts.
    """
    rank, in_memory = _check_layer(x_TH, weights, spec, parallel, groups)
    check_injected(routing, logits_TE)
    if logits_TE is not None:
        check_logits(logits_TE, spec, len(x_TH))
    if routing is not None:
        check_routing(routing, spec, len(x_TH), check)
    if residual_TH is not None:
        check_residual(residual_TH, x_TH)
    injected = (None, None) if routing is None else (routing.weights_TK, routing.shared_TS)
    _check_gradients(trace, in_memory, x_TH, logits_TE, *injected)
    x_TH = agreed_tokens(x_TH, rank)
    if routing is None:
        check_capacity(spec, rank.parallel)
        routing = _route(x_TH, in_memory, spec, logits_TE)
    y_TH = _experts(x_TH, routing, in_memory, spec, rank, True, trace)
    if residual_TH is not None:
        y_TH = y_TH + residual_TH
    if trace is not None:
        trace.record(Stage.REDUCED, y_TH)
    return y_TH
