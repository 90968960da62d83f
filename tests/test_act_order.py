"""Protects weights in act-order: with the order moved into w1 and w3 the plain row split is right, with its one
all-reduce; without, it is another layer."""

import weakref
from typing import Any

import pytest
import torch

import moe_ref
from moe_ref.contract.comm import CommCall, grid_groups
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.weights import ExpertWeights, MoEWeights, parameter_shapes
from moe_ref.layouts.act_order import ActOrderSource, absorb_act_order, group_order
from tests.test_weights import OneAtATime

SPEC = MoESpec(hidden_size=8, intermediate_size=12, experts=MLP(bias=True),
               router=Router(num_experts=4, top_k=2, renormalize=True),
               shared=SharedExpert(intermediate_size=10, mlp=MLP(bias=True), gate="sigmoid"))
TOKENS = 6


def drawn() -> tuple[MoEWeights, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights in their own order, one order per expert, the shared expert's, and tokens; fp64."""
    generator = torch.Generator().manual_seed(9)
    weights = MoEWeights(**{name: torch.randn(shape, generator=generator, dtype=torch.float64)
                            for name, shape in parameter_shapes(SPEC).items()})
    perm_EI = torch.stack([torch.randperm(SPEC.intermediate_size, generator=generator) for _ in range(4)])
    x_TH = torch.randn(TOKENS, SPEC.hidden_size, generator=generator, dtype=torch.float64)
    return weights, perm_EI, torch.randperm(10, generator=generator), x_TH


def in_act_order(weights: MoEWeights, perm_EI: torch.Tensor, shared_perm_I: torch.Tensor) -> MoEWeights:
    """As GPTQ stores them: w2_stored[:, j] = w2[:, perm[j]], by plain indexing; w13 stays."""
    tensors = dict(weights.named_tensors())
    tensors["w2_EHI"] = torch.stack([w2_HI[:, perm_I] for w2_HI, perm_I in zip(weights.w2_EHI, perm_EI, strict=True)])
    tensors["shared_w2_HI"] = tensors["shared_w2_HI"][:, shared_perm_I]
    return MoEWeights(**tensors)


def spread(x_TH: torch.Tensor, weights: Any, parallel: Parallel) -> tuple[list[torch.Tensor], list[CommCall]]:
    """Every rank's result from its shard of these weights, loaded by a layer, and the calls of rank 0."""
    calls: list[CommCall] = []

    def body(comm: moe_ref.LocalComm) -> torch.Tensor:
        groups = grid_groups(comm, parallel.tp, parallel.ep)
        layer = moe_ref.MoELayer(SPEC, parallel, groups, dtype=torch.float64)
        layer.load_weights(weights)
        if comm.rank == 0:
            groups = moe_ref.Groups(tp=moe_ref.CountingComm(groups.tp, calls),
                                    ep=moe_ref.CountingComm(groups.ep, calls, "ep"))
        return moe_ref.moe(x_TH, layer.weights, SPEC, parallel, groups).detach()

    return moe_ref.run_virtual_ranks(parallel.size, body), calls


def error(results: list[torch.Tensor], whole_TH: torch.Tensor) -> float:
    """The largest difference of any rank, relative to the largest output."""
    return float(max((y_TH - whole_TH).abs().max() for y_TH in results) / whole_TH.abs().max())


PARALLELS = {"one": Parallel(), "tp2": Parallel(tp=2), "tp3": Parallel(tp=3),
             "uneven": Parallel(tp=3, splits=(5, 0, 2)), "ep2": Parallel(ep=2),
             "ep2_tp3": Parallel(ep=2, tp=3, hosting="round_robin", redundant=(1,)),
             "gather": Parallel(tp=2, schedule="gather")}


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "one at a time"])
@pytest.mark.parametrize("parallel", PARALLELS.values(), ids=PARALLELS)
def test_absorbed_weights_are_the_layer(parallel: Parallel, streamed: bool) -> None:
    """Every expert has an order of its own; the result is that of the unsharded layer with w2 in its own order, up to
    the rounding of fp64 sums."""
    weights, perm_EI, shared_perm_I, x_TH = drawn()
    stored = in_act_order(weights, perm_EI, shared_perm_I)
    absorbed = (ActOrderSource(OneAtATime(stored), perm_EI, shared_perm_I) if streamed
                else absorb_act_order(stored, perm_EI, shared_perm_I))
    assert error(spread(x_TH, absorbed, parallel)[0], moe_ref.moe(x_TH, weights, SPEC)) < 1e-14


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_the_naive_split_is_another_layer(tp: int) -> None:
    """w2 cut as it is stored, w13 in its own order: the columns do not meet, and the result is off by its own size."""
    weights, perm_EI, shared_perm_I, x_TH = drawn()
    stored = in_act_order(weights, perm_EI, shared_perm_I)
    assert error(spread(x_TH, stored, Parallel(tp=tp))[0], moe_ref.moe(x_TH, weights, SPEC)) > 0.3


