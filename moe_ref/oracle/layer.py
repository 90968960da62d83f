"""The layer: a loop over experts, a weighted merge, one all-reduce, the residual.

    for each expert e:
        rows = the (token, slot) pairs with ids[token, slot] == e
        y[token] += weights[token, slot] * expert_e(x[token])         (or expert_e(weights * x), Llama 4)
    y += weights * x for identity experts;  y += shared_gate * shared_expert(x);  y += bias
    with tensor parallelism: w1, w3 are cut by output (colwise), w2 by input (rowwise), so y is a partial
    sum on every rank, and one all-reduce completes it. What is not cut (identity experts, the biases of w2 and of
    the output) is added by rank 0 alone.
    y += residual

Everything is differentiable; moe_ref.oracle.backward has the same gradients written out.
"""

import torch

from moe_ref.contract.checks import (
    check_devices,
    check_groups,
    check_injected,
    check_residual,
    check_routing,
    check_tokens,
)
from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import WeightSource, check_expert, check_shared, check_weights
from moe_ref.oracle import expert as formula
from moe_ref.oracle.collectives import enter, leave, once
from moe_ref.oracle.router import route, shared_gates
from moe_ref.oracle.rows import RoutedRows
from moe_ref.oracle.unbound import unbound


def moe(x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, parallel: Parallel | None = None,
        groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
        residual_TH: torch.Tensor | None = None, trace: Trace | None = None,
        check: str = "metadata") -> torch.Tensor:
    """The whole layer, (T, H) in fp64: route (unless a routing is injected), experts, one all-reduce, residual.

    weights are this rank's shard. Raises UsageValueError / UsageTypeError on wrong shapes, dtypes or world
    size before anything is computed.
    """
    check_tokens(x_TH, spec, PLAIN_DTYPES, "moe_ref")
    parallel, groups = check_groups(parallel, groups)
    check_weights(weights, spec, parallel, groups.tp.rank)
    check_injected(routing, logits_TE)
    if residual_TH is not None:
        check_residual(residual_TH, x_TH)
    if routing is None:
        routing = route(x_TH, weights, spec, logits_TE=logits_TE)
    y_TH = experts(x_TH, routing, weights, spec, parallel, groups, trace=trace, check=check)
    if residual_TH is not None:
        y_TH = y_TH + residual_TH.double()
    if trace is not None:
        trace.record(Stage.REDUCED, y_TH)
    return y_TH


def experts(x_TH: torch.Tensor, routing: Routing, weights: WeightSource, spec: MoESpec,
            parallel: Parallel | None = None, groups: Groups | None = None, *, reduce: bool = True,
            trace: Trace | None = None, check: str = "metadata") -> torch.Tensor:
    """Experts, shared expert and weighted merge, (T, H) in fp64; reduce=False returns this rank's partial sum.

    An id outside [0, E + Z) contributes nothing; with check="values" one other than -1 raises. The trace gets
    logits, ids, weights, gate_up (T*K, G, I), act (T*K, I), down (T*K, H), shared and merged (T, H).
    """
    check_tokens(x_TH, spec, PLAIN_DTYPES, "moe_ref")
    parallel, groups = check_groups(parallel, groups)
    rank = groups.tp.rank
    check_weights(weights, spec, parallel, rank)
    check_routing(routing, spec, len(x_TH), check)
    check_devices(x_TH, weights, routing)
    weights = unbound(weights)
    start, stop = parallel.ranges(spec.intermediate_size)[rank]
    rows = RoutedRows(x_TH, spec, stop - start)
    x64_TH, weights_TK = enter(x_TH.double(), groups.tp), enter(routing.weights_TK.double(), groups.tp)
    # The empty sums tie the result to its inputs even where no expert is chosen: backward then gives zeros.
    y_TH = torch.zeros_like(x64_TH) + x64_TH[:0].sum() + weights_TK[:0].sum()
    for e in range(spec.num_choices):
        token_R, slot_R = (routing.ids_TK == e).nonzero(as_tuple=True)
        if len(token_R) == 0:
            continue
        w_R1 = weights_TK[token_R, slot_R, None]
        if e >= spec.num_experts:  # an identity expert
            down_RH = once(w_R1 * x64_TH[token_R], groups.tp)
            stages: tuple[torch.Tensor, ...] = ()
        else:
            stages = _expert_rows(x64_TH[token_R], w_R1, weights, spec, parallel, groups.tp, e)
            down_RH = stages[-1]
        y_TH.index_add_(0, token_R, down_RH)
        rows.keep(trace, token_R * spec.top_k + slot_R, *(stages or (None, None, down_RH)))
    y_TH = _merge_shared(y_TH, x_TH, x64_TH, routing, weights, spec, parallel, groups.tp, trace)
    if weights.output_bias_H is not None:
        y_TH = y_TH + once(enter(weights.output_bias_H.double(), groups.tp), groups.tp)
    rows.record(trace, routing, y_TH)
    return leave(y_TH, groups.tp) if reduce else y_TH


def _expert_rows(x_RH: torch.Tensor, w_R1: torch.Tensor, weights: WeightSource, spec: MoESpec, parallel: Parallel,
                 tp: Comm, e: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate_up, act and weighted down rows of expert e."""
    w13_GIH, w2_HI, w13_bias_GI, w2_bias_H = check_expert(weights.expert(e), spec, parallel, tp.rank, e)
    on_input = spec.weight_on == "input"
    gate_up_RGI = formula.gate_up(x_RH * w_R1 if on_input else x_RH, w13_GIH, w13_bias_GI)
    act_RI = formula.activate(gate_up_RGI, spec.experts)
    down_RH = formula.down(act_RI, w2_HI)
    if w2_bias_H is not None:
        down_RH = down_RH + once(enter(w2_bias_H.double(), tp), tp)
    return gate_up_RGI, act_RI, down_RH if on_input else w_R1 * down_RH


def _merge_shared(y_TH: torch.Tensor, x_TH: torch.Tensor, x64_TH: torch.Tensor, routing: Routing,
                  weights: WeightSource, spec: MoESpec, parallel: Parallel, tp: Comm,
                  trace: Trace | None) -> torch.Tensor:
    """The routed sum plus the shared expert, or their mean."""
    expert = check_shared(weights.shared_expert(), spec, parallel, tp.rank)
    if spec.shared is None or expert is None:
        return y_TH
    act_TI = formula.activate(formula.gate_up(x64_TH, expert.w13_GIH, expert.w13_bias_GI), spec.shared.mlp)
    gate_TS = routing.shared_TS if routing.shared_TS is not None else shared_gates(x_TH, weights, spec)
    gate_TS = None if gate_TS is None else enter(gate_TS.double(), tp)
    if spec.shared.gate == "router":
        assert gate_TS is not None
        start, stop = parallel.ranges(spec.shared.intermediate_size)[tp.rank]
        width = spec.shared.intermediate_size // spec.shared.num_experts
        act_TI = act_TI * gate_TS.repeat_interleave(width, dim=1)[:, start:stop]
    shared_TH = formula.down(act_TI, expert.w2_HI)
    if expert.w2_bias_H is not None:
        shared_TH = shared_TH + once(enter(expert.w2_bias_H.double(), tp), tp)
    if spec.shared.gate == "sigmoid":
        assert gate_TS is not None
        shared_TH = shared_TH * gate_TS
    if trace is not None:
        trace.record(Stage.SHARED, shared_TH)
    return (y_TH + shared_TH) / 2 if spec.shared.merge == "mean" else y_TH + shared_TH
