"""Protects weights and their shards: pieces reassemble bit by bit, and a wrong shard is told both numbers."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ref
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.parallel import PLACEMENTS, Parallel
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.weights import MoEWeights, check_expert, check_weights, parameter_shapes

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

    def __getattr__(self, name: str) -> object:
        if name in ("w13_EGIH", "w2_EHI"):
            raise AttributeError(name)
        return getattr(self._weights, name)


degrees = st.integers(1, 12)
parallels = degrees.flatmap(lambda tp: st.builds(Parallel, tp=st.just(tp), splits=st.none() | st.lists(
    st.integers(1, 9), min_size=tp, max_size=tp).map(tuple)))


@given(parallels)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_shards_reassemble(parallel: Parallel) -> None:
    """Put side by side in rank order, the shards are the whole tensor; replicated ones are whole on each rank."""
    whole = dict(numbered(EVERYTHING).named_tensors())
    shards = [dict(numbered(EVERYTHING).shard(parallel, rank).named_tensors()) for rank in range(parallel.tp)]
    for name, tensor in whole.items():
        dim, parts = PLACEMENTS[name].shard_dim, [shard[name] for shard in shards]
        if dim is None:
            assert all(torch.equal(part, tensor) for part in parts)
        else:
            assert torch.equal(torch.cat(parts, dim), tensor)
            assert all(part.is_contiguous() for part in parts)


def test_the_example_has_every_parameter() -> None:
    """A parameter added later must enter the tests of shards."""
    assert set(dict(numbered(EVERYTHING).named_tensors())) == {field.name for field in fields(MoEWeights)}


@given(parallels)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_shapes_agree_with_shards(parallel: Parallel) -> None:
    """What a rank allocates is what it is handed, for every parameter; the check accepts exactly that."""
    for rank in range(parallel.tp):
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


def test_k_mismatch_has_both_numbers() -> None:
    """The commonest sharding mistake: w13 cut, w2 not. The two K must stand in the message."""
    cut = numbered(SPEC).shard(Parallel(tp=2), 0)
    with pytest.raises(UsageValueError, match=r"K mismatch.*activation shard of 5 columns.*w2_EHI shard takes 10"):
        check_weights(replace(cut, w2_EHI=numbered(SPEC).w2_EHI), SPEC, Parallel(tp=2), 0)


def test_all_faults_at_once() -> None:
    """Two missing, one too many, one of the wrong shape; the rank is named."""
    spec = replace(SPEC, shared=None)
    wrong = replace(numbered(SPEC), router_EH=torch.zeros(3, 5), selection_bias_E=None)
    with pytest.raises(UsageValueError) as caught:
        check_weights(wrong, spec, None, 0)
    for fault in ("weights of rank 0", "selection_bias_E is missing", "shared_w13_GIH is given",
                  "router_EH: shape (3, 5), but should be (3, 6)"):
        assert fault in str(caught.value)


def test_the_shard_of_another_rank_is_refused() -> None:
    """Rank 1 of 3 holds one column less than rank 0 of 10 columns."""
    parallel = Parallel(tp=3)
    assert [stop - start for start, stop in parallel.ranges(10)] == [4, 3, 3]
    with pytest.raises(UsageValueError, match=r"weights of rank 0.*\(3, 2, 3, 6\), but should be \(3, 2, 4, 6\)"):
        check_weights(numbered(SPEC).shard(parallel, 1), SPEC, parallel, 0)


@pytest.mark.parametrize(("change", "words"), [
    ({"router_EH": torch.zeros(3, 6, dtype=torch.float64)}, "router_EH: dtype torch.float64"),
    ({"w2_EHI": torch.zeros(3, 6, 10, device="meta")}, "w2_EHI: device meta"),
])
def test_one_dtype_and_one_device(change: dict, words: str) -> None:
    """Mixed tensors would reach a kernel as garbage."""
    with pytest.raises(UsageTypeError, match=words):
        check_weights(replace(numbered(SPEC), **change), SPEC, None, 0)


def test_experts_are_views() -> None:
    """Reading expert by expert copies nothing."""
    weights = numbered(SPEC)
    assert weights.expert(2).w13_GIH.data_ptr() == weights.w13_EGIH[2].data_ptr()
    assert weights.shared_expert().w2_HI is weights.shared_w2_HI
    assert numbered(MoESpec(hidden_size=2, intermediate_size=2)).shared_expert() is None


def test_a_layer_loads_its_shard_from_any_source() -> None:
    """Whole tensors, single experts, and a source that is the rank's shard already: the same parameters."""
    whole, parallel = numbered(EVERYTHING), Parallel(tp=3, splits=(3, 1, 2))

    def body(comm: moe_ref.LocalComm) -> None:
        shard = whole.shard(parallel, comm.rank)
        for source, sharded in ((whole, False), (OneAtATime(whole), False), (OneAtATime(shard), True)):
            layer = moe_ref.MoELayer(EVERYTHING, parallel, moe_ref.Groups(tp=comm))
            layer.load_weights(source, sharded=sharded)
            for name, tensor in shard.named_tensors():
                assert torch.equal(getattr(layer, name), tensor), name

    moe_ref.run_virtual_ranks(parallel.tp, body)


def test_an_expert_of_the_wrong_shape_is_named_when_it_is_read() -> None:
    """A source of single experts is checked expert by expert; w2 of expert 2 comes unsharded, its bias not at all."""
    whole, parallel = numbered(EVERYTHING), Parallel(tp=2)
    expert = whole.shard(parallel, 1).expert(2)._replace(w2_HI=whole.w2_EHI[2], w2_bias_H=None)
    with pytest.raises(UsageValueError, match=r"expert 2 of rank 1: w2_HI: shape \(6, 10\), but should be \(6, 5\); "
                                              r"w2_bias_H: shape None, but should be \(6,\)"):
        check_expert(expert, EVERYTHING, parallel, 1, 2)
