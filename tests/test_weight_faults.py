"""Protects the refusals of weights: a shard that does not fit is told with both numbers, the rank and the expert."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import moe_fast
import moe_ref
from moe_ref.contract.comm import CommCall, grid_groups
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Schedule
from moe_ref.contract.weights import MoEWeights, check_expert, check_weights
from tests.test_weights import EVERYTHING, SPEC, OneAtATime, numbered

ROUTED = MoESpec(hidden_size=6, intermediate_size=10, router=Router(num_experts=3, top_k=1, renormalize=True))
SHARING = replace(ROUTED, shared=SharedExpert(intermediate_size=8))

K_MISMATCHES = {
    "w2 is not cut": (ROUTED, Parallel(tp=2), {"w2_EHI": (3, 6, 10)}, 5, 10),
    "w2 is empty": (ROUTED, Parallel(tp=2), {"w2_EHI": (3, 6, 0)}, 5, 0),
    "w13 is empty": (ROUTED, Parallel(tp=2, splits=(1, 0)), {"w13_EGIH": (3, 2, 0, 6)}, 0, 10),
    "another rank's w2": (ROUTED, Parallel(tp=2, splits=(60, 40)), {"w2_EHI": (3, 6, 4)}, 6, 4),
    "the shared w2 is not cut": (SHARING, Parallel(tp=2), {"shared_w2_HI": (6, 8)}, 4, 8),
    "w2 is cut by columns under gather": (ROUTED, Parallel(tp=2, schedule="gather"), {"w2_EHI": (3, 3, 5)}, 10, 5),
    "the shared w2 too": (SHARING, Parallel(tp=2, schedule="gather"), {"shared_w2_HI": (3, 4)}, 8, 4),
}
"""Spec, grid, what rank 0 holds instead of its own, and the two K of the message."""


def mismatched(name: str) -> tuple[MoESpec, Parallel, MoEWeights, str]:
    """The mistake on every rank, and the words that it is told in."""
    spec, parallel, change, made, taken = K_MISMATCHES[name]
    [parameter] = change
    part = "shared_" if parameter.startswith("shared_") else ""
    shard = replace(numbered(spec).shard(parallel, 0), **{parameter: torch.zeros(change[parameter])})
    if parallel.schedule is Schedule.GATHER:
        return spec, parallel, shard, (f"K mismatch: the activation gathered from all ranks has {made} columns, but "
                                       f"the {part}w2_E?HI shard takes {taken}")
    return spec, parallel, shard, (f"K mismatch: {part}w13_E?GIH makes an activation shard of {made} columns, but the "
                                   f"{part}w2_E?HI shard takes {taken}")


@pytest.mark.parametrize("name", K_MISMATCHES)
@pytest.mark.parametrize("package", [moe_ref, moe_fast], ids=lambda package: package.__name__)
def test_k_mismatch_before_anything_is_computed(package: Any, name: str) -> None:
    """The commonest sharding mistake: w13 is cut as it should be and w2 not, or the other way round. Every rank says
    both K, and nothing was communicated."""
    spec, parallel, shard, words = mismatched(name)
    calls: list[CommCall] = []

    def body(comm: moe_ref.LocalComm) -> None:
        groups = moe_ref.Groups(tp=moe_ref.CountingComm(comm, calls))
        with pytest.raises(UsageValueError, match=f"^weights: {words}"):
            package.moe(torch.ones(4, 6), shard, spec, parallel, groups)

    moe_ref.run_virtual_ranks(2, body)
    assert calls == []


@pytest.mark.parametrize("name", K_MISMATCHES)
def test_k_mismatch_of_an_expert_that_is_read_alone(name: str) -> None:
    """A source of single experts shows its shapes when they are read: the expert and its rank are named too."""
    spec, parallel, shard, words = mismatched(name)
    who = "shared expert" if "shared" in words else "expert [0-2]"

    def body(comm: moe_ref.LocalComm) -> None:
        with pytest.raises(UsageValueError, match=f"^{who} of rank {comm.rank}: {words}"):
            moe_ref.moe(torch.ones(4, 6), OneAtATime(shard), spec, parallel, moe_ref.Groups(tp=comm))

    moe_ref.run_virtual_ranks(2, body)


@pytest.mark.parametrize("source", [lambda shard: shard, OneAtATime], ids=["in memory", "one at a time"])
@pytest.mark.parametrize("name", K_MISMATCHES)
def test_k_mismatch_while_a_layer_is_loaded(name: str, source: Any) -> None:
    """Both numbers, whatever the weights come from."""
    spec, parallel, shard, words = mismatched(name)

    def body(comm: moe_ref.LocalComm) -> None:
        layer = moe_ref.MoELayer(spec, parallel, moe_ref.Groups(tp=comm))
        with pytest.raises(UsageValueError, match=words):
            layer.load_weights(source(shard), sharded=True)

    moe_ref.run_virtual_ranks(2, body)


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


def test_an_expert_of_the_wrong_shape_is_named_when_it_is_read() -> None:
    """A source of single experts is checked expert by expert; w2 of expert 2 comes unsharded, its bias not at all."""
    whole, parallel = numbered(EVERYTHING), Parallel(tp=2)
    expert = whole.shard(parallel, 1).expert(2)._replace(w2_HI=whole.w2_EHI[2], w2_bias_H=None)
    with pytest.raises(UsageValueError, match=r"expert 2 of rank 1: K mismatch: .*; w2_HI: shape \(6, 10\), but should "
                                              r"be \(6, 5\); w2_bias_H: shape None, but should be \(6,\)"):
        check_expert(expert, EVERYTHING, parallel, 1, 2)


def test_an_expert_of_another_rank_is_named_by_its_number() -> None:
    """The first expert that rank 3 hosts is expert 2 of the layer, for the loader and for a writer of layouts."""
    parallel = Parallel(ep=2, tp=2)
    spec = replace(EVERYTHING, router=replace(EVERYTHING.router, num_experts=4))
    shard = numbered(spec).shard(parallel, 3)
    wrong = OneAtATime(replace(shard, w2_EHI=torch.zeros(2, 6, 4)))
    words = r"expert 2 of rank 3: K mismatch: .* activation shard of 5 columns, but the w2_HI shard takes 4"
    layout = moe_ref.Layout(order="out_in", gate_up="merged")
    with pytest.raises(UsageValueError, match=words):
        moe_ref.to_layout(wrong, layout, spec, parallel, 3)

    def body(comm: moe_ref.LocalComm) -> None:
        layer = moe_ref.MoELayer(spec, parallel, grid_groups(comm, 2, 2))
        if comm.rank == 3:
            with pytest.raises(UsageValueError, match=words):
                layer.load_weights(wrong, sharded=True)

    moe_ref.run_virtual_ranks(4, body)


def test_the_hosted_experts_are_told() -> None:
    """Weights of another ep rank: the message names the rank of the grid, its experts, and both numbers; a source that
    says how many it has is refused before one is read."""
    parallel = Parallel(ep=2, tp=2, hosting="round_robin")
    shard = numbered(EVERYTHING).shard(parallel, 3)
    words = r"weights of rank 1, which hosts 2 experts \(0, 2\): .*w2_EHI: shape \(1, 6, 5\), but should be \(2, 6, 5\)"
    with pytest.raises(UsageValueError, match=words):
        check_weights(shard, EVERYTHING, parallel, 1)
    layout = moe_ref.Layout(order="out_in", gate_up="separate", stacked=False)
    stored = moe_ref.to_layout(shard, layout, EVERYTHING, parallel, 3)
    source = moe_ref.from_layout(stored, layout, EVERYTHING, parallel, 3)
    with pytest.raises(UsageValueError, match=r"of rank 1, which hosts 2 experts .*: 1 experts, but should be 2"):
        check_weights(source, EVERYTHING, parallel, 1)


def test_groups_that_cannot_communicate() -> None:
    """Degrees in the place of groups are told before any rank waits for another."""
    spec = MoESpec(hidden_size=8, intermediate_size=8, router=Router(num_experts=4, top_k=2))
    with pytest.raises(UsageTypeError, match=r"groups\.tp: int, but should be a Comm"):
        moe_ref.MoELayer(spec, moe_ref.Parallel(tp=2), moe_ref.Groups(tp=2))  # type: ignore[arg-type]
