"""Autograd through the oracle on a grid of ranks gives the unsharded layer's gradients, in every form.

What several ranks hold has one complete gradient, the same bits on each; slices put together, copies of an expert
added up, are the whole. Whole numbers (tests/parallel_cases.py) are compared for equality, drawn ones, through the
router, within the bound of tests/backward_bound.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.autograd.function import once_differentiable

import moe_ref
from moe_ref import Case, Groups, MoEWeights, Parallel, Routing
from moe_ref.contract import collectives
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.placements import PLACEMENTS, part_range, placements
from moe_ref.contract.shares import RankShare, rank_shares
from moe_ref.oracle import layer as oracle_layer
from moe_ref.oracle.backward.layer import experts_backward, moe_backward
from tests import backward_cases
from tests.backward_bound import Named, bounds, excess, named
from tests.parallel_cases import CASES, FORMS, LAYERS, Layer, drawn_layer, on_ranks, split, whole_numbers

TOKENS = ("x_TH", "residual_TH", "weights_TK", "shared_TS")
"""Gradients of what belongs to tokens; everything else is a parameter."""


def with_leaves(layer: Layer, wanted: Callable[[str], bool] = lambda name: True) -> tuple[Layer, Named]:
    """The layer over the starts of a graph, and those by name; `wanted` says which want a gradient."""
    leaves = {name: tensor.clone() for name, tensor in layer.weights.named_tensors()}
    names = list(leaves)
    leaves |= {"x_TH": layer.x_TH.clone(), "residual_TH": layer.residual_TH.clone()}
    routing = layer.routing
    if routing is not None:
        leaves["weights_TK"] = routing.weights_TK.clone()
        if routing.shared_TS is not None:
            leaves["shared_TS"] = routing.shared_TS.clone()
        routing = Routing(routing.ids_TK, leaves["weights_TK"], shared_TS=leaves.get("shared_TS"))
    for name, leaf in leaves.items():
        leaf.requires_grad_(wanted(name))
    weights = MoEWeights(**{name: leaves[name] for name in names})
    return replace(layer, weights=weights, x_TH=leaves["x_TH"], residual_TH=leaves["residual_TH"],
                   routing=routing), dict(leaves)


def output(layer: Layer, parallel: Parallel | None, groups: Groups | None) -> torch.Tensor:
    """moe_ref.moe of a layer or a rank's part of it."""
    return moe_ref.moe(layer.x_TH, layer.weights, layer.spec, parallel, groups, routing=layer.routing,
                       logits_TE=layer.logits_TE, residual_TH=layer.residual_TH)


def gradients(layer: Layer, parallel: Parallel | None = None, groups: Groups | None = None,
              wanted: Callable[[str], bool] = lambda name: True) -> Named:
    """Of sum(grad_y * moe), by autograd, with respect to what moe is handed and `wanted` names."""
    layer, leaves = with_leaves(layer, wanted)
    (output(layer, parallel, groups) * layer.grad_y_TH).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}


def assembled(case: Case, layer: Layer, wanted: Callable[[str], bool] = lambda name: True) -> Named:
    """The ranks' gradients put together; that equal parts have equal bits is asserted on the way."""
    ranks = on_ranks(case, layer, lambda mine, _, groups: gradients(mine, case.parallel, groups, wanted))
    parts, shares = [gradient for gradient, _ in ranks], rank_shares(case)
    whole = dict(layer.weights.named_tensors()) | {"x_TH": layer.x_TH, "residual_TH": layer.residual_TH}
    if layer.routing is not None:
        whole |= {"weights_TK": layer.routing.weights_TK, "shared_TS": layer.routing.shared_TS}
    return {name: put_together(name, tensor, [part[name] for part in parts], case, shares)
            for name, tensor in whole.items() if tensor is not None}


def put_together(name: str, whole: torch.Tensor, parts: list[torch.Tensor | None], case: Case,
                  shares: tuple[RankShare, ...]) -> torch.Tensor | None:
    """One gradient from those of all ranks; of ranks that hold the same part of it the first one's counts."""
    if any(part is None for part in parts):
        assert all(part is None for part in parts), f"{name}: only some ranks have a gradient"
        return None
    total, seen = torch.zeros_like(whole), {}
    for share, part in zip(shares, parts, strict=True):
        held = share.tokens if name in TOKENS else _held(name, whole, case.parallel, share)
        if held in seen:
            assert torch.equal(part, seen[held]), f"{name}: ranks with the same part disagree"
            continue
        seen[held] = part
        if name in TOKENS:
            total[slice(*held)] += part
        else:
            _add_part(total, part, held, name, case.parallel)
    return total


def _held(name: str, whole: torch.Tensor, parallel: Parallel, share: RankShare) -> tuple:
    """Which experts and which range of the cut axis a rank holds, None for all; copies are apart by their rank."""
    dim = placements(parallel)[name].shard_dim
    columns = None if dim is None else part_range(name, whole.shape[dim], parallel, share.rank)
    if PLACEMENTS[name].expert_dim is None:
        return None, columns
    return (share.ep_rank, share.experts), columns


