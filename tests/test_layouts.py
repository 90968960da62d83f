"""Protects layouts: the same numbers stored in any of them are the same layer, bit for bit.

Sizes are drawn with repetition: H == I == E squares and 2I == H, where no shape check can help, come often.
"""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref import moe
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Hosting, Schedule, SharedPlacement
from moe_ref.contract.weights import MoEWeights, WeightSource, parameter_shapes
from moe_ref.layouts.convert import from_layout, layout_shapes, to_layout
from moe_ref.layouts.layout import Layout
from moe_ref.layouts.source import LayoutSource

LAYOUTS = [Layout(order=order, gate_up=gate_up, gate_first=first, stacked=stacked, w2_order=w2_order,
                  folded=folded)
           for order in ("out_in", "in_out") for gate_up in ("merged", "interleaved", "separate")
           for first in (True, False) for stacked, folded in ((True, False), (False, False), (True, True))
           for w2_order in (None, "in_out") if first or gate_up != "separate"]
"""Every layout that differs from the others, DBRX's among them: separate, folded, w2 (in, out)."""

SQUARE = MoESpec(hidden_size=4, intermediate_size=4, router=Router(num_experts=4, top_k=2))
"""Everything is 4: only merged and separate, not the order, can be told from the shapes."""


def layer(hidden: int, intermediate: int, experts: int, gated: bool = True, bias: bool = False,
          shared: bool = False) -> MoESpec:
    """A layer of these sizes; the shared expert is as wide as a routed one."""
    mlp = MLP(gated=gated, bias=bias)
    return MoESpec(hidden_size=hidden, intermediate_size=intermediate, experts=mlp,
                   router=Router(num_experts=experts, top_k=1, score="sigmoid", selection_bias="score"),
                   shared=SharedExpert(intermediate_size=intermediate, mlp=mlp, gate="sigmoid") if shared
                   else None)


def numbered(spec: MoESpec) -> MoEWeights:
    """Weights in which every element of every parameter is its own number, so that a misplaced one shows."""
    tensors, start = {}, 1
    for name, shape in parameter_shapes(spec).items():
        stop = start + torch.Size(shape).numel()
        tensors[name], start = torch.arange(start, stop, dtype=torch.float32).reshape(shape) / 64, stop
    return MoEWeights(**tensors)


def canonical(weights: WeightSource, spec: MoESpec, experts: int | None = None) -> dict[str, torch.Tensor]:
    """Everything a source yields, expert by expert, by parameter; experts: how many they are, if not the spec's."""
    held = {name: getattr(weights, name) for name in ("router_EH", "selection_bias_E", "shared_gate_SH")}
    parts = {f"expert {e}": weights.expert(e) for e in range(spec.num_experts if experts is None else experts)}
    if shared := weights.shared_expert():
        parts["shared"] = shared
    held |= {f"{who} {field}": getattr(part, field) for who, part in parts.items() for field in part._fields}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


sizes = st.sampled_from([1, 2, 3, 4, 6])
specs = st.builds(layer, sizes, sizes, sizes, st.booleans(), st.booleans(), st.booleans())


