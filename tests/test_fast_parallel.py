"""Protects the fast layer under every form of parallelism: outputs, gradients, partial sums, no waiting for the host.

A gradient's bound is that of tests/test_fast_backward.py with the roundings that ranks add: one addition in fp32 for
each rank; in bf16 at most 2 + 2 (tp - 1) + (ep - 1) more: of the activation's gradient or of a row's sum at home, of
the sum with the shared expert's, and of the additions between ranks, twice over tp where activations are gathered.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.function import once_differentiable

import moe_fast
from moe_fast import held_experts, merge, slot_rows, whole
from moe_fast import layer as fast_layer
from moe_ref import Groups, MoEWeights, Trace, parse_case
from moe_ref.contract import collectives
from moe_ref.contract.comm import SoloComm
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.shares import RankShare, rank_shares
from moe_ref.contract.vocabulary import Verdict
from moe_ref.oracle.backward.layer import moe_backward
from moe_ref.oracle.router import route
from tests import backward_cases
from tests.backward_bound import Named, bounds, excess, named, num_roundings
from tests.in_process import judged
from tests.parallel_cases import Layer, drawn_layer, on_ranks
from tests.test_api import Forbid
from tests.test_parallel_gradients import MUTANTS, put_together, with_leaves

CASES = {
    "v1-T13.H40.I24.E6.K2-fp32-norm-ep2": "experts alone are cut",
    "v1-T13.H40.I24.E7.K3-bf16-norm-sh11-shgate-res-tp2-ep2-roundrobin": "experts in turn, an odd number of them",
    "v1-T13.H40.I24.E6.K2-fp32-norm-sh11-tp2-ep3-copy0.3.0": "one expert three times, the shared expert over six ranks",
    "v1-T13.H40.I24.E6.K2-bf16-norm-tp2-ep2-split1.0": "a rank without columns",
    "v1-T13.H40.I24.E3.K2-fp32-norm-res-ep4": "a rank without experts",
    "v1-T13.H40.I24-fp32-sh11-ep2": "one expert for two ranks",
    "v1-T13.H40.I24.E6.K2-fp32-norm-sh11-shgate-tp2-wholeshared": "the shared expert after the reduction",
    "v1-T13.H40.I24.E6.K2-bf16-norm-sh11-shgate-res-tp2-allreducerows": "rows and the shared expert's row",
    "v1-T13.H40.I24.E6.K2-fp32-norm-sh11-shgate-tp2-ep2-allreducerows": "rows over both axes",
    "v1-T13.H40.I24.E6.K2-fp16-norm-sh11-tp2-ep2-allreducerows-roundrobin-wholeshared": "rows, a whole shared expert",
    "v1-T13.H40.I24.E6.K3-fp32-norm-tp2-split0.1-allreducerows": "rows of a rank without columns",
    "v1-T13.H40.I24.E6.K2-fp32-norm-sh11-shgate-tp2-ep2-reducescatter": "equal cut of odd tokens",
    "v1-T13.H40.I24.E6.K2-bf16-gelu-ties-tp2-ep2-split3.1-reducescatter": "uneven columns",
    "v1-T1.H40.I24.E6.K2-fp32-norm-tp3-reducescatter": "one token for three ranks",
    "v1-T13.H40.I24.E6.K2-fp32-norm-sh11-shgate-res-tp3-reducescatter-tokenstp-share3.0.1": "a rank without tokens",
    "v1-T13.H40.I24.E6.K2-bf16-norm-sh11-shgate-res-tp2-ep2-reducescatter-tokenstp": "sequence parallel, experts cut",
    "v1-T13.H40.I24.E6.K2-fp32-norm-sh11-tp2-ep2-reducescatter-tokenstp-wholeshared": "own tokens alone pass it",
    "v1-T13.H40.I24.E6.K2-fp32-norm-sh11-shgate-res-ep3-tokensep-share1.0.2": "rows travel, a rank has none to send",
    "v1-T13.H40.I24.E6.K2-bf16-norm-sh11-res-tp2-ep2-tokensep-roundrobin": "rows travel within each column of the grid",
    "v1-T13.H40.I24.E6.K2-fp32-norm-allone-tp2-ep2-split1.0-tokensep": "every first choice is one rank's",
    "v1-T13.H40.I24.E3.K2-fp32-norm-res-ep4-tokensep": "a rank sends and never serves",
    "v1-T0.H40.I24.E3.K2-fp32-norm-ep4-tokensep": "nothing travels",
    "v1-T13.H40.I24.E8.K3-fp32-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-sh11-shgate-empty-tp2-ep2-tokensep-inout":
        "router of DeepSeek-V3, weights in another order",
    "v1-T13.H40.I24.E6.K2-bf16-norm-sh11-shgate-tp2-ep2-allreducerows-tokensep-copy1": "rows travel and are reduced",
    "v1-T13.H40.I24.E6.K2-fp32-norm-sh11-shgate-res-tp2-ep2-reducescatter-tokensboth-share3.0.1.2": "a part is empty",
    "v1-T13.H40.I24.E6.K2-bf16-norm-sh11-tp2-ep2-reducescatter-tokensboth-roundrobin-copy5.0-wholeshared": "all of it",
    "v1-T13.H40.I24.E6.K2-fp32-norm-sh11-shgate-res-tp3-gather": "columns of the activation, then of the output",
    "v1-T13.H40.I24.E6.K2-bf16-norm-sh11-tp3-split2.0.1-gather": "a rank without columns of either",
    "v1-T13.H40.I24.E6.K2-fp32-gelutanh-sh11-shgate-tp2-gather-wholeshared": "gathered, a whole shared expert",
    "v1-T13.H40.I24-fp32-tp2-gather": "one expert, every slot its",
    "v1-T40.H130.I66.E4.K2-fp32-norm-sh70-tp2-ep2-reducescatter-tokensboth": "more columns than a tile",
    "v1-T40.H130.I140.E4.K2-bf16-norm-sh70-tp2-gather": "more columns than a tile",
}


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("case_id", CASES)
def test_every_rank_is_right(case_id: str) -> None:
    """All stages, the collectives with their elements, equal ranks and repeated runs, as the harness judges anybody."""
    line = judged(moe_fast, case_id)
    assert line.verdict is Verdict.PASS, line.reason


EVERYTHING = "T9.H24.I20.E6.K3-fp32-sigmoid-norm-bias-g3.2-sh10-shgate-res"
PLAIN = "T9.H24.I20.E6.K2-fp32-norm-gelu-res"
NO_TOKENS = "T0.H24.I20.E6.K2-fp32-sh10-shgate"
ROUNDED = EVERYTHING.replace("fp32", "bf16")
BIASED = "T9.H24.I20.E6.K3-fp32-mlpbias-limit0.75-alpha1.702-up1-sh10-shgate-shmlpbias-shmean-outbias-res"
ON_INPUT = "T9.H24.I20.E6.K2-fp32-sigmoid-relu2-nogate-sh10-shgatecap1.5-shupcap2-weightinput-zipf"
FORMS = ("tp3-split1.0.2", "tp2-ep2-copy0.0-wholeshared", "tp2-ep2-split1.0-allreducerows",
         "tp2-ep2-reducescatter-copy0", "tp2-ep3-reducescatter-tokenstp-share0.1-roundrobin", "ep3-tokensep-share2.0.1",
         "tp2-ep2-allreducerows-tokensep-share1.3", "tp2-ep2-reducescatter-tokensboth-share3.0.1.2",
         "tp2-ep2-reducescatter-tokensboth-wholeshared", "tp3-gather", "tp3-split2.0.1-gather-wholeshared")
GRADIENTS = [f"v1-{layer}-{form}" for layer, forms in (
    (EVERYTHING, FORMS), (PLAIN, ("ep3", "tp3-reducescatter", "tp2-gather")),
    (NO_TOKENS, ("ep3-tokensep", "tp2-gather")), (BIASED, FORMS),
    (ON_INPUT, ("tp3-split1.0.2", "tp2-ep2-allreducerows", "tp2-ep2-reducescatter-tokensboth-share3.0.1.2",
                "tp3-gather")),
    (ROUNDED, ("tp2-ep2", "tp2-ep2-reducescatter-tokensboth-share3.0.1.2", "tp3-gather", "tp3-allreducerows")))
    for form in forms]
THROUGH_THE_ROUTER = [f"v1-{EVERYTHING}-{form}" for form in (
    "tp2-ep2", "tp3-reducescatter-tokenstp-share3.0.1", "tp2-ep2-reducescatter-tokensboth-share3.0.1.2", "tp3-gather")]


def name_of(case_id: str) -> str:
    """The problem of one of GRADIENTS, without how it is spread."""
    names = (EVERYTHING, PLAIN, ROUNDED, NO_TOKENS, BIASED, ON_INPUT)
    return next(name for name in names if case_id.startswith(f"v1-{name}-"))


@cache
def layer_of(name: str, injected: bool) -> Layer:
    """The whole layer in its own dtype; the selection bias in fp32; injected: with the routing that it chooses."""
    drawn, dtype = drawn_layer(name), TORCH_DTYPES[parse_case(f"v1-{name}").problem.dtype]
    held = {field: tensor.to(torch.float32 if field == "selection_bias_E" else dtype)
            for field, tensor in drawn.weights.named_tensors()}
    layer = replace(drawn, weights=MoEWeights(**held), x_TH=drawn.x_TH.to(dtype), grad_y_TH=drawn.grad_y_TH.to(dtype),
                    residual_TH=drawn.residual_TH.to(dtype))
    routing = moe_fast.route(layer.x_TH, layer.weights, layer.spec)
    assert torch.equal(routing.ids_TK, route(drawn.x_TH, drawn.weights, drawn.spec).ids_TK), "take another case"
    return replace(layer, routing=replace(routing, logits_TE=None)) if injected else layer


def output(layer: Layer, parallel: Parallel, groups: Groups) -> torch.Tensor:
    """moe_fast.moe of a rank's part of a layer."""
    return moe_fast.moe(layer.x_TH, layer.weights, layer.spec, parallel, groups, routing=layer.routing,
                        residual_TH=layer.residual_TH)