def _add_part(total: torch.Tensor, part: torch.Tensor, held: tuple, name: str, parallel: Parallel) -> None:
    experts, columns = held
    dim = placements(parallel)[name].shard_dim
    target = total if columns is None or dim is None else total.narrow(dim, columns[0], columns[1] - columns[0])
    if experts is None:
        target += part
    else:
        target.index_add_(0, torch.tensor(experts[1], dtype=torch.int64), part)


@cache
def whole_truth(name: str) -> Named:
    """The written-out gradients of the unsharded layer of whole numbers."""
    layer = whole_numbers(name)
    written = named(experts_backward(layer.grad_y_TH, layer.x_TH, layer.routing, layer.weights, layer.spec))
    return written | {"residual_TH": layer.grad_y_TH}


@cache
def drawn_truth(name: str) -> tuple[Named, Named]:
    """The written-out gradients of the unsharded drawn layer, and their bounds."""
    layer = drawn_layer(name)
    routing = moe_ref.route(layer.x_TH, layer.weights, layer.spec, logits_TE=layer.logits_TE)
    inputs = backward_cases.Inputs(layer.x_TH, layer.weights, layer.grad_y_TH, layer.residual_TH)
    written = named(moe_backward(layer.grad_y_TH, layer.x_TH, layer.weights, layer.spec, logits_TE=layer.logits_TE))
    return written, bounds(inputs, layer.spec, routing, layer.logits_TE)


def wrong_whole_numbers(case_id: str) -> list[str]:
    """Names of the gradients that are not those of the unsharded layer."""
    (name, _), case = split(case_id), parse_case(case_id)
    together, truth = assembled(case, whole_numbers(name)), whole_truth(name)
    wrong = []
    for field, gradient in together.items():
        expected = truth.get(field)
        if gradient is None or expected is None:
            same = not any(one is not None and one.any() for one in (gradient, expected))
        else:
            same = torch.equal(gradient, expected)
        wrong += [field] * (not same)
    return wrong


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("case_id", CASES, ids=CASES)
def test_experts(case_id: str) -> None:
    """A routing is handed in: tokens, its weights and gates, every shard, every bias; exact."""
    assert wrong_whole_numbers(case_id) == []


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("case_id", CASES, ids=CASES)
def test_through_the_router(case_id: str) -> None:
    """Each rank routes its own tokens: the router's gradient is that of all tokens, on every rank."""
    (name, _), case = split(case_id), parse_case(case_id)
    written, allowed = drawn_truth(name)
    ratios = excess(assembled(case, drawn_layer(name)), written,
                    {field: bound for field, bound in allowed.items() if field != "logits_TE"})
    assert {field: ratio for field, ratio in ratios.items() if not ratio <= 1} == {}


EVERYTHING = "T9.H24.I20.E6.K2-fp32-norm-mlpbias-sh10-shgate-shmlpbias-outbias-res"


@pytest.mark.parametrize("name", LAYERS)
def test_whole_numbers_are_exact(name: str) -> None:
    """With absolute values for all inputs every sum is one of absolute values: far below 2^53, halves included."""
    layer = whole_numbers(name)
    weights = MoEWeights(**{field: tensor.abs() for field, tensor in layer.weights.named_tensors()})
    routing = replace(layer.routing, weights_TK=layer.routing.weights_TK.abs())
    positive = replace(layer, x_TH=layer.x_TH.abs(), weights=weights, routing=routing,
                       residual_TH=layer.residual_TH.abs(), grad_y_TH=layer.grad_y_TH.abs())
    numbers = [output(positive, None, None), *gradients(positive).values()]
    assert all((tensor < 2**24).all() for tensor in numbers if tensor is not None)
    assert all(torch.equal(tensor, tensor.round()) for _, tensor in layer.weights.named_tensors())


def test_the_comparison_is_not_of_zeros() -> None:
    """Every gradient of the layer with one of everything has other elements than 0."""
    missing = [name for name, gradient in gradients(whole_numbers(EVERYTHING)).items()
               if (gradient is None or not gradient.any()) and name not in ("router_EH", "shared_gate_SH")]
    assert missing == []
    written, _ = drawn_truth(EVERYTHING)
    assert all(written[name] is not None and written[name].any() for name in ("router_EH", "shared_gate_SH"))


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith(("ep", "tp2-ep"))])
@pytest.mark.parametrize("wanted", ["w13_EGIH", "x_TH", "shared_w2_HI", "weights_TK", "output_bias_H"])
def test_ranks_without_rows_take_part(form: str, wanted: str) -> None:
    """All tokens go to one expert and only one tensor wants a gradient: no rank waits, and every rank has one."""
    name = "T9.H24.I20.E6.K1-fp32-sh10-outbias-allone"
    case, layer = parse_case(f"v1-{name}-{form}"), whole_numbers(name)
    together = assembled(case, layer, lambda field: field == wanted)
    expected = whole_truth(name)[wanted]
    assert expected is not None
    assert together[wanted] is not None
    assert torch.equal(together[wanted], expected)


def _as_it_is(ctx: object, gradient: torch.Tensor) -> tuple:
    return gradient, None