def test_the_naive_split_needs_other_ranks_columns() -> None:
    """Of three ranks, most columns that a rank's rows of w2_stored take are made elsewhere; absorbed, none."""
    weights, perm_EI, shared_perm_I, _ = drawn()
    start_stop = Parallel(tp=3).ranges(SPEC.intermediate_size)
    needed = sum(int(((perm_EI[:, start:stop] < start) | (perm_EI[:, start:stop] >= stop)).sum())
                 for start, stop in start_stop)
    assert needed / perm_EI.numel() > 0.5
    absorbed = absorb_act_order(in_act_order(weights, perm_EI, shared_perm_I), perm_EI, shared_perm_I)
    for start, stop in start_stop:
        for e in range(4):
            columns = perm_EI[e, start:stop]
            assert torch.equal(absorbed.w13_EGIH[e, :, start:stop], weights.w13_EGIH[e][:, columns])
            assert torch.equal(absorbed.w2_EHI[e, :, start:stop], weights.w2_EHI[e][:, columns])


@pytest.mark.parametrize("tp", [2, 3])
def test_one_all_reduce_and_nothing_else(tp: int) -> None:
    """The order costs no communication: the calls of a rank are those of the layer without it."""
    weights, perm_EI, shared_perm_I, x_TH = drawn()
    absorbed = absorb_act_order(in_act_order(weights, perm_EI, shared_perm_I), perm_EI, shared_perm_I)
    calls = spread(x_TH, absorbed, Parallel(tp=tp))[1]
    assert [(call.operation, call.num_elements) for call in calls] == [("all_reduce", TOKENS * SPEC.hidden_size)]
    assert calls == spread(x_TH, weights, Parallel(tp=tp))[1]


def test_w2_and_everything_else_stay() -> None:
    """Only w13 and its bias move, of the routed and of the shared expert; without shared_perm_I the latter stays."""
    weights, perm_EI, shared_perm_I, _ = drawn()
    moved = {"w13_EGIH", "w13_bias_EGI", "shared_w13_GIH", "shared_w13_bias_GI"}
    for shared, names in ((shared_perm_I, moved), (None, {"w13_EGIH", "w13_bias_EGI"})):
        absorbed = dict(absorb_act_order(weights, perm_EI, shared).named_tensors())
        assert {name for name, tensor in weights.named_tensors() if not torch.equal(tensor, absorbed[name])} == names


class OneHeld(OneAtATime):
    """A source that refuses to be asked for an expert while an earlier one is alive."""

    def expert(self, e: int) -> ExpertWeights:
        assert self.alive() is None
        expert = super().expert(e)
        copy = expert.w13_GIH.clone()
        self.alive = weakref.ref(copy)
        return expert._replace(w13_GIH=copy)

    alive: Any = staticmethod(lambda: None)


def test_the_source_holds_one_expert_at_a_time() -> None:
    """Nothing is read before it is asked for, each expert once, and no other is kept."""
    weights, perm_EI, shared_perm_I, _ = drawn()
    absorbed, source = absorb_act_order(weights, perm_EI, shared_perm_I), OneHeld(weights)
    streamed = ActOrderSource(source, perm_EI, shared_perm_I)
    assert source.read == []
    for e in range(streamed.num_experts):
        expert = streamed.expert(e)
        for one, two in zip(expert, absorbed.expert(e), strict=True):
            assert torch.equal(one, two)
    assert source.read == [0, 1, 2, 3]


def test_the_order_of_groups() -> None:
    """g_idx names each input feature's group: features group by group, in their old order inside one; per expert."""
    assert group_order(torch.tensor([1, 0, 2, 0, 1, 0], dtype=torch.int32)).tolist() == [1, 3, 5, 0, 4, 2]
    assert group_order(torch.tensor([[1, 0], [0, 1]])).tolist() == [[1, 0], [0, 1]]
    sorted_groups = torch.arange(256) // 64
    assert torch.equal(group_order(sorted_groups), torch.arange(256))


