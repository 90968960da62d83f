"""Protects the refusals of layouts: nothing is left out, promoted or taken for numbers that it is not."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.errors import UsageError, UsageTypeError, UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.weights import (
    KEPT_PRECISE,
    WHOLE_PARAMETERS,
    ExpertWeights,
    MoEWeights,
    WeightSource,
    check_weights,
    parameter_shapes,
)
from moe_ref.layouts.convert import from_layout, layout_shapes, to_layout
from moe_ref.layouts.layout import Layout
from tests.test_layouts import layer, numbered

MERGED = Layout(order="out_in", gate_up="merged")
LISTED = Layout(order="out_in", gate_up="separate", stacked=False)
FULL = MoESpec(hidden_size=6, intermediate_size=4, experts=MLP(bias=True), output_bias=True,
               router=Router(num_experts=3, top_k=1, score="sigmoid", selection_bias="score", logit_bias=True,
                             learned_scale="layer"),
               shared=SharedExpert(intermediate_size=4, mlp=MLP(bias=True), gate="sigmoid"))
"""Every parameter that there is."""

UNGATED_SHARE = replace(FULL, shared=SharedExpert(intermediate_size=4))
"""The shared expert has no parameters but its own matrices."""


def test_all_faults_at_once() -> None:
    """Missing, unknown and misshaped tensors in one message, each with both numbers."""
    spec = layer(6, 4, 3, bias=True)
    stored = to_layout(numbered(spec), Layout(order="in_out", gate_up="merged"), spec)
    del stored["w2_bias"], stored["router_EH"]
    stored["w3"] = torch.zeros(3, 6, 4)
    with pytest.raises(UsageValueError) as caught:
        from_layout(stored, Layout(order="out_in", gate_up="merged"), spec)
    for fault in ("w2_bias is missing, but the layout needs (3, 6)", "router_EH is missing", "w3 is given",
                  "w13: shape (3, 6, 8), but should be (3, 8, 6)", "w2: shape (3, 4, 6), but should be (3, 6, 4)"):
        assert fault in str(caught.value)


def test_faults_of_lists() -> None:
    """A list that is too short, one tensor of another shape in it, and a stack where a list should be."""
    spec, layout = layer(6, 4, 3), Layout(order="out_in", gate_up="separate", stacked=False)
    stored = to_layout(numbered(spec), layout, spec)
    wrong = stored | {"w1": stored["w1"][:2], "w3": torch.stack(stored["w3"]),
                      "w2": [*stored["w2"][:2], torch.zeros(4, 6)]}
    with pytest.raises(UsageValueError) as caught:
        from_layout(wrong, layout, spec)
    for fault in ("w1: 2 tensors, but should be 3", "w3: Tensor, but should be a list of 3 tensors",
                  "w2[2]: shape (4, 6), but should be (6, 4)"):
        assert fault in str(caught.value)


@pytest.mark.parametrize("e", [-1, 3])
def test_an_expert_that_is_not_there(e: int) -> None:
    """A negative number must not wrap round to the last expert."""
    spec, layout = layer(6, 4, 3), Layout(order="out_in", gate_up="separate", stacked=False)
    with pytest.raises(UsageValueError, match=rf"expert {e}, but should be in \[0, 3\)"):
        from_layout(to_layout(numbered(spec), layout, spec), layout, spec).expert(e)


@pytest.mark.parametrize(("options", "words"), [
    ({"order": "row", "gate_up": "both"}, "order='row'.*gate_up='both'"),
    ({"order": "out_in", "gate_up": "separate", "gate_first": False}, "separate tensors have no first one"),
    ({"order": "out_in", "gate_up": "merged", "stacked": False, "folded": True}, "no axis E"),
])
def test_layouts_without_a_meaning(options: dict, words: str) -> None:
    """Every fault in one message."""
    with pytest.raises(UsageValueError, match=words):
        Layout(**options)


def refused(call: Callable[..., Any], *arguments: Any, error: type[Exception] = UsageValueError,
            **options: Any) -> str:
    """What the one error says."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("rank", [-1, 2, 5, True, 1.0])
def test_a_rank_that_is_not_there(rank: Any) -> None:
    """-1 would give the last rank's part, and a rank beyond the last one is no matter of an index."""
    spec, parallel = layer(6, 4, 3), Parallel(tp=2)
    shard = numbered(spec).shard(parallel, 1)
    stored = to_layout(shard, MERGED, spec, parallel, 1)
    for call, what in ((from_layout, (stored, MERGED)), (layout_shapes, (MERGED,)), (to_layout, (shard, MERGED))):
        assert f"rank={rank!r}, but should be" in refused(call, *what, spec, parallel, rank)


