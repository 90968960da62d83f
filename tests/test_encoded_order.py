"""Protects act-order of encoded experts on several ranks: every scale kept, or the order moved into w1 and w3, is the
same layer; groups cut as if they were runs are refused, and are another layer where they are not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_ref import moe
from moe_ref.checkpoints.quantised_reader import open_quantised
from moe_ref.checkpoints.quantised_writer import store_quantised
from moe_ref.contract.comm import grid_groups
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights, check_quantised
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Scheme
from moe_ref.contract.weights import MoEWeights
from moe_ref.layouts.encoded_order import absorb_order, as_runs, drop_unused_groups
from moe_ref.oracle.decode import decode
from tests.distinct_encoded import assert_same_weights, decoded_weights, make_weights
from tests.quantised_configs import CONFIGS
from tests.test_quantised_checkpoints import LAYER, SHARING, write

SPEC = MoESpec(hidden_size=64, intermediate_size=288, experts=MLP(bias=True),
               router=Router(num_experts=3, top_k=2, renormalize=True),
               shared=SharedExpert(intermediate_size=160, mlp=MLP(bias=True)))
"""Three groups of w2's columns, the last of 32; of the shared expert's, two."""
ORDERED = pytest.mark.parametrize("scheme", [Scheme.GPTQ_ORDER, Scheme.GPTQ_ORDER_32])
DEGREES = pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(tp=3), Parallel(tp=4),
                                               Parallel(tp=3, splits=(5, 0, 2)), Parallel(ep=2, tp=2)],
                                  ids=["tp1", "tp2", "tp3", "tp4", "uneven", "ep2_tp2"])


def tokens() -> torch.Tensor:
    return torch.randn(7, SPEC.hidden_size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def error(part: list[QuantisedWeights] | list[MoEWeights], whole: QuantisedWeights, parallel: Parallel) -> float:
    """The largest difference of any rank's result from the whole layer's, relative to the largest output."""
    x_TH = tokens()

    def rank_main(comm: LocalComm) -> torch.Tensor:
        return moe(x_TH, part[comm.rank], SPEC, parallel, grid_groups(comm, parallel.tp, parallel.ep))

    whole_TH = moe(x_TH, whole, SPEC)
    return float(max((y_TH - whole_TH).abs().max() for y_TH in run_virtual_ranks(parallel.size, rank_main))
                 / whole_TH.abs().max())


@pytest.mark.sampled(every=4)
@DEGREES
@ORDERED
def test_both_ways_are_the_layer(scheme: Scheme, parallel: Parallel) -> None:
    """Columns in their own order with every scale; sorted columns with every scale; sorted columns with those of the
    rank's own groups. No rank's part is refused by the contract."""
    weights = make_weights(scheme, SPEC)
    absorbed = absorb_order(weights)
    kept = [weights.shard(parallel, rank) for rank in range(parallel.size)]
    sorted_parts = [absorbed.shard(parallel, rank) for rank in range(parallel.size)]
    own = [replace(part, w2=drop_unused_groups(part.w2), shared_w2=drop_unused_groups(part.shared_w2))
           for part in sorted_parts]
    for parts in (kept, sorted_parts, own):
        for rank, part in enumerate(parts):
            check_quantised(part, SPEC, parallel, rank)
        assert error(parts, weights, parallel) < 1e-14


@ORDERED
def test_no_number_changes(scheme: Scheme) -> None:
    """Every expert's w2 has its columns in an order of its own, and w13 its rows: bit by bit by plain indexing."""
    weights = make_weights(scheme, SPEC)
    absorbed = absorb_order(weights)
    orders = [torch.argsort(groups, stable=True) for groups in weights.w2.groups]
    assert not torch.equal(orders[0], orders[1])
    for e, order in enumerate(orders):
        assert torch.equal(decode(absorbed.w2)[e], decode(weights.w2)[e][:, order])
        assert torch.equal(decode(absorbed.w13)[e], decode(weights.w13)[e][:, order])
        assert torch.equal(absorbed.w13_bias_EGI[e], weights.w13_bias_EGI[e][:, order])
    order = torch.argsort(weights.shared_w2.groups, stable=True)
    assert torch.equal(decode(absorbed.shared_w2), decode(weights.shared_w2)[:, order])
    assert torch.equal(decode(absorbed.shared_w13), decode(weights.shared_w13)[:, order])
    assert torch.equal(absorbed.shared_w13_bias_GI, weights.shared_w13_bias_GI[:, order])


@ORDERED
def test_what_stays(scheme: Scheme) -> None:
    """w13's own order of columns, which no rank cuts, both tables of scales of w2, and the shared expert if so told."""
    weights = make_weights(scheme, SPEC)
    absorbed = absorb_order(weights, shared=False)
    assert torch.equal(absorbed.w13.groups, weights.w13.groups)
    assert torch.equal(absorbed.w2.scales, weights.w2.scales)
    same = {"w13": weights.w13, "w2": weights.w2, "w13_bias_EGI": weights.w13_bias_EGI}
    assert_same_weights(replace(absorbed, **same), weights)