def test_g_idx_to_layer() -> None:
    """From what GPTQ stores to the layer: two groups of six features each, in another order for every expert."""
    weights, _, shared_perm_I, x_TH = drawn()
    generator = torch.Generator().manual_seed(4)
    g_idx_EI = torch.stack([(torch.randperm(12, generator=generator) // 6).int() for _ in range(4)])
    perm_EI = group_order(g_idx_EI)
    assert all(not torch.equal(perm_EI[e], torch.arange(12)) for e in range(4))
    absorbed = absorb_act_order(in_act_order(weights, perm_EI, shared_perm_I), perm_EI, shared_perm_I)
    assert error(spread(x_TH, absorbed, Parallel(tp=2))[0], moe_ref.moe(x_TH, weights, SPEC)) < 1e-14


def broken(e: int, values: list[int]) -> torch.Tensor:
    """Good orders, but for the first values of expert e's."""
    perm_EI = torch.arange(12).repeat(4, 1)
    perm_EI[e, :len(values)] = torch.tensor(values)
    return perm_EI


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a number twice": ({"perm_EI": broken(2, [5])}, UsageValueError,
                       "perm_EI: expert 2: no permutation: 5 more than once, 0 missing"),
    "beyond the end": ({"perm_EI": broken(1, [12, -1])}, UsageValueError,
                       r"expert 1: no permutation: -1, 12 outside \[0, 12\), 0, 1 missing"),
    "g_idx in place of the order": ({"perm_EI": torch.zeros(4, 12, dtype=torch.int64)}, UsageValueError,
                                    r"expert 0: no permutation: 0 more than once, 1, 2, 3, 4, 5, ... missing; exp"),
    "one order for all": ({"perm_EI": torch.arange(12)}, UsageValueError, r"\(12,\), but should have 2 dimensions"),
    "too few": ({"perm_EI": torch.arange(12).repeat(3, 1)}, UsageValueError,
                r"shape \(3, 12\), but should be \(4, 12\)|3 permutations, but the source has 4 experts"),
    "no integers": ({"perm_EI": torch.zeros(4, 12)}, UsageTypeError, "perm_EI: torch.float32, but should be a tensor"),
    "no tensor": ({"perm_EI": [[0, 1]]}, UsageTypeError, "perm_EI: list, but should be a tensor of"),
    "the shared one too": ({"shared_perm_I": torch.tensor([0] * 10)}, UsageValueError,
                           "shared_perm_I: no permutation: 0 more than once, 1, 2, 3, 4, 5, ... missing"),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "one at a time"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_with_their_numbers(name: str, streamed: bool) -> None:
    """A wrong order gives a layer that looks right; the expert and the numbers that do not fit are named."""
    change, kind, words = MISTAKES[name]
    weights, perm_EI, shared_perm_I, _ = drawn()
    given = {"perm_EI": perm_EI, "shared_perm_I": shared_perm_I} | change
    source = moe_ref.from_layout(moe_ref.to_layout(weights, LISTED, SPEC), LISTED, SPEC)
    with pytest.raises(kind, match=words):
        ActOrderSource(source, **given) if streamed else absorb_act_order(weights, **given)


LISTED = moe_ref.Layout(order="out_in", gate_up="separate", stacked=False)


def test_an_order_of_a_shared_expert_that_is_not_that_wide() -> None:
    """Or of one that is not there."""
    weights, perm_EI, _, _ = drawn()
    plain = MoEWeights(w13_EGIH=weights.w13_EGIH, w2_EHI=weights.w2_EHI)
    for held, words in ((weights, r"shared_perm_I: shape \(12,\), but should be \(10,\)"),
                        (plain, "shared_perm_I: 12 features, but the layer has no shared expert")):
        with pytest.raises(UsageValueError, match=words):
            absorb_act_order(held, perm_EI, torch.arange(12))
        with pytest.raises(UsageValueError, match=words):
            ActOrderSource(held, perm_EI, torch.arange(12)).shared_expert()


def test_weights_that_are_cut_already() -> None:
    """A rank has not the rows that its columns of w2 want: absorb first, cut then."""
    weights, perm_EI, _, _ = drawn()
    shard = weights.shard(Parallel(tp=2), 0)
    with pytest.raises(UsageValueError, match=r"shape \(4, 12\), but should be \(4, 6\) .* before the weights are cut"):
        absorb_act_order(shard, perm_EI)
    with pytest.raises(UsageValueError, match=r"perm_EI\[3\]: shape \(12,\), but should be \(6,\)"):
        ActOrderSource(OneAtATime(shard), perm_EI).expert(3)
    with pytest.raises(UsageTypeError, match="weights: OneAtATime, but should be MoEWeights"):
        absorb_act_order(OneAtATime(weights), perm_EI)  # type: ignore[arg-type]


def test_experts_of_one_rank() -> None:
    """Those that an ep rank hosts, whole in their columns, are absorbed by their rows of perm: first dealt out, or
    first absorbed, the bits are the same."""
    weights, perm_EI, shared_perm_I, _ = drawn()
    parallel = Parallel(ep=2, hosting="round_robin", shared="replicated")
    whole = absorb_act_order(weights, perm_EI, shared_perm_I)
    for rank in range(2):
        hosted = list(parallel.hosted(4)[rank])
        one = absorb_act_order(weights.shard(parallel, rank), perm_EI[hosted], shared_perm_I)
        for name, tensor in whole.shard(parallel, rank).named_tensors():
            assert torch.equal(getattr(one, name), tensor), name
