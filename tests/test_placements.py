"""Protects who holds what: every element of every parameter carries its logical tag, and all ranks together hold the
whole, each element as often as the placement says, wherever it lies in memory."""

import pytest
import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.placements import PLACEMENTS, part_range, placements, rank_part
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Schedule, SharedPlacement, Storage, Tokens
from moe_ref.contract.weights import MoEWeights, parameter_shapes
from moe_ref.inputs.storage import empty_stored

EVERYTHING = MoESpec(
    hidden_size=6, intermediate_size=10, experts=MLP(bias=True), output_bias=True,
    router=Router(num_experts=5, top_k=2, score="sigmoid", logit_bias=True, selection_bias="score", num_zero_experts=2,
                  learned_scale="layer"),
    shared=SharedExpert(intermediate_size=7, mlp=MLP(bias=True), gate="sigmoid"))
"""A layer with every parameter there is."""

WHOLE = SharedPlacement.REPLICATED
_WAYS: dict[str, dict] = {
    "one": {}, "tp2": {"tp": 2}, "tp3": {"tp": 3}, "tp8": {"tp": 8},
    "tp2_60_40": {"tp": 2, "splits": (60, 40)}, "tp2_all_on_one": {"tp": 2, "splits": (1, 0)},
    "tp3_zero_first": {"tp": 3, "splits": (0, 3, 1)},
    "ep2": {"ep": 2}, "ep3": {"ep": 3}, "ep8": {"ep": 8}, "ep2_tp2": {"ep": 2, "tp": 2}, "ep3_tp3": {"ep": 3, "tp": 3},
    "ep2_round_robin": {"ep": 2, "hosting": "round_robin"},
    "ep3_tp2_round_robin": {"ep": 3, "tp": 2, "hosting": "round_robin", "splits": (60, 40)},
    "ep2_copies": {"ep": 2, "tp": 2, "redundant": (0,)}, "ep3_copies_on_one": {"ep": 3, "redundant": (4, 4, 0)},
    "ep3_copies_round_robin": {"ep": 3, "tp": 2, "hosting": "round_robin", "redundant": (2, 2, 0)},
    "ep2_tokens": {"ep": 2, "tp": 3, "tokens": "sharded_ep"},
    "sharded_tokens": {"ep": 2, "tp": 2, "tokens": "sharded", "schedule": "reduce_scatter", "splits": (0, 1)},
    "gather2": {"tp": 2, "schedule": "gather"}, "gather3": {"tp": 3, "schedule": "gather", "splits": (1, 0, 2)},
}
WAYS = {name + suffix: Parallel(**options, **more) for name, options in _WAYS.items()
        for suffix, more in (("", {}), ("_whole_shared", {"shared": WHOLE}))}
"""Every way to spread a layer, with few and many ranks, empty parts, copies, and the shared expert cut and whole."""

each_way = pytest.mark.parametrize("parallel", WAYS.values(), ids=WAYS)


def tagged(spec: MoESpec, storage: Storage = Storage.OUT_IN) -> MoEWeights:
    """Every element of a parameter is its own logical number, which is what canonical indexing gives."""
    tensors = {}
    for name, shape in parameter_shapes(spec).items():
        tensors[name] = empty_stored(name, shape, storage, dtype=torch.int64, device="cpu")
        tensors[name].copy_(torch.arange(torch.Size(shape).numel()).reshape(shape))
    return MoEWeights(**tensors)


def expected_holders(name: str, shape: tuple[int, ...], parallel: Parallel) -> torch.Tensor:
    """How many ranks hold each element, from the rules in words.

    An expert is held by the ranks of every copy; its cut parameters by one rank of their tp group, its w2 bias by all
    of them (under gather it is cut too). The shared expert's matrices have one owner in the grid, or one in every tp
    group where each ep rank has its own tokens. All else is everywhere.
    """
    gather, everywhere = parallel.schedule is Schedule.GATHER, parallel.size
    if name in ("w13_EGIH", "w2_EHI", "w13_bias_EGI", "w2_bias_EH"):
        copies_E = torch.tensor([1 + parallel.redundant.count(e) for e in range(shape[0])])
        holders_E = copies_E * (parallel.tp if name == "w2_bias_EH" and not gather else 1)
        return holders_E.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    if not name.startswith("shared_") or name == "shared_gate_SH" or parallel.shared is WHOLE:
        return torch.full(shape, everywhere)
    if name == "shared_w2_bias_H":
        return torch.full(shape, 1 if gather else everywhere)
    return torch.full(shape, parallel.ep if parallel.tokens.over_ep else 1)


