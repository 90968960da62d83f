"""The layer: a loop over experts, a weighted merge, one all-reduce, the residual.

    for each expert e:
        rows = the (token, slot) pairs with ids[token, slot] == e
        y[token] += weights[token, slot] * expert_e(x[token])
    y += shared_gate * shared_expert(x)
    with tensor parallelism: w1, w3 are cut by output (colwise), w2 by input (rowwise), so y is a partial
    sum on every rank, and one all-reduce completes it
    y += residual
"""

import torch

from moe_ref.contract.checks import check_groups, check_residual, check_routing, check_tokens
from moe_ref.contract.comm import Groups
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import MoEWeights, check_weights
from moe_ref.oracle import expert as formula
from moe_ref.oracle.router import route, shared_gate

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def moe(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
        groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
        residual_TH: torch.Tensor | None = None, trace: Trace | None = None,
        check: str = "metadata") -> torch.Tensor:
    """The whole layer, (T, H) in fp64: route (unless a routing is injected), experts, one all-reduce, residual.

    weights are this rank's shard. Raises UsageValueError / UsageTypeError on wrong shapes, dtypes or world
    size before anything is computed.
    """
    check_tokens(x_TH, spec, DTYPES, "moe_ref")
    parallel, groups = check_groups(parallel, groups)
    check_weights(weights, spec, parallel, groups.tp.rank)
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


def experts(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights, spec: MoESpec,
            parallel: Parallel | None = None, groups: Groups | None = None, *, reduce: bool = True,
            trace: Trace | None = None, check: str = "metadata") -> torch.Tensor:
    """Experts, shared expert and weighted merge, (T, H) in fp64; reduce=False returns this rank's partial sum.

    An id outside [0, E) contributes nothing; with check="values" it raises. The trace gets logits, ids,
    weights, gate_up (T*K, 2, I), act (T*K, I), down (T*K, H), shared and merged (T, H).
    """
    check_tokens(x_TH, spec, DTYPES, "moe_ref")
    parallel, groups = check_groups(parallel, groups)
    check_weights(weights, spec, parallel, groups.tp.rank)
    check_routing(routing, spec, len(x_TH), check)
    rows = _RoutedRows(x_TH, spec, weights.w13_EGIH.shape[2])
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device)
    for e in range(spec.num_experts):
        token_R, slot_R = (routing.ids_TK == e).nonzero(as_tuple=True)
        w13_GIH, w2_HI = weights.expert(e)
        gate_up_RGI = formula.gate_up(x_TH[token_R], w13_GIH)
        act_RI = formula.activate(gate_up_RGI, spec.experts)
        down_RH = routing.weights_TK[token_R, slot_R, None].double() * formula.down(act_RI, w2_HI)
        y_TH.index_add_(0, token_R, down_RH)
        rows.keep(trace, token_R * spec.top_k + slot_R, gate_up_RGI, act_RI, down_RH)
    y_TH += _shared(x_TH, routing, weights, spec, trace)
    rows.record(trace, routing, y_TH)
    if reduce and groups.tp.size > 1:
        y_TH = groups.tp.all_reduce(y_TH)
    return y_TH


def _shared(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights, spec: MoESpec,
            trace: Trace | None) -> torch.Tensor:
    shared = weights.shared_expert()
    if spec.shared is None or shared is None:
        return torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device)
    act_TI = formula.activate(formula.gate_up(x_TH, shared.w13_GIH), spec.shared.mlp)
    y_TH = formula.down(act_TI, shared.w2_HI)
    gate_TS = routing.shared_TS if routing.shared_TS is not None else shared_gate(x_TH, weights)
    if gate_TS is not None:
        y_TH = y_TH * gate_TS.double()
    if trace is not None:
        trace.record(Stage.SHARED, y_TH)
    return y_TH


class _RoutedRows:
    """Routed rows in (token, slot) order for the trace; costs nothing without one."""

    def __init__(self, x_TH: torch.Tensor, spec: MoESpec, intermediate: int) -> None:
        self.num_rows, self.options = len(x_TH) * spec.top_k, {"dtype": torch.float64, "device": x_TH.device}
        self.widths = {Stage.GATE_UP: (2, intermediate), Stage.ACT: (intermediate,), Stage.DOWN: (spec.hidden_size,)}
        self.rows: dict[Stage, torch.Tensor] = {}

    def keep(self, trace: Trace | None, index_R: torch.Tensor, *tensors: torch.Tensor) -> None:
        if trace is None:
            return
        for (stage, width), tensor in zip(self.widths.items(), tensors, strict=True):
            if stage not in self.rows:
                self.rows[stage] = torch.zeros(self.num_rows, *width, **self.options)
            self.rows[stage][index_R] = tensor

    def record(self, trace: Trace | None, routing: Routing, merged_TH: torch.Tensor) -> None:
        if trace is None:
            return
        if routing.logits_TE is not None:
            trace.record(Stage.LOGITS, routing.logits_TE)
        trace.record(Stage.IDS, routing.ids_TK)
        trace.record(Stage.WEIGHTS, routing.weights_TK)
        for stage, tensor in self.rows.items():
            trace.record(stage, tensor)
        trace.record(Stage.MERGED, merged_TH)
