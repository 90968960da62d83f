"""The oracle on a grid of ranks is the unsharded oracle: outputs, stages and collectives, in every form.

Where numbers are whole (tests/parallel_cases.py) fp64 is exact in any order, and results are compared for equality;
drawn numbers are compared within the bound of tests/double/bound.py.
"""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

import moe_ref
from moe_ref import Capacity, Case, Groups, MoESpec, Parallel, Router, Stage, Trace
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.shares import RankShare, rank_shares
from moe_ref.contract.vocabulary import Schedule, SharedPlacement
from tests.double.border import to_choices
from tests.double.bound import whole_difference
from tests.parallel_cases import CASES, FORMS, Layer, drawn_layer, on_ranks, split, whole_numbers

LAYER_WITH_EVERYTHING = "T9.H24.I20.E6.K2-fp32-norm-mlpbias-sh10-shgate-shmlpbias-outbias-res"
Calls = list[tuple[str, str, int]]


def run(layer: Layer, parallel: Parallel | None = None, groups: Groups | None = None) -> tuple[torch.Tensor, Trace]:
    """moe_ref.moe of a layer or a rank's part of it, and its trace."""
    trace = Trace()
    y_TH = moe_ref.moe(layer.x_TH, layer.weights, layer.spec, parallel, groups, routing=layer.routing,
                       logits_TE=layer.logits_TE, residual_TH=layer.residual_TH, trace=trace)
    return y_TH, trace


@cache
def drawn_truth(name: str) -> tuple[torch.Tensor, Trace, np.ndarray]:
    """Output and trace of the unsharded layer, and how far another right evaluation on 6 ranks may be from it."""
    layer = drawn_layer(name)
    y_TH, trace = run(layer)
    arrays = {field: tensor.numpy() for field, tensor in layer.weights.named_tensors()}
    routing = moe_ref.route(layer.x_TH, layer.weights, layer.spec, logits_TE=layer.logits_TE)
    logits_TE = None if layer.logits_TE is None else layer.logits_TE.double().numpy()
    x_TH = layer.x_TH.numpy()
    return y_TH, trace, whole_difference(x_TH, to_choices(routing, x_TH, arrays, layer.spec), arrays, layer.spec,
                                         parallel=Parallel(tp=6), residual_TH=layer.residual_TH.numpy(),
                                         logits_TE=logits_TE)


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("case_id", CASES, ids=CASES)
def test_every_rank_returns_its_tokens(case_id: str) -> None:
    """Routed by each rank for its own tokens: the same experts, and the output within rounding of the unsharded one."""
    (name, _), case = split(case_id), parse_case(case_id)
    y_TH, trace, difference_TH = drawn_truth(name)
    ranks = on_ranks(case, drawn_layer(name), lambda mine, _, groups: run(mine, case.parallel, groups))
    for share, ((own_TH, own_trace), _) in zip(rank_shares(case), ranks, strict=True):
        own = slice(*share.tokens)
        assert torch.equal(own_trace.tensors[Stage.IDS], trace.tensors[Stage.IDS][own])
        assert own_TH.shape == y_TH[own].shape
        assert (np.abs((own_TH - y_TH[own]).numpy()) <= difference_TH[own]).all()
        same = [other for other, one in zip(ranks, rank_shares(case), strict=True) if one.tokens == share.tokens]
        assert all(torch.equal(other_TH, own_TH) for (other_TH, _), _ in same), "ranks disagree"


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("case_id", CASES, ids=CASES)
def test_collectives(case_id: str) -> None:
    """Which collectives, over which group, in which order, of how many elements."""
    (name, _), case = split(case_id), parse_case(case_id)
    layer = whole_numbers(name)
    ranks = on_ranks(case, layer, lambda mine, _, groups: run(mine, case.parallel, groups))
    for share, (_, calls) in zip(rank_shares(case), ranks, strict=True):
        counted = [(call.group, call.operation, call.num_elements) for call in calls]
        assert counted == expected_calls(case, share, layer.routing.ids_TK)