@each_way
def test_all_ranks_together_hold_the_whole(parallel: Parallel) -> None:
    """Counted by tag, no element is lost, and none is held more often than its placement says."""
    whole = dict(tagged(EVERYTHING).named_tensors())
    assert whole.keys() == PLACEMENTS.keys() == placements(parallel).keys()
    shards = [dict(tagged(EVERYTHING).shard(parallel, rank).named_tensors()) for rank in range(parallel.size)]
    for name, tensor in whole.items():
        held = torch.cat([shard[name].flatten() for shard in shards]).bincount(minlength=tensor.numel())
        assert torch.equal(held.reshape(tensor.shape), expected_holders(name, tuple(tensor.shape), parallel)), name


@each_way
def test_the_parts_of_a_rank_fit_together(parallel: Parallel) -> None:
    """The tags of one rank name the same experts in every parameter, and w2 takes the columns that w13 makes (under
    gather all columns, for outputs of its own). The order is that of the declared experts and ranges."""
    hidden, wide = EVERYTHING.hidden_size, EVERYTHING.intermediate_size
    gather = parallel.schedule is Schedule.GATHER
    for rank in range(parallel.size):
        shard = tagged(EVERYTHING).shard(parallel, rank)
        ep_rank, tp_rank = parallel.coordinates(rank)
        experts, columns = parallel.hosted(5)[ep_rank], range(*parallel.ranges(wide)[tp_rank])
        outputs = range(*parallel.ranges(hidden)[tp_rank]) if gather else range(hidden)
        taken = range(wide) if gather else columns
        assert shard.w13_EGIH.tolist() == [[[[((e * 2 + g) * wide + i) * hidden + h for h in range(hidden)]
                                             for i in columns] for g in (0, 1)] for e in experts]
        assert shard.w13_bias_EGI.tolist() == [[[(e * 2 + g) * wide + i for i in columns] for g in (0, 1)]
                                               for e in experts]
        assert shard.w2_EHI.tolist() == [[[(e * hidden + h) * wide + i for i in taken] for h in outputs]
                                         for e in experts]
        assert shard.w2_bias_EH.tolist() == [[e * hidden + h for h in outputs] for e in experts]


@pytest.mark.sampled(every=5)
@each_way
@pytest.mark.parametrize("storage", [one for one in Storage if one is not Storage.OUT_IN])
def test_the_storage_order_does_not_matter(parallel: Parallel, storage: Storage) -> None:
    """A placement names logical features: interleaved or (in, out) memory gives the same parts, contiguous."""
    for rank in range(parallel.size):
        plain = dict(tagged(EVERYTHING).shard(parallel, rank).named_tensors())
        for name, tensor in tagged(EVERYTHING, storage).shard(parallel, rank).named_tensors():
            assert torch.equal(tensor, plain[name]), name
            assert tensor.is_contiguous() or placements(parallel)[name].kind == "replicated"


def test_llama_columns_over_three() -> None:
    """I = 11008, which no 3 divides: 3670, 3669, 3669 columns, and the ranks' tags are all of them once."""
    spec = MoESpec(hidden_size=1, intermediate_size=11008, router=Router(num_experts=2, top_k=1))
    whole, parallel = tagged(spec), Parallel(tp=3)
    shards = [whole.shard(parallel, rank) for rank in range(3)]
    assert [shard.w2_EHI.shape[-1] for shard in shards] == [3670, 3669, 3669]
    assert torch.equal(torch.cat([shard.w13_EGIH for shard in shards], 2), whole.w13_EGIH)
    assert torch.equal(torch.cat([shard.w2_EHI for shard in shards], 2), whole.w2_EHI)


def test_the_shared_expert_is_cut_over_the_grid_or_over_tp() -> None:
    """Seven columns over ep 2 x tp 2: one cut of four parts, or one of two parts in each tp group."""
    grid = {tokens: [part_range("shared_w2_HI", 7, Parallel(ep=2, tp=2, tokens=tokens), rank) for rank in range(4)]
            for tokens in (Tokens.REPLICATED, Tokens.SHARDED_EP)}
    assert grid == {Tokens.REPLICATED: [(0, 2), (2, 4), (4, 6), (6, 7)], Tokens.SHARDED_EP: [(0, 4), (4, 7)] * 2}


def test_neighbours_are_views() -> None:
    """A rank of contiguous hosting copies nothing until it wants to; every other expert in turn must be copied."""
    whole = tagged(EVERYTHING).w2_EHI
    view = rank_part("w2_EHI", whole, Parallel(ep=2), 1)
    assert view.data_ptr() == whole[3].data_ptr()
    assert rank_part("w2_EHI", whole, Parallel(ep=2, hosting="round_robin"), 1)[:, 0, 0].tolist() == [60, 180]


@pytest.mark.parametrize("rank", [-1, 4, True])
def test_a_rank_that_is_not_there(rank: int) -> None:
    """-1 would be the last rank's part."""
    for call in (lambda: rank_part("w2_EHI", torch.zeros(2, 3, 4), Parallel(tp=2, ep=2), rank),
                 lambda: part_range("w2_EHI", 4, Parallel(tp=2, ep=2), rank)):
        with pytest.raises(UsageValueError, match=rf"rank={rank}.*below ep\*tp=2\*2"):
            call()


