"""The layer: tokens in, a loop over experts, a weighted merge, the ranks' sums, the residual.

    y = sum over the slots of each token of weight * expert(x)              see routed.py
    y += weights * x for identity experts;  y += shared_gate * shared_expert(x), or their mean;  y += bias
    with tensor parallelism: w1, w3 are cut by output (colwise), w2 by input (rowwise), so y is a partial
    sum on every rank, which one all-reduce completes (tokens.py has the other schedules). What is not cut (identity
    experts, the biases of w2 and of the output) is added by rank 0 alone.
    with expert parallelism: y is a partial sum over ep as well; or, where its ranks have tokens of their own, rows
    travel to their experts and back (dispatch.py)
    y += residual

Everything is differentiable: what several ranks hold has its complete gradient on each of them (collectives.py).
moe_ref.oracle.backward has the same gradients written out for one all-reduce over tp.
"""

import torch

from moe_ref.contract.checks import (
    check_capacity,
    check_devices,
    check_groups,
    check_injected,
    check_partial,
    check_residual,
    check_routing,
    check_tokens,
)
from moe_ref.contract.collectives import enter, leave
from moe_ref.contract.comm import Groups
from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights, check_held
from moe_ref.contract.rank import Rank
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import WeightSource
from moe_ref.oracle.decode import decoded
from moe_ref.oracle.dispatch import send, send_back
from moe_ref.oracle.gather_form import gathered_sums
from moe_ref.oracle.routed import Slots, add_identity, expert_sums, places, tie
from moe_ref.oracle.router import route
from moe_ref.oracle.rows import RoutedRows
from moe_ref.oracle.shared import shared_rows
from moe_ref.oracle.tokens import (
    GroupTokens,
    RouterOverTokens,
    agreed_tokens,
    complete,
    enter_tokens,
    whole_in_sum,
    with_gates,
)
from moe_ref.oracle.unbound import unbound


def moe(x_TH: torch.Tensor, weights: WeightSource | QuantisedWeights, spec: MoESpec, parallel: Parallel | None = None,
        groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
        residual_TH: torch.Tensor | None = None, trace: Trace | None = None,
        check: str = "metadata") -> torch.Tensor:
    """The whole layer, (T, H) in fp64: route (unless a routing is injected), experts, the ranks' sums, residual.

    Tokens, routing, logits and residual are this rank's own, weights its shard; the gather schedule takes the tokens
    of tp rank 0. Raises UsageValueError / UsageTypeError on wrong shapes, dtypes or group sizes before anything is
    computed, and where a router with a capacity sees only a part of the tokens.
    """
    check_tokens(x_TH, spec, PLAIN_DTYPES, "moe_ref")
    parallel, groups = check_groups(parallel, groups)
    check_held(weights, spec, parallel, groups.rank)
    weights = decoded(weights)
    check_injected(routing, logits_TE)
    if residual_TH is not None:
        check_residual(residual_TH, x_TH)
    rank = Rank(parallel, groups)
    x_TH = agreed_tokens(x_TH, rank)
    if routing is None:
        check_capacity(spec, parallel)
        routing = route(x_TH, RouterOverTokens(weights, rank), spec, logits_TE=logits_TE)
    y_TH = _experts(x_TH, routing, weights, spec, rank, reduce=True, trace=trace, check=check)
    if residual_TH is not None:
        y_TH = y_TH + residual_TH.double()
    if trace is not None:
        trace.record(Stage.REDUCED, y_TH)
    return y_TH


def experts(x_TH: torch.Tensor, routing: Routing, weights: WeightSource | QuantisedWeights, spec: MoESpec,
            parallel: Parallel | None = None, groups: Groups | None = None, *, reduce: bool = True,
            trace: Trace | None = None, check: str = "metadata") -> torch.Tensor:
    """Experts, shared expert and weighted merge, (T, H) in fp64; reduce=False returns this rank's partial sum.

    A partial sum is one of all tokens of the tp group. An id outside [0, E + Z) contributes nothing; with
    check="values" one other than -1 raises. The trace gets logits, ids, weights, gate_up (R, G, I), act (R, I), down
    (R, H), shared and merged (T, H); R = T*K, with expert parallelism the slots that this rank serves.
    """
    check_tokens(x_TH, spec, PLAIN_DTYPES, "moe_ref")
    parallel, groups = check_groups(parallel, groups)
    check_held(weights, spec, parallel, groups.rank)
    weights = decoded(weights)
    rank = Rank(parallel, groups)
    if not reduce:
        check_partial(parallel)
    return _experts(agreed_tokens(x_TH, rank), routing, weights, spec, rank, reduce=reduce, trace=trace, check=check)