def expected_calls(case: Case, share: RankShare, ids_TK: torch.Tensor) -> Calls:
    """The volumes as documented, counted by hand."""
    spec, parallel = case.problem.spec, case.parallel
    hidden, top_k, whole_shared = spec.hidden_size, spec.top_k, parallel.shared is SharedPlacement.REPLICATED
    own, merged = share.tokens[1] - share.tokens[0], share.merged_tokens[1] - share.merged_tokens[0]
    cut_shared = spec.shared is not None and not whole_shared
    calls: Calls = []
    if parallel.schedule is Schedule.GATHER:
        calls += [("tp", "broadcast", own * hidden),
                  ("tp", "all_gather", own * top_k * (share.columns[1] - share.columns[0]))]
        if cut_shared:
            calls.append(("tp", "all_gather", own * (share.shared_columns[1] - share.shared_columns[0])))
        return [*calls, ("tp", "all_gather", own * (share.outputs[1] - share.outputs[0]))]
    if parallel.tokens.over_tp:
        gates = spec.shared.num_gates if spec.shared is not None and cut_shared else 0
        widths = [hidden, top_k, top_k] + [gates] * (gates > 0)
        calls += [("tp", "all_gather", own * width) for width in widths]
    if parallel.tokens.over_ep:
        sent = len(travelling(case, share, ids_TK))
        homes = [one for one in rank_shares(case) if one.tp_rank == share.tp_rank]
        received = sum(host == share.ep_rank for home in homes for host in travelling(case, home, ids_TK))
        calls += [("ep", "all_to_all", sent * width) for width in (hidden, 1, 1)]
        calls.append(("ep", "all_to_all", received * hidden))
    both = ("tp",) if parallel.tokens.over_ep else ("tp", "ep")
    if parallel.schedule is Schedule.ALL_REDUCE:
        calls += [(group, "all_reduce", merged * hidden) for group in both]
    elif parallel.schedule is Schedule.ALL_REDUCE_ROWS:
        calls += [(group, "all_reduce", merged * (top_k + cut_shared) * hidden) for group in both]
    else:
        scattered = own
        if not parallel.tokens.over_tp:  # cut evenly, at ceil(tokens * ranks so far / tp)
            scattered = -(-merged * (share.tp_rank + 1) // parallel.tp) - -(-merged * share.tp_rank // parallel.tp)
        calls.append(("tp", "reduce_scatter", merged * hidden))
        calls += [("ep", "all_reduce", scattered * hidden)] * (not parallel.tokens.over_ep)
        calls += [("tp", "all_gather", scattered * hidden)] * (not parallel.tokens.over_tp)
    return [call for call in calls if (parallel.tp if call[0] == "tp" else parallel.ep) > 1]


def travelling(case: Case, share: RankShare, ids_TK: torch.Tensor) -> list[int]:
    """The ep rank that serves each slot of a tp group's tokens; slots without a routed expert left out."""
    hosts = {e: [rank for rank, experts in enumerate(case.parallel.hosted(case.problem.spec.num_experts))
                 for held in experts if held == e] for e in range(case.problem.spec.num_experts)}
    return [hosts[e][row % len(hosts[e])]
            for row, ids in enumerate(ids_TK[slice(*share.merged_tokens)].tolist()) for e in ids if e in hosts]


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("case_id", CASES, ids=CASES)
def test_stages(case_id: str) -> None:
    """Every stage of every rank holds its rows and columns of the unsharded stage, to the bit, and the sums add up."""
    (name, _), case = split(case_id), parse_case(case_id)
    layer = whole_numbers(name)
    y_TH, truth = run(layer)
    ranks = on_ranks(case, layer, lambda mine, _, groups: run(mine, case.parallel, groups))
    shares, traces = rank_shares(case), [trace.tensors for (_, trace), _ in ranks]
    for share, ((own_TH, _), _), stages in zip(shares, ranks, traces, strict=True):
        own = slice(*share.tokens)
        assert torch.equal(own_TH, y_TH[own])
        assert torch.equal(stages[Stage.REDUCED], y_TH[own])
        assert torch.equal(stages[Stage.IDS], layer.routing.ids_TK[own])
        assert torch.equal(stages[Stage.WEIGHTS], layer.routing.weights_TK[own])
        rows_R, columns = routed_rows(case, share, layer.routing.ids_TK), slice(*share.columns)
        assert torch.equal(stages[Stage.GATE_UP], truth.tensors[Stage.GATE_UP][rows_R][..., columns])
        assert torch.equal(stages[Stage.ACT], truth.tensors[Stage.ACT][rows_R][..., columns])
    for ep_rank in range(case.parallel.ep):
        rows_R = routed_rows(case, shares[ep_rank * case.parallel.tp], layer.routing.ids_TK)
        group = [one.rank for one in shares if one.ep_rank == ep_rank]
        assert torch.equal(put_together(case, [traces[rank][Stage.DOWN] for rank in group]),
                           truth.tensors[Stage.DOWN][rows_R])
    check_sums(case, layer, truth, traces)


def put_together(case: Case, parts: list[torch.Tensor]) -> torch.Tensor:
    """Columns side by side under the gather schedule, partial sums added up otherwise."""
    return torch.cat(parts, dim=1) if case.parallel.schedule is Schedule.GATHER else torch.stack(parts).sum(0)


def check_sums(case: Case, layer: Layer, truth: Trace, traces: list[dict[Stage, torch.Tensor]]) -> None:
    """Shared and merged of the ranks that work on the same tokens; a whole shared expert is not in their merge."""
    shares, whole_shared = rank_shares(case), case.parallel.shared is SharedPlacement.REPLICATED
    merged_TH = routed_alone(layer) if whole_shared else truth.tensors[Stage.MERGED]
    apart = case.parallel.tokens.over_ep
    for ep_rank in range(case.parallel.ep if apart else 1):
        ranks = [one.rank for one in shares if one.ep_rank == ep_rank or not apart]
        tokens = slice(*shares[ranks[0]].merged_tokens)
        if case.parallel.schedule is Schedule.ALL_REDUCE_ROWS:
            assert all(torch.equal(traces[rank][Stage.MERGED], merged_TH[tokens]) for rank in ranks)
        else:
            parts = [traces[rank][Stage.MERGED] for rank in ranks]
            assert torch.equal(put_together(case, parts), merged_TH[tokens])
        if layer.spec.shared is not None and not whole_shared:
            parts = [traces[rank][Stage.SHARED] for rank in ranks]
            assert torch.equal(put_together(case, parts), truth.tensors[Stage.SHARED][tokens])
    if layer.spec.shared is not None and whole_shared:
        assert all(torch.equal(stages[Stage.SHARED], truth.tensors[Stage.SHARED][slice(*share.tokens)])
                   for share, stages in zip(shares, traces, strict=True))


def routed_alone(layer: Layer) -> torch.Tensor:
    """The merge of a layer that has no shared expert and no bias of the output."""
    spec, weights = replace(layer.spec, shared=None, output_bias=False), dict(layer.weights.named_tensors())
    kept = {name: tensor for name, tensor in weights.items() if "shared" not in name and name != "output_bias_H"}
    routing = replace(layer.routing, shared_TS=None)
    return moe_ref.experts(layer.x_TH, routing, moe_ref.MoEWeights(**kept), spec)


def routed_rows(case: Case, share: RankShare, ids_TK: torch.Tensor) -> list[int]:
    """The slots of the unsharded trace, token * K + slot, that a rank's rows are of, in order."""
    num_tokens, top_k = ids_TK.shape
    if case.parallel.ep == 1:
        return list(range(num_tokens * top_k))
    groups = {one.merged_tokens for one in rank_shares(case)}
    rows = []
    for start, stop in sorted(groups):
        one = replace(share, merged_tokens=(start, stop))
        hosts = iter(travelling(case, one, ids_TK))
        slots = [(token, slot) for token, slot in product(range(start, stop), range(top_k))
                 if 0 <= ids_TK[token, slot] < case.problem.spec.num_experts]
        rows += [token * top_k + slot for (token, slot), host in zip(slots, hosts, strict=True)
                 if host == share.ep_rank]
    return rows


GATHER_FORMS = [form for form in FORMS if "gather" in form]


@pytest.mark.parametrize("form", GATHER_FORMS)
def test_the_gather_schedule_takes_the_tokens_of_rank_0(form: str) -> None:
    """Whatever the others hold: routing and experts work on what is broadcast."""
    name = "T9.H24.I20.E6.K2-fp32-sigmoid-norm-bias-g3.2-expertscale-sh10-shgate"
    case, (y_TH, _, difference_TH) = parse_case(f"v1-{name}-{form}"), drawn_truth(name)

    def body(mine: Layer, share: RankShare, groups: Groups) -> torch.Tensor:
        x_TH = mine.x_TH if share.rank == 0 else torch.full_like(mine.x_TH, torch.nan)
        return run(replace(mine, x_TH=x_TH), case.parallel, groups)[0]

    for own_TH, _ in on_ranks(case, drawn_layer(name), body):
        assert (np.abs((own_TH - y_TH).numpy()) <= difference_TH).all()


@pytest.mark.parametrize("form", GATHER_FORMS)
def test_a_residual_does_not_travel(form: str) -> None:
    """Each rank adds its own, after everything."""
    case, layer = parse_case(f"v1-{LAYER_WITH_EVERYTHING}-{form}"), whole_numbers(LAYER_WITH_EVERYTHING)
    y_TH, _ = run(replace(layer, residual_TH=torch.zeros_like(layer.x_TH)))

    def body(mine: Layer, share: RankShare, groups: Groups) -> torch.Tensor:
        return run(replace(mine, residual_TH=torch.full_like(mine.x_TH, share.rank)), case.parallel, groups)[0]

    for rank, (own_TH, _) in enumerate(on_ranks(case, layer, body)):
        assert torch.equal(own_TH, y_TH + rank)


@pytest.mark.parametrize("form", ["tp2-ep2", "tp2-ep2-reducescatter-copy0.0", "tp3-gather", "ep3-allreducerows"])
def test_ranks_with_the_same_tokens_drop_the_same_slots(form: str) -> None:
    """An expert's capacity counts the whole batch, which every rank has."""
    name = "T13.H24.I20.E6.K2-fp32-norm-cap2-sh10"
    case, (y_TH, trace, difference_TH) = parse_case(f"v1-{name}-{form}"), drawn_truth(name)
    assert (trace.tensors[Stage.IDS] < 0).any()
    ranks = on_ranks(case, drawn_layer(name), lambda mine, _, groups: run(mine, case.parallel, groups))
    for (own_TH, own_trace), _ in ranks:
        assert torch.equal(own_trace.tensors[Stage.IDS], trace.tensors[Stage.IDS])
        assert (np.abs((own_TH - y_TH).numpy()) <= difference_TH).all()


@pytest.mark.parametrize("form", ["ep2-tokensep", "tp2-reducescatter-tokenstp"])
def test_a_capacity_is_refused_where_a_rank_has_a_part_of_the_tokens(form: str) -> None:
    """It cannot know how full an expert is."""
    name = "T13.H24.I20.E6.K2-fp32-norm-cap2-sh10"
    case = parse_case(f"v1-{name.replace('-cap2', '')}-{form}")
    with pytest.raises(UsageValueError, match="the router's capacity counts all tokens of the batch"):
        on_ranks(case, drawn_layer(name), lambda mine, _, groups: run(mine, case.parallel, groups))


def test_a_routing_with_drops_can_be_injected_anywhere() -> None:
    """Dropped slots are ids of -1, which never travel: what a caller with a capacity of its own hands in."""
    spec = MoESpec(hidden_size=24, intermediate_size=20,
                   router=Router(num_experts=6, top_k=2, capacity=Capacity(tokens=1)))
    layer = replace(whole_numbers("T13.H24.I20.E6.K2-fp32-norm-res"), spec=replace(spec, experts=moe_ref.MLP(
        activation="relu")))
    y_TH, _ = run(layer)
    case = parse_case("v1-T13.H24.I20.E6.K2-fp32-tp2-ep2-tokensep")
    for share, ((own_TH, _), _) in zip(rank_shares(case), on_ranks(
            case, layer, lambda mine, _, groups: run(mine, case.parallel, groups)), strict=True):
        assert torch.equal(own_TH, y_TH[slice(*share.tokens)])


@pytest.mark.parametrize("form", [
    form for form in FORMS if not {"gather", "allreducerows", "wholeshared"} & set(form.split("-"))])
def test_partial_sums(form: str) -> None:
    """reduce=False leaves the last step to the caller: added up over the ranks with the same tokens, the layer."""
    case, layer = parse_case(f"v1-{LAYER_WITH_EVERYTHING}-{form}"), whole_numbers(LAYER_WITH_EVERYTHING)
    expected_TH = moe_ref.experts(layer.x_TH, layer.routing, layer.weights, layer.spec)

    def body(mine: Layer, _: RankShare, groups: Groups) -> torch.Tensor:
        return moe_ref.experts(mine.x_TH, mine.routing, mine.weights, mine.spec, case.parallel, groups, reduce=False)

    parts, shares = [part_TH for part_TH, _ in on_ranks(case, layer, body)], rank_shares(case)
    for share in shares:
        together = [parts[one.rank] for one in shares
                    if one.ep_rank == share.ep_rank or not case.parallel.tokens.over_ep]
        assert torch.equal(torch.stack(together).sum(0), expected_TH[slice(*share.merged_tokens)])


@pytest.mark.parametrize("form", ["tp3-gather", "tp3-allreducerows", "tp3-wholeshared"])
def test_no_partial_sum(form: str) -> None:
    """Columns, complete rows, or a result without its shared expert are not what reduce=False promises."""
    case, layer = parse_case(f"v1-{LAYER_WITH_EVERYTHING}-{form}"), whole_numbers(LAYER_WITH_EVERYTHING)

    def body(mine: Layer, _: RankShare, groups: Groups) -> torch.Tensor:
        return moe_ref.experts(mine.x_TH, mine.routing, mine.weights, mine.spec, case.parallel, groups, reduce=False)

    with pytest.raises(UsageValueError, match="reduce=False with"):
        on_ranks(case, layer, body)