@DEGREES
@ORDERED
def test_sorted_groups_are_cut_like_any_groups(scheme: Scheme, parallel: Parallel) -> None:
    """Under the scheme without an order a rank's columns have the scales of their own blocks, and the same numbers."""
    w2 = absorb_order(make_weights(scheme, SPEC)).w2
    runs, size = as_runs(w2), 128 if scheme is Scheme.GPTQ_ORDER else 32
    for start, stop in parallel.ranges(SPEC.intermediate_size):
        part = runs.columns((start, stop))
        blocks = -(-stop // size) - start // size if stop > start else 0
        assert part.scales.shape[-1] == blocks
        assert torch.equal(decode(part), decode(w2)[..., start:stop])
        ordered = drop_unused_groups(w2.columns((start, stop)))
        assert torch.equal(ordered.scales, part.scales)
        assert torch.equal(decode(ordered), decode(part))


def test_an_order_that_is_not_absorbed_keeps_its_scales() -> None:
    """A rank's columns are of all groups, so that nothing can be left out: what (b) saves, (a) holds."""
    weights = make_weights(Scheme.GPTQ_ORDER_32, SPEC)
    part = weights.w2.columns((0, 96))
    assert drop_unused_groups(part).scales.shape == part.scales.shape == (3, 64, 9)
    sorted_part = absorb_order(weights).w2.columns((0, 96))
    assert drop_unused_groups(sorted_part).scales.shape == (3, 64, 3)


@ORDERED
def test_groups_taken_for_runs_are_refused(scheme: Scheme) -> None:
    """By the first column that is in another group; without the refusal most numbers get another column's scale."""
    weights = make_weights(scheme, SPEC)
    with pytest.raises(UsageValueError, match=r"matrix \(0,\): column \d+ is in group \d, but should be in 0 as runs"):
        as_runs(weights.w2)
    forced = wrongly_as_runs(weights.w2)
    wrong = decode(forced) != decode(weights.w2)
    assert wrong.double().mean() > 0.4


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@ORDERED
def test_groups_taken_for_runs_are_another_layer(scheme: Scheme, tp: int) -> None:
    """The output, biases and shared expert in it, is off by percents at every degree, tp 1 too, where a right one is by
    1e-14; scales that were all equal would hide it."""
    weights, parallel = make_weights(scheme, SPEC), Parallel(tp=tp)

    def parts(held: QuantisedWeights) -> list[MoEWeights]:
        plain = decoded_weights(held)
        w2 = decode(wrongly_as_runs(held.w2))
        return [replace(plain, w2_EHI=w2).shard(parallel, rank) for rank in range(tp)]

    assert error(parts(weights), weights, parallel) > 0.01
    equal = replace(weights, w2=replace(weights.w2, scales=torch.full_like(weights.w2.scales, 0.01)))
    assert error(parts(equal), equal, parallel) < 1e-14


def wrongly_as_runs(encoded: Encoded) -> Encoded:
    """What as_runs refuses: the order forgotten."""
    size = 128 if encoded.scheme is Scheme.GPTQ_ORDER else 32
    runs = (torch.arange(encoded.num_columns, dtype=torch.int32) // size).expand_as(encoded.groups)
    return as_runs(replace(encoded, groups=runs))


def test_the_columns_without_the_rows_are_another_layer() -> None:
    """w2 sorted and w13 as it was: right at no degree."""
    weights = make_weights(Scheme.GPTQ_ORDER, SPEC)
    half = replace(weights, w2=absorb_order(weights).w2)
    for tp in (1, 2, 3):
        parallel = Parallel(tp=tp)
        assert error([half.shard(parallel, rank) for rank in range(tp)], weights, parallel) > 0.1


def test_from_a_checkpoint(tmp_path: Path) -> None:
    """GPTQ with desc_act, read by expert-parallel ranks whole in their columns, absorbed, then cut over tp: the rank's
    part of the layer that was absorbed as a whole."""
    scheme, config = CONFIGS["gptq_order"]
    weights = make_weights(scheme, SHARING)
    path = write(tmp_path, store_quantised(weights, LAYER, "deepseek_v3", SHARING, config), config)
    parallel = Parallel(ep=2, shared="replicated")
    for rank in range(2):
        read = absorb_order(open_quantised(path, LAYER, "deepseek_v3", SHARING, parallel, rank))
        assert_same_weights(read, absorb_order(weights).shard(parallel, rank))


def test_weights_that_are_cut_already() -> None:
    """Under gather a rank's w2 has columns whose rows of w13 other ranks hold."""
    part = make_weights(Scheme.GPTQ_ORDER, SPEC).shard(Parallel(tp=2, schedule="gather"), 0)
    with pytest.raises(UsageValueError, match=r"w2: 288 columns, but w13 has 144 rows: .* before the weights are cut"):
        absorb_order(part)


def test_schemes_without_an_order() -> None:
    """Groups of gptq are runs already."""
    weights = make_weights(Scheme.GPTQ, SPEC)
    for change in (absorb_order, lambda held: as_runs(held.w2), lambda held: drop_unused_groups(held.w2)):
        with pytest.raises(UsageTypeError, match="scheme gptq, but should be one of gptqorder, gptqorder32"):
            change(weights)