@given(specs, st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_round_trip(spec: MoESpec, layout: Layout, shared_layout: Layout) -> None:
    """Stored and read again, every number is at its place; the declared shapes are the stored ones."""
    weights = numbered(spec)
    stored = to_layout(weights, layout, spec, shared_layout=shared_layout)
    shapes = {name: tuple((held if torch.is_tensor(held) else held[-1]).shape) for name, held in stored.items()}
    assert shapes == layout_shapes(layout, spec, shared_layout=shared_layout)
    read = from_layout(stored, layout, spec, shared_layout=shared_layout)
    assert_same(canonical(read, spec), canonical(weights, spec))


tps = st.integers(1, 4)
parallels = st.one_of(
    st.builds(Parallel, tp=tps), st.builds(Parallel, tp=tps, schedule=st.just(Schedule.GATHER)),
    st.builds(Parallel, tp=tps, ep=st.integers(2, 5), hosting=st.sampled_from(Hosting), redundant=st.sampled_from(
        [(), (0,), (0, 0)]), shared=st.sampled_from(SharedPlacement)))


@given(specs, st.sampled_from(LAYOUTS), parallels, st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_rank_shard_in_any_layout(spec: MoESpec, layout: Layout, parallel: Parallel, data: st.DataObject) -> None:
    """A rank's shard is stored and read under every placement: parts without columns, ranks without experts, w2 with
    another width than w13 (gather) included. The declared shapes are the stored ones."""
    rank = data.draw(st.integers(0, parallel.size - 1))
    shard, experts = numbered(spec).shard(parallel, rank), len(parallel.hosted(spec.num_experts)[rank // parallel.tp])
    stored = to_layout(shard, layout, spec, parallel, rank)
    assert {name: tuple(held[-1].shape if isinstance(held, list) else held.shape)
            for name, held in stored.items() if not isinstance(held, list) or held} == {
        name: shape for name, shape in layout_shapes(layout, spec, parallel, rank).items()
        if torch.is_tensor(stored[name]) or experts}
    read = from_layout(stored, layout, spec, parallel, rank)
    assert_same(canonical(read, spec, experts), canonical(shard, spec, experts))
    assert all(tensor.dtype == torch.float32 for held in stored.values()
               for tensor in (held if isinstance(held, list) else [held]))


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_oracle_gives_the_same_bits(layout: Layout) -> None:
    """The layer's result depends on the numbers, not on how they are stored."""
    generator = torch.Generator().manual_seed(5)
    for spec in (SQUARE, layer(8, 4, 3, bias=True, shared=True)):  # all sizes equal; 2I == H
        weights = numbered(spec)
        x_TH = torch.randn(5, spec.hidden_size, generator=generator)
        read = from_layout(to_layout(weights, layout, spec), layout, spec)
        assert torch.equal(moe(x_TH, read, spec), moe(x_TH, weights, spec))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.is_view(MLP())], ids=str)
def test_stacked_layouts_are_views(layout: Layout) -> None:
    """Merged or interleaved, (E, out, in) or (E, in, out): nothing is copied, neither matrices nor biases."""
    spec = layer(6, 4, 3, bias=True)
    stored = to_layout(numbered(spec), layout, spec)
    read = from_layout(stored, layout, spec)
    assert isinstance(read, MoEWeights)
    for name, field in (("w13", "w13_EGIH"), ("w2", "w2_EHI"),
                        ("w13_bias", "w13_bias_EGI"), ("w2_bias", "w2_bias_EH")):
        assert getattr(read, field).untyped_storage().data_ptr() == stored[name].untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.is_view(MLP())], ids=str)
def test_other_layouts_are_read_one_expert_at_a_time(layout: Layout) -> None:
    """Separate w1 and w3, up first, and lists cannot be one view; what is copied is one expert, w2 never."""
    spec = layer(6, 4, 3)
    stored = to_layout(numbered(spec), layout, spec)
    read = from_layout(stored, layout, spec)
    assert isinstance(read, LayoutSource)
    expert, w2 = read.expert(1), stored["w2"] if layout.stacked else stored["w2"][1]
    assert expert.w2_HI.untyped_storage().data_ptr() == w2.untyped_storage().data_ptr()
    names = ("w1", "w3") if layout.gate_up == "separate" else ("w13",)
    held = {(stored[name] if layout.stacked else stored[name][1]).untyped_storage().data_ptr() for name in names}
    if expert.w13_GIH.untyped_storage().data_ptr() not in held:
        assert expert.w13_GIH.untyped_storage().nbytes() == expert.w13_GIH.nbytes


def test_experts_without_a_gate_are_views_of_separate_tensors_too() -> None:
    """Nemotron-H stacks one projection: nothing has to be put together."""
    spec = layer(6, 4, 3, gated=False)
    stored = to_layout(numbered(spec), Layout(order="out_in", gate_up="separate"), spec)
    read = from_layout(stored, Layout(order="out_in", gate_up="separate"), spec)
    assert isinstance(read, MoEWeights)
    assert read.w13_EGIH.data_ptr() == stored["w1"].data_ptr()


