"""Parts of encoded matrices: decoding a part gives, bit for bit, the part of what the whole decodes to."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.contract.encoded import Encoded, check_encoded, packed, unpacked
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights, check_quantised
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Scheme
from moe_ref.contract.weights import MoEWeights, parameter_shapes
from moe_ref.oracle.decode import decode
from tests.made_encoded import SCHEMES, drawn, same, same_tensors
from tests.nightly import examples

ROWS, COLUMNS = 131, 261
CUTS = (0, 1, 2, 15, 16, 31, 33, 64, 127, 128, 129, 130, 131)
"""On blocks, beside them, inside bytes."""


def check(part: Encoded, whole: torch.Tensor, rows: slice, columns: slice) -> None:
    """The part is one of its own in every way, and stands for those elements."""
    wanted = whole[..., rows, columns]
    check_encoded("part", part, part.scheme, tuple(wanted.shape))
    assert all(tensor.is_contiguous() for tensor in part.tensors.values())
    assert same(decode(part), wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_cut_of_rows(scheme: Scheme) -> None:
    """All pairs of cuts, empty parts among them."""
    encoded = drawn(scheme, (ROWS, 37))
    whole = decode(encoded)
    for start in CUTS:
        for stop in [cut for cut in CUTS if cut >= start]:
            check(encoded.rows((start, stop)), whole, slice(start, stop), slice(None))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_cut_of_columns(scheme: Scheme) -> None:
    """The same, up to the odd last column: half a byte of int4 and e2m1."""
    encoded = drawn(scheme, (2, 3, COLUMNS))
    whole, cuts = decode(encoded), (*CUTS, 255, 256, 260, 261)
    for start in cuts:
        for stop in [cut for cut in cuts if cut >= start]:
            check(encoded.columns((start, stop)), whole, slice(None), slice(start, stop))


@settings(max_examples=examples(400), deadline=None, derandomize=True)
@given(scheme=st.sampled_from(SCHEMES), data=st.data())
def test_parts_of_parts(scheme: Scheme, data: st.DataObject) -> None:
    """A part is cut again, along either axis, as tp inside ep inside a checkpoint's shard does: offsets add up."""
    sizes = [data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))]
    part = drawn(scheme, (2, *sizes))
    whole = decode(part)
    for _ in range(data.draw(st.integers(1, 4))):
        axis = data.draw(st.integers(0, 1))
        start = data.draw(st.integers(0, sizes[axis]))
        cut = start, data.draw(st.integers(start, sizes[axis]))
        sizes[axis] = cut[1] - cut[0]
        part, whole = (part.rows, part.columns)[axis](cut), whole.narrow(axis + 1, start, sizes[axis])
        check(part, whole, slice(None), slice(None))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_part_holds_no_more_than_it_needs(scheme: Scheme) -> None:
    """Scales of other ranks' blocks stay with them; the part does not keep the whole alive."""
    encoding = ENCODINGS[scheme]
    part = drawn(scheme, (384, 384)).rows((130, 250)).columns((130, 250))
    assert part.scales.shape[0] == {None: 1, 1: 120, 128: 1}[encoding.rows]
    if not encoding.order:
        assert part.scales.shape[1] == (1 if encoding.columns is None
                                        else -(-250 // encoding.columns) - 130 // encoding.columns)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in part.tensors.values())


def test_the_unused_half_of_the_last_byte_is_zero() -> None:
    """Two parts with the same numbers have the same bytes, however they were cut."""
    encoded = drawn(Scheme.MXFP4, (3, 64))
    assert same_tensors(encoded.columns((0, 7)), encoded.columns((0, 9)).columns((0, 7)))
    assert int(encoded.columns((0, 7)).codes[..., -1].max()) < 16
    assert int(encoded.columns((1, 8)).codes[..., -1].max()) < 16


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_packing(count: int) -> None:
    """The even column lies in the low half."""
    codes = torch.arange(3 * count).reshape(3, count) % 16
    assert torch.equal(unpacked(packed(codes), count), codes.to(torch.uint8))
    if count:
        assert int(packed(codes)[0, 0]) == int(codes[0, 0]) + 16 * int(codes[0, 1] if count > 1 else 0)


@pytest.mark.parametrize(("cut", "words"), [((-1, 4), r"rows \(-1, 4\)"), ((3, 99), r"rows \(3, 99\)"),
                                            ((4, 3), r"rows \(4, 3\)")])
def test_parts_that_are_not_there(cut: tuple[int, int], words: str) -> None:
    """A slice would be clipped or taken from the end, and its scales with it."""
    encoded = drawn(Scheme.GPTQ, (9, 9))
    with pytest.raises(UsageValueError, match=words + ", but should lie in 0 to 9"):
        encoded.rows(cut)
    with pytest.raises(UsageValueError, match=words.replace("rows", "columns") + ", but should lie in 0 to 9"):
        encoded.columns(cut)


# Ranks.

SPEC = MoESpec(hidden_size=96, intermediate_size=200, experts=MLP(bias=True),
               router=Router(num_experts=5, top_k=2, selection_bias="score"),
               shared=SharedExpert(intermediate_size=70, mlp=MLP(bias=True)))
PARALLELS = {
    **{f"tp{tp}": Parallel(tp=tp) for tp in (1, 2, 3, 4, 8)},
    "uneven": Parallel(tp=3, splits=(7, 0, 4)), "gather": Parallel(tp=3, schedule="gather"),
    "ep2": Parallel(ep=2), "ep2_tp3": Parallel(ep=2, tp=3, splits=(5, 3, 1)),
    "round robin": Parallel(ep=3, tp=2, hosting="round_robin"),
    "redundant": Parallel(ep=3, redundant=(4, 0, 4), hosting="round_robin"),
    "more ranks than experts": Parallel(ep=8),
    "tokens over ep": Parallel(ep=2, tp=2, tokens="sharded_ep"),
    "whole shared expert": Parallel(tp=4, shared="replicated")}


def layer(scheme: Scheme) -> QuantisedWeights:
    """Random codes and scales of a whole layer; the rest in bf16."""
    shapes = parameter_shapes(SPEC)
    matrices = {"w13": "w13_EGIH", "w2": "w2_EHI", "shared_w13": "shared_w13_GIH", "shared_w2": "shared_w2_HI"}
    plain = {name: torch.arange(math.prod(shape)).reshape(shape).bfloat16() for name, shape in shapes.items()
             if name not in matrices.values()}
    if ENCODINGS[scheme].input_scale:
        plain |= {"w13_input_scale_E": torch.rand(5), "w2_input_scale_E": torch.rand(5),
                  "shared_w13_input_scale": torch.tensor(2.0), "shared_w2_input_scale": torch.tensor(3.0)}
    encoded = {field: drawn(scheme, shapes[name], seed) for seed, (field, name) in enumerate(matrices.items())}
    return QuantisedWeights(scheme=scheme, **encoded, **plain)


def decoded(weights: QuantisedWeights) -> MoEWeights:
    """All of it in fp64."""
    plain = {name: tensor.double() for name, tensor in weights.named_tensors()
             if "." not in name and "input_scale" not in name}
    assert weights.shared_w13 is not None
    assert weights.shared_w2 is not None
    return MoEWeights(w13_EGIH=decode(weights.w13), w2_EHI=decode(weights.w2),
                      shared_w13_GIH=decode(weights.shared_w13), shared_w2_HI=decode(weights.shared_w2), **plain)


@pytest.mark.sampled(every=4, each="scheme")
@pytest.mark.parametrize("parallel", PARALLELS.values(), ids=PARALLELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards(scheme: Scheme, parallel: Parallel) -> None:
    """Encoded, cut and decoded is decoded and cut: on every rank, of every parameter, inside blocks and bytes."""
    weights = layer(scheme)
    check_quantised(weights, SPEC, Parallel(), 0)
    whole = decoded(weights)
    for rank in range(parallel.size):
        shard = weights.shard(parallel, rank)
        check_quantised(shard, SPEC, parallel, rank)
        ours, theirs = (dict(one.named_tensors()) for one in (decoded(shard), whole.shard(parallel, rank)))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not same(ours[name], theirs[name])] == []
        if weights.w13_input_scale_E is not None:
            hosted = list(parallel.hosted(5)[parallel.coordinates(rank)[0]])
            assert shard.w13_input_scale_E is not None
            assert shard.w13_input_scale_E.tolist() == weights.w13_input_scale_E[hosted].tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_shard_is_its_own(scheme: Scheme) -> None:
    """Nothing is shared with the whole: a rank that repacks its codes in place changes no other's."""
    weights = layer(scheme)
    shard = weights.shard(Parallel(tp=2, shared="replicated"), 1)
    addresses = {tensor.untyped_storage().data_ptr() for _, tensor in weights.named_tensors()}
    assert [name for name, tensor in shard.named_tensors() if tensor.numel()
            and tensor.untyped_storage().data_ptr() in addresses] == []


def test_experts_in_another_order() -> None:
    """Round robin and redundant hosting take experts one by one."""
    encoded = drawn(Scheme.NVFP4, (5, 2, 7, 33))
    assert same(decode(encoded.experts([4, 0, 4])), decode(encoded)[[4, 0, 4]])
    assert encoded.experts([]).shape == (0, 2, 7, 33)
    assert same_tensors(encoded.at(3), replace(encoded, **{name: one[3] for name, one in encoded.tensors.items()}))