def _experts(x_TH: torch.Tensor, routing: Routing, weights: WeightSource, spec: MoESpec, rank: Rank, *, reduce: bool,
             trace: Trace | None, check: str) -> torch.Tensor:
    """The merged tokens of the tp group, completed; then what is whole on every rank."""
    check_routing(routing, spec, len(x_TH), check)
    check_devices(x_TH, weights, routing)
    _record(trace, {Stage.LOGITS: routing.logits_TE, Stage.IDS: routing.ids_TK, Stage.WEIGHTS: routing.weights_TK})
    routing = with_gates(routing, x_TH, weights, spec, rank)
    tokens = enter_tokens(x_TH, routing, spec, rank)
    merged_TH = _merged(tokens, weights, spec, rank, trace)
    _record(trace, {Stage.MERGED: merged_TH})
    if not reduce:
        return merged_TH
    y_TH = merged_TH if rank.by_slot else complete(merged_TH, tokens.counts, rank)
    if not rank.whole_shared:
        return y_TH
    shared_TH = shared_rows(x_TH.double(), routing.shared_TS, weights, spec, rank)
    _record(trace, {Stage.SHARED: shared_TH})
    return _finished(y_TH if shared_TH is None else y_TH + shared_TH, weights, spec, rank)


def _merged(tokens: GroupTokens, weights: WeightSource, spec: MoESpec, rank: Rank,
            trace: Trace | None) -> torch.Tensor:
    """The weighted merge, (T, H): a partial sum, columns of the result, or, from rows that were reduced, all of it."""
    y_TH = _routed(tokens, weights, spec, rank, trace)
    shared_TH = None
    if not rank.whole_shared:
        shared_TH = shared_rows(tokens.x_TH, tokens.shared_TS, weights, spec, rank)
        _record(trace, {Stage.SHARED: shared_TH})
    if rank.by_slot:
        rows_TKH = y_TH.unflatten(0, tokens.ids_TK.shape)
        if shared_TH is not None:
            rows_TKH = torch.cat([rows_TKH, shared_TH[:, None]], dim=1)
        y_TH = leave(rows_TKH, *rank.with_other_parts).sum(1)
    elif shared_TH is not None:
        y_TH = y_TH + shared_TH
    return y_TH if rank.whole_shared else _finished(y_TH, weights, spec, rank)


def _routed(tokens: GroupTokens, weights: WeightSource, spec: MoESpec, rank: Rank,
            trace: Trace | None) -> torch.Tensor:
    """Routed and identity experts, added up by token, (T, H), or left by slot, (T*K, H)."""
    place_TK, num_places = places(tokens.ids_TK, rank.by_slot)
    if rank.parallel.tokens.over_ep:
        y_PH = _travelled(tokens, weights, spec, rank, trace)
        y_PH = y_PH if rank.by_slot else y_PH.unflatten(0, tokens.ids_TK.shape).sum(1)
        add_identity(y_PH, tokens, place_TK, spec, rank, None)
        return y_PH
    ids_TK = tokens.ids_TK.where(tokens.ids_TK < spec.num_experts, -1)
    slots = Slots(tokens.x_TH, rank.served(ids_TK, spec.num_experts), tokens.weights_TK, place_TK, num_places)
    rows = RoutedRows(trace, slots.local_TK, spec, rank)
    sums_of = gathered_sums if rank.by_output else expert_sums
    y_PH = sums_of(slots, unbound(weights), spec, rank, tie(slots, weights), rows)
    add_identity(y_PH, tokens, place_TK, spec, rank, rows)
    rows.record()
    return y_PH


def _travelled(tokens: GroupTokens, weights: WeightSource, spec: MoESpec, rank: Rank,
               trace: Trace | None) -> torch.Tensor:
    """Rows of every slot, (T*K, H), computed where the expert is."""
    sent = send(tokens, spec.num_experts, rank)
    slots = Slots(sent.x_RH, sent.local_R1, sent.weights_R1, *places(sent.local_R1, by_slot=True))
    rows = RoutedRows(trace, slots.local_TK, spec, rank)
    rows_RH = expert_sums(slots, unbound(weights), spec, rank, tie(slots, weights), rows)
    rows.record()
    return send_back(rows_RH, sent, tokens.ids_TK.numel(), rank)


def _finished(y_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, rank: Rank) -> torch.Tensor:
    """The mean with the shared expert, where it is one, and the output's bias."""
    if spec.shared is not None and spec.shared.merge == "mean":
        y_TH = y_TH / 2
    if weights.output_bias_H is None:
        return y_TH
    if rank.by_slot or rank.whole_shared:  # the sum is complete, and every rank adds it
        return y_TH + enter(weights.output_bias_H.double(), *rank.with_other_tokens)
    return y_TH + whole_in_sum(weights.output_bias_H, rank)


def _record(trace: Trace | None, stages: dict[Stage, torch.Tensor | None]) -> None:
    if trace is not None:
        for stage, tensor in stages.items():
            if tensor is not None:
                trace.record(stage, tensor)