V3_SCALES = {"w13_EGIH": (2, 2, 16, 56), "w2_EHI": (2, 56, 16)}
"""Scales of blocks of 128 x 128 of DeepSeek-V3's experts: I = 2048, H = 7168."""

BLOCK = (128, 128)


def scales(name: str) -> torch.Tensor:
    """Every scale its own number."""
    return torch.arange(torch.Size(V3_SCALES[name]).numel()).reshape(V3_SCALES[name])


@pytest.mark.parametrize("name", V3_SCALES)
def test_scales_of_blocks_follow_their_weights(name: str) -> None:
    """2048 columns over 16 ranks are one block each, over (6, 5, 5) of 16 shares whole blocks too; nothing is lost."""
    dim = PLACEMENTS[name].shard_dim
    for parallel, widths in ((Parallel(tp=16), [1] * 16), (Parallel(tp=3, splits=(6, 5, 5)), [6, 5, 5])):
        parts = [rank_part(name, scales(name), parallel, rank, block=BLOCK) for rank in range(parallel.tp)]
        assert [part.shape[dim] for part in parts] == widths
        assert torch.equal(torch.cat(parts, dim), scales(name))


@pytest.mark.parametrize("name", V3_SCALES)
def test_a_cut_inside_a_block_is_refused_on_every_rank(name: str) -> None:
    """Over three ranks the cuts are at 683 and 1366; the message says which shares do, and no rank goes on alone."""
    for rank in range(3):
        with pytest.raises(UsageValueError, match=r"2048 elements are cut at 683, 1366 by tp=3, ep=1, splits=None, but "
                                                  r"should be at multiples of the block of 128, as splits=\(6, 5, 5\)"):
            rank_part(name, scales(name), Parallel(tp=3), rank, block=BLOCK)
    one_block = Parallel(tp=3, splits=(4, 11, 1))
    assert [rank_part(name, scales(name), one_block, rank, block=BLOCK).shape[PLACEMENTS[name].shard_dim]
            for rank in range(3)] == [4, 11, 1]


def test_the_axis_that_is_cut_has_its_own_block() -> None:
    """Groups of 128 input features, as GPTQ has them: they bind the cut of w2, not that of w13, whose outputs are free;
    under gather w2 is cut by output, and its groups stay whole."""
    group, three = (1, 128), Parallel(tp=3)
    assert rank_part("w13_EGIH", torch.zeros(2, 2, 2048, 56), three, 0, block=group).shape == (2, 2, 683, 56)
    with pytest.raises(UsageValueError, match=r"cut at 683, 1366"):
        rank_part("w2_EHI", torch.zeros(2, 7168, 16), three, 0, block=group)
    gather = Parallel(tp=3, schedule=Schedule.GATHER)
    assert rank_part("w2_EHI", torch.zeros(2, 7168, 16), gather, 0, block=group).shape == (2, 2390, 16)


def test_the_last_block_may_be_a_partial_one() -> None:
    """2112 columns are 16 blocks and a half: size tells, the end is no cut, and the last rank has the partial block."""
    scale = torch.arange(17).reshape(1, 1, 17)
    for splits, widths in (((768, 640, 704), [6, 5, 6]), ((4, 4, 3), [6, 6, 5])):
        parts = [rank_part("w2_EHI", scale, Parallel(tp=3, splits=splits), rank, block=BLOCK, size=2112)
                 for rank in range(3)]
        assert [part.shape[2] for part in parts] == widths
        assert torch.equal(torch.cat(parts, 2), scale)
    with pytest.raises(UsageValueError, match=r"2112 elements are cut at 704 by .* as splits=\(4, 4, 3\) does"):
        rank_part("w2_EHI", scale, Parallel(tp=3), 0, block=BLOCK, size=2112)
    with pytest.raises(UsageValueError, match="17 entries, but 2048 elements in blocks of 128 have 16"):
        rank_part("w2_EHI", scale, Parallel(tp=3), 0, block=BLOCK, size=2048)


def test_blocks_of_one_expert_and_of_the_shared_one() -> None:
    """A scale without the axis E, and a shared expert over the grid, where each rank's part must hold whole blocks."""
    assert rank_part("w2_EHI", torch.zeros(56, 16), Parallel(tp=4, ep=2), 5, block=BLOCK).shape == (56, 4)
    shared = rank_part("shared_w13_GIH", torch.zeros(2, 16, 56), Parallel(tp=4, ep=2), 5, block=BLOCK)
    assert shared.shape == (2, 2, 56)
    with pytest.raises(UsageValueError, match=r"shared_w2_HI: 2048 elements are cut at 342, 683, 1366, 1707 by tp=3, "
                                              r"ep=2, splits=None, but should be at multiples of the block of 128$"):
        rank_part("shared_w2_HI", torch.zeros(56, 16), Parallel(tp=3, ep=2), 0, block=BLOCK)
