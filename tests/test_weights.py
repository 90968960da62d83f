"""Protects weights and their shards: the pieces of all ranks are the whole again, bit by bit."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ref
from moe_ref.contract.comm import grid_groups
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.placements import part_range, placements
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Hosting, Schedule, SharedPlacement, Tokens
from moe_ref.contract.weights import MoEWeights, check_weights, parameter_shapes

SPEC = MoESpec(hidden_size=6, intermediate_size=10,
               router=Router(num_experts=3, top_k=2, score="sigmoid", selection_bias="score"),
               shared=SharedExpert(intermediate_size=7, gate="sigmoid"))


def numbered(spec: MoESpec) -> MoEWeights:
    """Weights in which every element is its own number, so that a misplaced one shows."""
    return MoEWeights(**{name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
                         for name, shape in parameter_shapes(spec).items()})


EVERYTHING = MoESpec(
    hidden_size=6, intermediate_size=10, experts=MLP(bias=True), output_bias=True,
    router=Router(num_experts=3, top_k=2, score="sigmoid", logit_bias=True, selection_bias="score", num_zero_experts=2,
                  learned_scale="layer"),
    shared=SharedExpert(intermediate_size=7, mlp=MLP(gated=False, activation="relu", bias=True), gate="sigmoid"))
"""A layer with every parameter there is."""


class OneAtATime:
    """A source that yields single experts, as a checkpoint does; attributes are those of the tensors behind it."""

    def __init__(self, weights: MoEWeights) -> None:
        self._weights = weights
        self.read: list[int] = []

    def expert(self, e: int) -> moe_ref.ExpertWeights:
        self.read.append(e)
        return self._weights.expert(e)

    def __getattr__(self, name: str) -> object:
        if name in ("w13_EGIH", "w2_EHI"):
            raise AttributeError(name)
        return getattr(self._weights, name)


degrees = st.integers(1, 12)
shares = degrees.flatmap(lambda tp: st.none() | st.lists(st.integers(0, 9), min_size=tp, max_size=tp).map(tuple).filter(
    any)).flatmap(lambda splits: st.fixed_dictionaries({
        "splits": st.just(splits), "tp": st.just(len(splits)) if splits else degrees,
        "shared": st.sampled_from(SharedPlacement)}))
parallels = shares.flatmap(lambda options: st.one_of(
    st.builds(Parallel, schedule=st.sampled_from(Schedule), **{name: st.just(one) for name, one in options.items()}),
    st.builds(Parallel, ep=st.integers(2, 5), hosting=st.sampled_from(Hosting),
              tokens=st.sampled_from([Tokens.REPLICATED, Tokens.SHARDED_EP]),
              redundant=st.lists(st.integers(0, 2), max_size=3).map(tuple),
              **{name: st.just(one) for name, one in options.items()})))
"""Grids of every kind: uneven and empty shares, experts hosted in both ways and more than once, both placements of the
shared expert, and the gather schedule."""


def reassembled(parts: list[dict[str, torch.Tensor]], parallel: Parallel) -> dict[str, torch.Tensor]:
    """The unsharded parameters from those of every rank, which must agree where they hold the same.

    Every part is put where its rank's range is; an element that nobody has stays NaN.
    """
    tensors = {}
    for name, shape in parameter_shapes(EVERYTHING).items():
        placement, whole = placements(parallel)[name], torch.full(shape, torch.nan)
        for rank, part in enumerate(parts):
            place: list[slice | list[int]] = [slice(None)] * len(shape)
            if placement.shard_dim is not None:
                place[placement.shard_dim] = slice(*part_range(name, shape[placement.shard_dim], parallel, rank))
            if placement.expert_dim is not None:
                place[placement.expert_dim] = list(parallel.hosted(3)[parallel.coordinates(rank)[0]])
            held = whole[tuple(place)]
            assert torch.equal(held.where(~held.isnan(), part[name]), part[name]), (name, rank)
            whole[tuple(place)] = part[name]
        tensors[name] = whole
    return tensors


@given(parallels)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_shards_reassemble(parallel: Parallel) -> None:
    """Put where they belong, the shards are the whole tensors, and what several ranks hold is the same; copies."""
    shards = [numbered(EVERYTHING).shard(parallel, rank) for rank in range(parallel.size)]
    whole = reassembled([dict(shard.named_tensors()) for shard in shards], parallel)
    for name, tensor in numbered(EVERYTHING).named_tensors():
        assert torch.equal(whole[name], tensor), name
    for name, placement in placements(parallel).items():
        assert placement.kind == "replicated" or all(getattr(shard, name).is_contiguous() for shard in shards)


def test_the_example_has_every_parameter() -> None:
    """A parameter added later must enter the tests of shards."""
    assert set(dict(numbered(EVERYTHING).named_tensors())) == {field.name for field in fields(MoEWeights)}


@given(parallels)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_shapes_agree_with_shards(parallel: Parallel) -> None:
    """What a rank allocates is what it is handed, for every parameter; the check accepts exactly that."""
    for rank in range(parallel.size):
        shard = numbered(EVERYTHING).shard(parallel, rank)
        shapes = {name: tuple(tensor.shape) for name, tensor in shard.named_tensors()}
        assert shapes == parameter_shapes(EVERYTHING, parallel, rank)
        check_weights(shard, EVERYTHING, parallel, rank)


def test_each_rank_gets_gate_and_up() -> None:
    """A cut of a merged 2I axis would give rank 0 nothing but gate rows."""
    shard = numbered(SPEC).shard(Parallel(tp=2), 1)
    assert torch.equal(shard.w13_EGIH[:, 0], numbered(SPEC).w13_EGIH[:, 0, 5:])
    assert torch.equal(shard.w13_EGIH[:, 1], numbered(SPEC).w13_EGIH[:, 1, 5:])


def test_more_ranks_than_columns() -> None:
    """Two columns over four ranks are 1, 0, 1, 0; an empty shard is valid and has its shape."""
    spec = MoESpec(hidden_size=4, intermediate_size=2)
    shards = [numbered(spec).shard(Parallel(tp=4), rank) for rank in range(4)]
    assert [tuple(shard.w13_EGIH.shape) for shard in shards] == [(1, 2, 1, 4), (1, 2, 0, 4)] * 2
    for rank, shard in enumerate(shards):
        check_weights(shard, spec, Parallel(tp=4), rank)


def test_a_shard_is_a_copy() -> None:
    """Writing to a shard must not reach the unsharded set."""
    whole = numbered(SPEC)
    whole.shard(Parallel(tp=2), 0).w2_EHI.zero_()
    assert torch.equal(whole.w2_EHI, numbered(SPEC).w2_EHI)


def test_experts_are_views() -> None:
    """Reading expert by expert copies nothing."""
    weights = numbered(SPEC)
    assert weights.expert(2).w13_GIH.data_ptr() == weights.w13_EGIH[2].data_ptr()
    assert weights.shared_expert().w2_HI is weights.shared_w2_HI
    assert numbered(MoESpec(hidden_size=2, intermediate_size=2)).shared_expert() is None


PLACES = {
    "shares": Parallel(tp=3, splits=(3, 1, 2)), "a rank without columns": Parallel(tp=3, splits=(3, 0, 1)),
    "experts over two": Parallel(ep=2, tp=2),
    "in turn, with copies": Parallel(ep=2, hosting="round_robin", redundant=(0, 2)),
    "more ranks than experts": Parallel(ep=4, tokens=Tokens.SHARDED_EP), "gather": Parallel(tp=2, schedule="gather"),
    "a whole shared expert": Parallel(ep=2, tp=2, shared="replicated"),
}


@pytest.mark.parametrize("parallel", PLACES.values(), ids=PLACES)
def test_a_layer_loads_its_shard_from_any_source(parallel: Parallel) -> None:
    """Whole tensors, single experts, and a source that is the rank's shard already: the same parameters, and the state
    dicts of all ranks are the whole layer again. Of a source of single experts no other rank's are read."""
    whole = numbered(EVERYTHING)

    def body(comm: moe_ref.LocalComm) -> dict[str, torch.Tensor]:
        groups = grid_groups(comm, parallel.tp, parallel.ep)
        shard, hosted = whole.shard(parallel, comm.rank), parallel.hosted(3)[groups.ep.rank]
        for source, sharded, read in ((whole, False, None), (OneAtATime(whole), False, hosted),
                                      (OneAtATime(shard), True, tuple(range(len(hosted))))):
            layer = moe_ref.MoELayer(EVERYTHING, parallel, groups)
            layer.load_weights(source, sharded=sharded)
            for name, tensor in shard.named_tensors():
                assert torch.equal(getattr(layer, name), tensor), name
            assert read is None or tuple(source.read) == read
        return layer.state_dict()

    whole_again = reassembled(moe_ref.run_virtual_ranks(parallel.size, body), parallel)
    assert all(torch.equal(whole_again[name], tensor) for name, tensor in whole.named_tensors())


def test_ranks_that_disagree_are_told_on_the_whole_grid() -> None:
    """Rank 3 of 2 x 2 hosts experts in turn: ranks 0 and 1, which meet it in no group of theirs, must not go on."""
    def body(comm: moe_ref.LocalComm) -> str:
        hosting = "round_robin" if comm.rank == 3 else "contiguous"
        with pytest.raises(UsageValueError) as caught:
            moe_ref.MoELayer(EVERYTHING, Parallel(tp=2, ep=2, hosting=hosting), grid_groups(comm, 2, 2))
        return str(caught.value)

    for rank, said in enumerate(moe_ref.run_virtual_ranks(4, body)):
        assert said.startswith(f"rank {rank} builds "), said
        assert f"but rank {3 if rank < 3 else 0} builds " in said