def test_a_rank_without_parallel_sizes() -> None:
    """One rank alone has the number 0."""
    spec = layer(6, 4, 3)
    stored = to_layout(numbered(spec), MERGED, spec)
    assert "rank=1, but should be" in refused(from_layout, stored, MERGED, spec, rank=1)


def test_experts_of_other_ranks_are_refused() -> None:
    """All experts where the rank hosts two of three: as a stack, as a list, and as weights to be written."""
    spec, parallel = layer(6, 4, 3), Parallel(ep=2, tp=2)
    weights = numbered(spec).shard(Parallel(tp=2), 1)
    for layout, words in ((MERGED, r"w2: shape \(3, 6, 2\), but should be \(2, 6, 2\)"),
                          (LISTED, "w2: 3 tensors, but should be 2, one per expert")):
        stored = to_layout(weights, layout, spec, Parallel(tp=2), 1)
        assert re.search(words, refused(from_layout, stored, layout, spec, parallel, 1))
    said = refused(to_layout, weights, MERGED, spec, parallel, 1)
    assert "rank 1, which hosts 2 experts (0, 1): w13_EGIH: shape (3, 2, 2, 6), but should be (2, 2, 2, 6)" in said


UNFIT = {
    "a spec with fewer experts": (layer(6, 4, 3), layer(6, 4, 2), "router_EH"),
    "a spec with more experts": (layer(6, 4, 3), layer(6, 4, 4), "router_EH"),
    "another intermediate size": (layer(6, 4, 3), layer(6, 5, 3), "w13_E?GIH"),
    "biases that the spec lacks": (layer(6, 4, 3, bias=True), layer(6, 4, 3), "w13_bias_E?GI"),
    "biases that the weights lack": (layer(6, 4, 3), layer(6, 4, 3, bias=True), "w2_bias_E?H"),
    "gated weights, a spec without gate": (layer(6, 4, 3), layer(6, 4, 3, gated=False), "w13_E?GIH"),
    "weights without gate, a gated spec": (layer(6, 4, 3, gated=False), layer(6, 4, 3), "w13_E?GIH"),
    "a missing shared expert": (replace(FULL, shared=None), UNGATED_SHARE, "shared_w13_GIH|shared expert of rank 0"),
    "a shared expert that the spec lacks": (UNGATED_SHARE, replace(FULL, shared=None),
                                            "shared_w13_GIH|shared expert of rank 0"),
    "a shared expert of another width": (
        UNGATED_SHARE, replace(FULL, shared=SharedExpert(intermediate_size=5)), "shared_w2_HI"),
    "identity experts in place of real ones": (
        MoESpec(hidden_size=6, intermediate_size=4, router=Router(num_experts=4, top_k=1)),
        MoESpec(hidden_size=6, intermediate_size=4, router=Router(num_experts=3, num_zero_experts=1, top_k=1)),
        "w13_EGIH|4 experts, but should be 3"),
}


@pytest.mark.parametrize("read", [False, True], ids=["in memory", "one expert at a time"])
@pytest.mark.parametrize("name", UNFIT)
def test_weights_of_another_spec_are_not_written(name: str, read: bool) -> None:
    """What does not fit would be left out without a word, or come out in a wrong shape."""
    held_spec, spec, words = UNFIT[name]
    weights: WeightSource = numbered(held_spec)
    if read:
        weights = from_layout(to_layout(weights, LISTED, held_spec), LISTED, held_spec)
        assert not isinstance(weights, MoEWeights)
    assert to_layout(weights, MERGED, held_spec).keys() == layout_shapes(MERGED, held_spec).keys()
    assert re.search(words, refused(to_layout, weights, MERGED, spec))


@dataclass
class Converted:
    """Another source's experts, one of them in another dtype."""

    source: MoEWeights
    e: int
    dtype: torch.dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def expert(self, e: int) -> ExpertWeights:
        expert = self.source.expert(e)
        return ExpertWeights(*(tensor.to(self.dtype) for tensor in expert[:2])) if e == self.e else expert


def test_experts_of_two_dtypes_are_not_stacked() -> None:
    """torch.stack would make fp32 of both."""
    spec = layer(6, 4, 3)
    said = refused(to_layout, Converted(numbered(spec), 1, torch.float16), MERGED, spec)
    for field in ("w13_GIH", "w2_HI"):
        assert (f"expert 1, {field}: dtype torch.float16, but should be torch.float32 as expert 0, w13_GIH"
                in said)