@given(st.sampled_from(LAYOUTS), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_strided_tensors(layout: Layout, transposed: bool, padded: bool) -> None:
    """Column-major tensors, and ones cut out of larger buffers, are read as the contiguous ones."""
    spec = layer(6, 4, 3, bias=True)

    def restride(tensor: torch.Tensor) -> torch.Tensor:
        if padded:
            buffer = torch.full([2 * size + 1 for size in tensor.shape], torch.nan)
            view = buffer[tuple(slice(1, None, 2) for _ in tensor.shape)]
            view.copy_(tensor)
            tensor = view
        return tensor.mT.contiguous().mT if transposed and tensor.dim() > 1 else tensor

    stored = {name: restride(held) if torch.is_tensor(held) else [restride(tensor) for tensor in held]
              for name, held in to_layout(numbered(spec), layout, spec).items()}
    assert any(not held.is_contiguous() for held in stored.values() if torch.is_tensor(held)) or not (
        transposed or padded)
    assert_same(canonical(from_layout(stored, layout, spec), spec), canonical(numbered(spec), spec))


def alike(one: Layout, two: Layout) -> bool:
    """Whether both take tensors of the same names, shapes and kinds for the square layer."""
    return one.stacked == two.stacked and layout_shapes(one, SQUARE) == layout_shapes(two, SQUARE)


def effective(layout: Layout) -> Layout:
    """The layout with its w2_order spelt out, so that two spellings of one layout are equal."""
    return replace(layout, w2_order=layout.w2_order or layout.order)


def test_square_tensors_of_another_layout_differ_in_values() -> None:
    """H == I == E: the shapes fit, so the layout given decides. Each pair of layouts reads other numbers."""
    spec, weights, pairs = SQUARE, numbered(SQUARE), 0
    x_TH = torch.eye(4)
    right = moe(x_TH, weights, spec)
    for stored_as, read_as in combinations(LAYOUTS, 2):
        if effective(stored_as) != effective(read_as) and alike(stored_as, read_as):
            read = from_layout(to_layout(weights, stored_as, spec), read_as, spec)
            pairs += 1
            assert not torch.equal(moe(x_TH, read, spec), right), (stored_as, read_as)
    assert pairs >= 30


def test_merged_read_as_interleaved_is_another_layer_in_any_size() -> None:
    """gpt-oss interleaves, others do not; both are (E, 2I, H) whatever the sizes."""
    spec = layer(6, 4, 3)
    merged, interleaved = (Layout(order="out_in", gate_up=kind) for kind in ("merged", "interleaved"))
    stored = to_layout(numbered(spec), merged, spec)
    x_TH, read = torch.eye(6), from_layout(stored, interleaved, spec)
    assert not torch.equal(moe(x_TH, read, spec), moe(x_TH, numbered(spec), spec))


def test_interleaved_by_hand() -> None:
    """Row 2i is gate i, row 2i + 1 is up i (gpt-oss); in (in, out) the same holds for columns; biases alike."""
    spec = layer(3, 2, 1, bias=True)
    w13_RH = torch.arange(12.0).reshape(1, 4, 3)
    bias = torch.arange(4.0).reshape(1, 4)
    rest = {"w2": torch.zeros(1, 3, 2), "w2_bias": torch.zeros(1, 3), "router_EH": torch.zeros(1, 3),
            "selection_bias_E": torch.zeros(1)}
    for order, w13, w2 in (("out_in", w13_RH, rest["w2"]), ("in_out", w13_RH.mT, rest["w2"].mT)):
        read = from_layout(rest | {"w13": w13, "w2": w2, "w13_bias": bias},
                           Layout(order=order, gate_up="interleaved"), spec).expert(0)
        assert read.w13_GIH.tolist() == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]
        assert read.w13_bias_GI.tolist() == [[0, 2], [1, 3]]


def test_up_first_by_hand() -> None:
    """The upper half of a merged tensor is then up, so the lower half comes first in G."""
    spec = layer(1, 2, 1)
    stored = {"w13": torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), "w2": torch.zeros(1, 1, 2),
              "router_EH": torch.zeros(1, 1), "selection_bias_E": torch.zeros(1)}
    read = from_layout(stored, Layout(order="out_in", gate_up="merged", gate_first=False), spec)
    assert read.expert(0).w13_GIH.flatten().tolist() == [3, 4, 1, 2]