def gradients(case_id: str, injected: bool) -> Named:
    """By autograd on all ranks, put together; that equal parts have equal bits is asserted on the way."""
    case, layer = parse_case(case_id), layer_of(name_of(case_id), injected)

    def body(mine: Layer, _: RankShare, groups: Groups) -> Named:
        mine, leaves = with_leaves(mine, lambda name: name != "selection_bias_E")
        output(mine, case.parallel, groups).backward(mine.grad_y_TH)
        assert all(leaf.grad is None or leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
        return {name: None if leaf.grad is None else leaf.grad.double() for name, leaf in leaves.items()}

    parts = [found for found, _ in on_ranks(case, layer, body)]
    whole = dict(layer.weights.named_tensors()) | {"x_TH": layer.x_TH, "residual_TH": layer.residual_TH}
    if layer.routing is not None:
        whole |= {"weights_TK": layer.routing.weights_TK, "shared_TS": layer.routing.shared_TS}
    return {name: put_together(name, tensor.double(), [part[name] for part in parts], case, rank_shares(case))
            for name, tensor in whole.items() if tensor is not None}


@cache
def truth(name: str, injected: bool) -> tuple[Named, Named, int]:
    """The written-out gradients of the unsharded layer, their bound as fp64 has it, and its count of roundings."""
    layer = layer_of(name, injected)
    inputs = backward_cases.Inputs(layer.x_TH, layer.weights, layer.grad_y_TH, layer.residual_TH)
    routing = layer.routing or route(layer.x_TH, layer.weights, layer.spec)
    written = moe_backward(layer.grad_y_TH, layer.x_TH, layer.weights, layer.spec, routing=layer.routing)
    return (named(written), bounds(inputs, layer.spec, routing, injected=injected),
            num_roundings(layer.spec, len(layer.x_TH)))


def wrong(case_id: str, injected: bool, found: Named | None = None) -> dict[str, float]:
    """Gradients that are not those of the unsharded layer, with how far they are beyond their bound."""
    (written, fp64, count), case = truth(name_of(case_id), injected), parse_case(case_id)
    relative = (count + case.parallel.size) * 2**-24
    if case.problem.dtype == "bf16":
        relative += (5 + 2 + 2 * (case.parallel.tp - 1) + case.parallel.ep - 1) * 2**-8
    factor = relative / (1 - relative) / (2 * count * 2**-53)
    allowed = {name: None if bound is None else bound * factor for name, bound in fp64.items()}
    ratios = excess(gradients(case_id, injected) if found is None else found, written, allowed)
    return {name: ratio for name, ratio in ratios.items() if not ratio <= 1}


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("case_id", GRADIENTS, ids=str)
def test_gradients_of_the_experts(case_id: str) -> None:
    """A routing is handed in: its weights and gates complete on every rank, shards local, copies added up."""
    assert wrong(case_id, injected=True) == {}


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("case_id", THROUGH_THE_ROUTER, ids=str)
def test_gradients_through_the_router(case_id: str) -> None:
    """Each rank routes its own tokens: the router's gradient is that of all tokens, on every rank."""
    assert wrong(case_id, injected=False) == {}


OF_EXPERTS = {"x_TH", "residual_TH", "weights_TK", "shared_TS", "w13_EGIH", "w2_EHI", "shared_w13_GIH", "shared_w2_HI"}
OF_BIASES = {"w13_bias_EGI", "w2_bias_EH", "shared_w13_bias_GI", "shared_w2_bias_H", "output_bias_H"}


@pytest.mark.parametrize(("layer", "names"), [
    (EVERYTHING, OF_EXPERTS), (BIASED, OF_EXPERTS - {"weights_TK"} | OF_BIASES)])
def test_the_bounds_see_three_percent(layer: str, names: set[str]) -> None:
    """A bound that nothing exceeds proves nothing: the gradients of the experts, off by 2^-5, are outside.

    Those of routing weights beside a bias have a test of their own in test_operators.py.
    """
    written, _, _ = truth(layer, True)
    off: Named = {name: None if tensor is None else tensor * (1 + 2**-5) for name, tensor in written.items()}
    assert set(wrong(f"v1-{layer}-tp3", True, off)) == names


EVERY_BIAS = "v1-T13.H40.I24.E6.K2-fp32-norm-mlpbias-sh11-shgate-shmlpbias-outbias-res"


@pytest.mark.sampled(every=3, each="function")
@pytest.mark.parametrize(("function", "form"), [
    ("routed_bias", "tp2-ep2"), ("shared_bias", "tp2-ep2"), ("output_bias", "tp2-ep2"),
    ("routed_bias", "tp2-allreducerows"), ("shared_bias", "tp2-allreducerows"),
    ("shared_bias", "tp2-ep2-tokensep"), ("output_bias", "tp2-ep2-tokensep")])
def test_a_bias_that_every_rank_adds_is_seen(function: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each rank holds whole has to come into the sum of their parts once."""
    name = {"routed_bias": "w2_bias_EH", "shared_bias": "shared_w2_bias_H", "output_bias": "output_bias_H"}[function]
    assert judged(moe_fast, f"{EVERY_BIAS}-{form}").verdict is Verdict.PASS
    for module in (merge, held_experts, slot_rows):
        if hasattr(module, function):
            monkeypatch.setattr(module, function, lambda weights, *_: getattr(weights, name))
    assert judged(moe_fast, f"{EVERY_BIAS}-{form}").verdict is Verdict.MISMATCH


def test_a_bias_without_a_gradient_where_it_is_not_added_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do not add a bias hold it all the same, and have to train it like the one that does."""
    monkeypatch.setattr(whole._Zeros, "backward", staticmethod(lambda ctx, gradient: torch.zeros_like(gradient)))
    with pytest.raises(AssertionError, match="ranks with the same part disagree"):
        gradients(f"v1-{BIASED}-tp3-split1.0.2", injected=True)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_missing_or_doubled_reduction_is_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison notices any collective whose gradient is wrong."""
    name, backward, form = MUTANTS[mutant]
    monkeypatch.setattr(getattr(collectives, name), "backward", staticmethod(once_differentiable(backward)))
    with pytest.raises(AssertionError):
        test_gradients_of_the_experts(f"v1-{EVERYTHING}-{form}")


def test_a_router_that_learns_from_own_tokens_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient has to be added up over ranks with other tokens, or the ranks drift apart in training."""
    monkeypatch.setattr(fast_layer, "router_over_tokens", lambda weights, rank: weights)
    with pytest.raises(AssertionError, match="router_EH: ranks with the same part disagree"):
        gradients(f"v1-{EVERYTHING}-ep3-tokensep-share2.0.1", injected=False)


@pytest.mark.parametrize("form", ["tp3-allreducerows", "tp3-gather", "ep3-tokensep"])
def test_second_derivatives_are_refused(form: str) -> None:
    """A silently wrong Hessian is worse than none."""
    case = parse_case(f"v1-{PLAIN}-{form}")

    def body(mine: Layer, _: RankShare, groups: Groups) -> None:
        mine, _ = with_leaves(mine)
        (slope_TH,) = torch.autograd.grad(output(mine, case.parallel, groups).sum(), mine.x_TH, create_graph=True)
        with pytest.raises((RuntimeError, UsageValueError), match=r"once_differentiable|only first gradients"):
            slope_TH.square().sum().backward()

    on_ranks(case, layer_of(PLAIN, False), body)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("form", ["tp2-ep2", "tp2-ep2-reducescatter-tokensboth-share3.0.1.2", "tp3-reducescatter"])
def test_partial_sums_add_up_to_the_layer(form: str) -> None:
    """reduce=False leaves the addition to the caller: the same numbers added in the same order, so the same bits."""
    case = parse_case(f"v1-{EVERYTHING}-{form}")

    def body(mine: Layer, share: RankShare, groups: Groups) -> None:
        routing = moe_fast.route(mine.x_TH, mine.weights, mine.spec)
        given = (mine.x_TH, routing, mine.weights, mine.spec, case.parallel, groups)
        sum_TH, partial_TH = moe_fast.experts(*given), moe_fast.experts(*given, reduce=False)
        start, stop = share.merged_tokens
        assert partial_TH.shape == (stop - start, mine.spec.hidden_size)
        for comm in (groups.tp,) if case.parallel.tokens.over_ep else (groups.tp, groups.ep):
            partial_TH = comm.all_reduce(partial_TH) if comm.size > 1 else partial_TH
        assert torch.equal(partial_TH[share.tokens[0] - start:share.tokens[1] - start], sum_TH)

    on_ranks(case, layer_of(EVERYTHING, False), body)


@pytest.mark.parametrize("form", ["tp2-allreducerows", "tp2-gather", "tp2-wholeshared"])
def test_forms_without_a_partial_sum_say_so(form: str) -> None:
    """Before anything is communicated."""
    case = parse_case(f"v1-{EVERYTHING}-{form}")

    def body(mine: Layer, _: RankShare, groups: Groups) -> None:
        routing = moe_fast.route(mine.x_TH, mine.weights, mine.spec)
        with pytest.raises(UsageValueError, match=r"reduce=False with .*, but"):
            moe_fast.experts(mine.x_TH, routing, mine.weights, mine.spec, case.parallel, groups, reduce=False)

    assert [calls for _, calls in on_ranks(case, layer_of(EVERYTHING, False), body)] == [[], []]


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("form", ["tp2-ep2-allreducerows", "tp2-ep2-reducescatter-tokensboth", "tp2-gather"])
def test_torch_does_none_of_the_work(form: str) -> None:
    """Rows are moved, merged and counted by own operators, whose inside test_fast_parallel_operators.py looks at."""
    case = parse_case(f"v1-{EVERYTHING}-{form}")

    def body(mine: Layer, _: RankShare, groups: Groups) -> None:
        with torch.no_grad(), Forbid() as mode:
            output(mine, case.parallel, groups)
        assert "route" in mode.seen

    on_ranks(case, layer_of(EVERYTHING, False), body)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("form", ["tp2-ep2-tokensep-roundrobin-copy0", "tp2-ep2-reducescatter-tokensboth-wholeshared",
                                  "tp3-split2.0.1-gather"])
def test_the_module_is_the_function(form: str) -> None:
    """Each rank's module loads its part of the whole parameters, experts and columns, and gives the same bits."""
    case, layer = parse_case(f"v1-{EVERYTHING}-{form}"), layer_of(EVERYTHING, False)

    def body(mine: Layer, _: RankShare, groups: Groups) -> None:
        module = moe_fast.MoELayer(mine.spec, case.parallel, groups)
        module.load_weights(layer.weights)
        with torch.no_grad():
            assert torch.equal(module(mine.x_TH, mine.residual_TH), output(mine, case.parallel, groups))

    on_ranks(case, layer, body)


@pytest.mark.parametrize("form", ["tp2-gather", "ep2-tokensep"])
def test_a_trace_and_gradients_exclude_each_other(form: str) -> None:
    """Said before anything is communicated, or other ranks would wait for this one."""
    case = parse_case(f"v1-{EVERYTHING}-{form}")

    def body(mine: Layer, _: RankShare, groups: Groups) -> None:
        with pytest.raises(UsageValueError, match=r"should be under torch.no_grad\(\)"):
            moe_fast.moe(mine.x_TH.clone().requires_grad_(), mine.weights, mine.spec, case.parallel, groups,
                         trace=Trace())

    assert [calls for _, calls in on_ranks(case, layer_of(EVERYTHING, False), body)] == [[], []]


class _Alone(SoloComm):
    """A group of two as far as its rank can see without the other one: it gets back what it sends."""

    size = 2

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.clone(), tensor.clone()]

    def reduce_scatter(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return tensor[:rows[0]].clone()


FAKED = ("tp2", "tp2-ep2", "tp2-ep2-allreducerows", "tp2-ep2-reducescatter-tokenstp", "tp2-gather", "tp2-wholeshared")


@pytest.mark.parametrize("form", [*FAKED, "ep2-tokensep"])
def test_the_host_never_waits(form: str) -> None:
    """Tensors without numbers pass through: nothing reads one. Only rows that travel have to be counted."""
    case = parse_case(f"v1-{EVERYTHING}-{form}")
    layer = layer_of(EVERYTHING, False)
    groups = Groups(*(_Alone() if degree > 1 else SoloComm() for degree in (case.parallel.tp, case.parallel.ep)))
    shard, own_TH = layer.weights.shard(case.parallel, 0), layer.x_TH[slice(*rank_shares(case)[0].tokens)]
    with FakeTensorMode() as mode:
        own = mode.from_tensor(own_TH)
        weights = MoEWeights(**{name: mode.from_tensor(tensor) for name, tensor in shard.named_tensors()})
        if case.parallel.tokens.over_ep:
            with pytest.raises(DataDependentOutputException):
                moe_fast.moe(own, weights, layer.spec, case.parallel, groups)
        else:
            assert moe_fast.moe(own, weights, layer.spec, case.parallel, groups).shape == own.shape