@pytest.mark.parametrize("layout", [MERGED, LISTED], ids=["stacked", "listed"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_what_is_no_number_of_its_own_is_refused(dtype: torch.dtype, layout: Layout) -> None:
    """A quantised weight without its scales is another weight; every such tensor is named."""
    stored = to_layout(numbered(FULL), layout, FULL)
    wrong = {name: held.to(dtype) if torch.is_tensor(held) else [tensor.to(dtype) for tensor in held]
             for name, held in stored.items()}
    said = refused(from_layout, wrong, layout, FULL)
    for name, held in wrong.items():
        label = name if torch.is_tensor(held) else f"{name}[2]"
        assert f"{label}: dtype {dtype}, but should be one of torch.float32, " in said


def test_mixtures_are_refused_at_once() -> None:
    """fp16 beside int8, an fp64 expert, an fp16 router beside fp32 experts, and a missing tensor: one message."""
    spec = layer(6, 4, 3)
    stored = to_layout(numbered(spec), LISTED, spec)
    stored["w3"][0] = stored["w3"][0].to(torch.int8)
    stored["w3"][1] = stored["w3"][1].double()
    stored["router_EH"] = stored["router_EH"].half()
    del stored["selection_bias_E"]
    said = refused(from_layout, stored, LISTED, spec)
    for fault in ("w3[0]: dtype torch.int8, but should be one of",
                  "w3[1]: dtype torch.float64, but should be torch.float32 as w1[0]",
                  "router_EH: dtype torch.float16, but should be torch.float32 as w1[0]",
                  "selection_bias_E is missing"):
        assert fault in said


@pytest.mark.parametrize("name", parameter_shapes(FULL))
def test_the_rule_of_dtypes_is_that_of_weights_in_memory(name: str) -> None:
    """bf16 weights with one parameter in another dtype: what MoEWeights refuse is refused here, and no more."""
    whole = {key: tensor.bfloat16() for key, tensor in numbered(FULL).named_tensors()}
    stored_name = name if name in WHOLE_PARAMETERS else name.rpartition("_")[0]
    for dtype in PLAIN_DTYPES:
        weights = MoEWeights(**(whole | {name: whole[name].to(dtype)}))
        stored = to_layout(MoEWeights(**whole), MERGED, FULL)
        stored[stored_name] = stored[stored_name].to(dtype)
        if dtype == torch.bfloat16 or (dtype == torch.float32 and name in KEPT_PRECISE):
            check_weights(weights, FULL, None, 0)
            check_weights(from_layout(stored, MERGED, FULL), FULL, None, 0)
        else:
            refused(check_weights, weights, FULL, None, 0, error=UsageError)
            assert " as w13" in refused(from_layout, stored, MERGED, FULL)


MISTAKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a naming for a layout": ({"layout": "mixtral"}, "layout: str, but should be Layout"),
    "no spec": ({"spec": None}, "spec: NoneType, but should be MoESpec"),
    "a number of ranks": ({"parallel": 2}, "parallel: int, but should be Parallel or None"),
    "another shared layout": ({"shared_layout": "out_in"}, "shared_layout: str, but should be Layout or None"),
    "two at once": ({"layout": None, "spec": 3}, "layout: NoneType.*spec: int"),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_arguments_of_another_type(name: str) -> None:
    """Said before anything is read, all of them at once."""
    change, words = MISTAKEN[name]
    spec = layer(6, 4, 3)
    weights = numbered(spec)
    given = {from_layout: {"tensors": to_layout(weights, MERGED, spec)}, layout_shapes: {},
             to_layout: {"weights": weights}}
    for call, what in given.items():
        options = what | {"layout": MERGED, "spec": spec} | change
        assert re.search(words, refused(call, **options, error=UsageTypeError))


@pytest.mark.parametrize(("tensors", "words"), [
    (None, "tensors: NoneType, but should be Mapping"),
    ([], "tensors: list, but should be Mapping"),
    ({"w1": [1, 2], "w2": 4}, r"w1\[0\]: int, but should be a tensor; w1\[1\].*w2: int, but should be a tensor"),
    ({"w1": "abc", "w2": None}, r"w1\[0\]: str, but should be a tensor.*w2: NoneType, but should be a tensor"),
])
def test_tensors_that_are_none(tensors: Any, words: str) -> None:
    """Lists of numbers, and what a loader left empty."""
    assert re.search(words, refused(from_layout, tensors, LISTED, layer(6, 4, 3), error=UsageTypeError))


def test_weights_that_are_none() -> None:
    """A dict of tensors is no source of experts."""
    said = refused(to_layout, {"w13": torch.zeros(3, 8, 6)}, MERGED, layer(6, 4, 3), error=UsageTypeError)
    assert "weights: dict, but should be a WeightSource, which has expert, shared_expert, router_EH" in said
