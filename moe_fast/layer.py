"""The layer of moe_fast: checks, launches and one all-reduce; no mathematics of its own."""

import torch

from moe_fast.capabilities import check_supported
from moe_fast.kernels.align import align
from moe_fast.kernels.combine import combine
from moe_fast.kernels.down import down
from moe_fast.kernels.gate_up import gate_up
from moe_fast.kernels.router import router_logits, select
from moe_fast.observe import record_routed_rows, record_routing
from moe_fast.tiles import gemm_tile
from moe_ref.contract.checks import (
    check_groups,
    check_injected,
    check_logits,
    check_residual,
    check_routing,
    check_tokens,
)
from moe_ref.contract.comm import Groups
from moe_ref.contract.errors import UsageTypeError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights, MoEWeights, WeightSource, check_weights, check_whole_parameters

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def route(x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, *,
          logits_TE: torch.Tensor | None = None) -> Routing:
    """Ids (int32), weights, logits and shared gate, computed and stored in fp32.

    logits_TE, if given, replaces x @ router^T. Raises UsageValueError / UsageTypeError on wrong metadata.
    """
    check_tokens(x_TH, spec, DTYPES, "moe_fast")
    check_supported(spec)
    check_whole_parameters(weights, spec)
    shared_TS = _shared_gate(x_TH, weights)
    if spec.router is None:
        ids_TK = torch.zeros(len(x_TH), 1, dtype=torch.int32, device=x_TH.device)
        return Routing(ids_TK, torch.ones_like(ids_TK, dtype=torch.float32), shared_TS=shared_TS)
    if logits_TE is None:
        assert weights.router_EH is not None
        logits_TE = router_logits(x_TH, weights.router_EH)
    check_logits(logits_TE, spec, len(x_TH))
    logits_TE = logits_TE.to(torch.float32)
    ids_TK, weights_TK = select(logits_TE, weights.selection_bias_E, spec.router)
    return Routing(ids_TK, weights_TK, logits_TE, shared_TS)


def _shared_gate(x_TH: torch.Tensor, weights: WeightSource) -> torch.Tensor | None:
    """The gate is a sigmoid router with one expert, so the router's kernels compute it."""
    if weights.shared_gate_SH is None:
        return None
    gate_logits = router_logits(x_TH, weights.shared_gate_SH)
    return select(gate_logits, None, Router(num_experts=1, top_k=1, score="sigmoid"))[1]


def experts(x_TH: torch.Tensor, routing: Routing, weights: WeightSource, spec: MoESpec,
            parallel: Parallel | None = None, groups: Groups | None = None, *, reduce: bool = True,
            trace: Trace | None = None, check: str = "metadata") -> torch.Tensor:
    """Experts, shared expert and weighted merge, (T, H) in x's dtype; reduce=False returns the partial sum.

    Products accumulate in fp32; act, down, shared and merged rows are rounded to x's dtype. An id outside
    [0, E) contributes nothing; with check="values" it raises. Raises before any kernel starts.
    """
    check_tokens(x_TH, spec, DTYPES, "moe_fast")
    check_supported(spec)
    parallel, groups = check_groups(parallel, groups)
    check_weights(weights, spec, parallel, groups.tp.rank)
    stacked = _in_memory(weights)
    check_routing(routing, spec, len(x_TH), check)
    record_routing(trace, routing)
    routed = ExpertWeights(stacked.w13_EGIH, stacked.w2_EHI)
    down_RH = _mlp_rows(x_TH, routing.ids_TK, routing.weights_TK, routed, spec.experts.activation, trace)
    merged_TH = combine(down_RH, _shared_rows(x_TH, routing, weights, spec, trace), routing.ids_TK, spec.num_experts)
    if trace is not None:
        trace.record(Stage.MERGED, merged_TH)
    return groups.tp.all_reduce(merged_TH) if reduce and groups.tp.size > 1 else merged_TH


def _in_memory(weights: WeightSource) -> MoEWeights:
    """Kernels read all experts of a rank from one tensor."""
    if not isinstance(weights, MoEWeights):
        raise UsageTypeError(f"weights: {type(weights).__name__}, but should be MoEWeights, all experts in memory "
                             "[moe_fast]")
    return weights


def _mlp_rows(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, stacked: ExpertWeights,
              activation: str, trace: Trace | None) -> torch.Tensor:
    (num_experts, _, intermediate, hidden), top_k = stacked.w13_GIH.shape, ids_TK.shape[1]
    rows_per_expert = -(-ids_TK.numel() // num_experts)
    first = gemm_tile(x_TH.device, x_TH.dtype, rows_per_expert, intermediate, hidden, accumulators=2)
    second = gemm_tile(x_TH.device, x_TH.dtype, rows_per_expert, hidden, intermediate)
    assert first.block_m == second.block_m
    alignment = align(ids_TK, num_experts, first.block_m)
    act_RI = gate_up(x_TH, stacked.w13_GIH, alignment, top_k, activation, first)
    row_weights_R = weights_TK.to(torch.float32).reshape(-1)
    down_RH = down(act_RI, stacked.w2_HI, row_weights_R, alignment, second)
    record_routed_rows(trace, alignment, act_RI, down_RH, ids_TK, num_experts)
    return down_RH


def _shared_rows(x_TH: torch.Tensor, routing: Routing, weights: WeightSource, spec: MoESpec,
                 trace: Trace | None) -> torch.Tensor | None:
    """The shared expert is a layer of one expert that every token visits, weighted by its gate."""
    shared = weights.shared_expert()
    if spec.shared is None or shared is None:
        return None
    ids_T1 = torch.zeros(len(x_TH), 1, dtype=torch.int32, device=x_TH.device)
    gate_TS = routing.shared_TS if routing.shared_TS is not None else _shared_gate(x_TH, weights)
    if gate_TS is None:
        gate_TS = torch.ones_like(ids_T1, dtype=torch.float32)
    stacked = ExpertWeights(shared.w13_GIH[None], shared.w2_HI[None])
    shared_TH = _mlp_rows(x_TH, ids_T1, gate_TS, stacked, spec.shared.mlp.activation, None)
    if trace is not None:
        trace.record(Stage.SHARED, shared_TH)
    return shared_TH


def moe(x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, parallel: Parallel | None = None,
        groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
        residual_TH: torch.Tensor | None = None, trace: Trace | None = None,
        check: str = "metadata") -> torch.Tensor:
    """The whole layer, (T, H) in x's dtype: route (unless injected), experts, one all-reduce, residual once.

    Raises UsageValueError / UsageTypeError on wrong shapes, dtypes or world size before any kernel starts.
    """
    check_tokens(x_TH, spec, DTYPES, "moe_fast")
    check_supported(spec)
    parallel, groups = check_groups(parallel, groups)
    check_weights(weights, spec, parallel, groups.tp.rank)
    check_injected(routing, logits_TE)
    if residual_TH is not None:
        check_residual(residual_TH, x_TH)
    if routing is None:
        routing = route(x_TH, weights, spec, logits_TE=logits_TE)
    y_TH = experts(x_TH, routing, weights, spec, parallel, groups, trace=trace, check=check)
    if residual_TH is not None:
        y_TH = y_TH + residual_TH
    if trace is not None:
        trace.record(Stage.REDUCED, y_TH)
    return y_TH