def _doubled(ctx: object, gradient: torch.Tensor) -> tuple:
    return 2 * gradient, None


def _all_reduced_twice(ctx: Any, gradient: torch.Tensor) -> tuple:
    return ctx.comm.all_reduce(ctx.comm.all_reduce(gradient)), None


def _own_part_alone(ctx: Any, *parts: torch.Tensor) -> tuple:
    return parts[ctx.comm.rank], None


def _others_forgotten(ctx: Any, gradient: torch.Tensor) -> tuple:
    parts = ctx.comm.all_gather(gradient)
    return torch.cat([part * (rank == ctx.comm.rank) for rank, part in enumerate(parts)]), None, None


def _stays_away(ctx: Any, *parts: torch.Tensor) -> tuple:
    return None, *(0 * part for part in ctx.comm.all_to_all(parts))


def _doubled_part(ctx: Any, gradient: torch.Tensor) -> tuple:
    return 2 * gradient[ctx.start:ctx.start + ctx.rows], None


MUTANTS = {
    "enter: not added up": ("_Enter", _as_it_is, "tp3"),
    "enter: not added up over ep": ("_Enter", _as_it_is, "ep3"),
    "enter: added up twice": ("_Enter", _all_reduced_twice, "tp2-ep2"),
    "gather: own part alone": ("_Gather", _own_part_alone, "tp3-reducescatter-tokenstp-share3.0.1"),
    "gather: columns of one rank alone": ("_Gather", _own_part_alone, "tp3-gather"),
    "leave: doubled": ("_Leave", _doubled, "tp3-allreducerows"),
    "scatter: others forgotten": ("_Scatter", _others_forgotten, "tp3-reducescatter"),
    "assemble: doubled": ("_Assemble", _doubled_part, "tp3-gather"),
    "exchange: does not come back": ("_Exchange", _stays_away, "ep3-tokensep-share2.0.1"),
    "copy: doubled": ("_Copy", _doubled, "tp3-gather"),
}
"""A wrong backward pass of each collective, and a form that uses it."""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_missing_or_doubled_reduction_is_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison notices any collective whose gradient is wrong."""
    name, wrong, form = MUTANTS[mutant]
    monkeypatch.setattr(getattr(collectives, name), "backward", staticmethod(once_differentiable(wrong)))
    with pytest.raises(AssertionError):
        test_experts(f"v1-{EVERYTHING}-{form}")


@pytest.mark.parametrize("form", ["tp3-reducescatter-tokenstp-share3.0.1", "ep3-tokensep-share2.0.1",
                                  "tp2-ep2-reducescatter-tokensboth-share3.0.1.2"])
def test_a_router_that_learns_from_own_tokens_alone_is_seen(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient has to be added up over ranks with other tokens, or the ranks drift apart in training."""
    monkeypatch.setattr(oracle_layer, "RouterOverTokens", lambda weights, rank: weights)
    with pytest.raises(AssertionError, match="router_EH: ranks with the same part disagree"):
        test_through_the_router(f"v1-{EVERYTHING}-{form}")


@pytest.mark.parametrize("form", ["tp3", "tp3-allreducerows", "tp3-reducescatter", "tp3-gather", "ep3-tokensep",
                                  "tp2-ep2-reducescatter-tokensboth"])
def test_second_derivatives_are_refused(form: str) -> None:
    """The collectives are differentiable once: a silent wrong Hessian is worse than none."""
    case, layer = parse_case(f"v1-{EVERYTHING}-{form}"), drawn_layer(EVERYTHING)

    def body(mine: Layer, _: RankShare, groups: Groups) -> None:
        mine, _ = with_leaves(mine)
        y_TH = output(mine, case.parallel, groups)
        (slope_TH,) = torch.autograd.grad(y_TH.sum(), mine.x_TH, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope_TH.square().sum().backward()

    on_ranks(case, layer, body)


@pytest.mark.parametrize("form", ["ep2", "tp3-allreducerows", "tp3-reducescatter", "tp3-gather", "tp2-wholeshared",
                                  "tp2-reducescatter-tokenstp", "ep2-tokensep"])
def test_the_written_out_gradients_are_for_one_all_reduce(form: str) -> None:
    """They say so and what to use instead; the form with one all-reduce is in tests/test_backward.py."""
    case, layer = parse_case(f"v1-{EVERYTHING}-{form}"), drawn_layer(EVERYTHING)

    def body(mine: Layer, _: RankShare, groups: Groups) -> None:
        routing = moe_ref.route(mine.x_TH, mine.weights, mine.spec)
        spread = (mine.weights, mine.spec, case.parallel, groups)
        with pytest.raises(UsageValueError, match=r"but the formulas are for ep=1, .*; differentiate moe instead"):
            moe_backward(mine.grad_y_TH, mine.x_TH, *spread)
        with pytest.raises(UsageValueError, match=r"but the formulas are for ep=1, .*; differentiate moe instead"):
            experts_backward(mine.grad_y_TH, mine.x_TH, routing, *spread)

    on_ranks(case, layer, body)
