"""Protects the published models: every entry is complete, sourced, computable and can be named in an id."""

import re

import pytest

from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.weights import parameter_shapes
from moe_ref.models.registry import find_model, models


def test_there_are_models() -> None:
    """The families that people run."""
    assert len(models()) >= 30
    assert {"mixtral.8x7b", "deepseek.v3", "qwen3.235b.a22b", "llama4.maverick", "gptoss.120b"} <= set(models())


@pytest.mark.parametrize("name", list(models()))
def test_a_model_is_complete(name: str) -> None:
    """Positive widths, a router, a title, a document as the source, and every weight has a size."""
    model = models()[name]
    spec = model.spec
    assert model.title
    assert re.match(r"https://[^ ]+", model.source)
    assert spec.hidden_size > 0
    assert spec.intermediate_size > 0
    assert spec.router is not None
    assert 1 <= spec.router.top_k < spec.router.num_experts
    assert spec.shared is None or spec.shared.intermediate_size > 0
    assert all(size > 0 for shape in parameter_shapes(spec).values() for size in shape)


@pytest.mark.parametrize("name", list(models()))
def test_a_name_can_stand_in_an_id(name: str) -> None:
    """Lower case letters, digits and dots; no word that reads as a number of tokens or experts."""
    assert re.fullmatch(r"[a-z][a-z0-9.]*", name)
    assert not any(re.fullmatch(r"[TE]\d+", word) for word in name.split("."))
    for text in (f"v1-{name}.T32-bf16", f"v1-{name}.T32-bf16-tp8", f"v1-{name}.T1.E2-fp32-res-outlier-s3"):
        if ".E2" not in text or models()[name].spec.num_experts > 2:
            assert format_case(parse_case(text)) == text


def test_known_dimensions() -> None:
    """Four models by heart, so that a slip of the editor in the file shows."""
    def numbers(name: str) -> tuple[int, int, int, int]:
        spec = models()[name].spec
        return spec.hidden_size, spec.intermediate_size, spec.num_experts, spec.top_k

    assert numbers("mixtral.8x7b") == (4096, 14336, 8, 2)
    assert numbers("qwen3.30b.a3b") == (2048, 768, 128, 8)
    assert numbers("deepseek.v3") == (7168, 2048, 256, 8)
    assert numbers("olmoe.1b.7b") == (2048, 1024, 64, 8)
    router = models()["deepseek.v3"].spec.router
    assert (router.num_groups, router.num_groups_kept, router.group_score) == (8, 4, "top2_sum")
    assert (router.score, router.selection_bias, router.scaling_factor) == ("sigmoid", "score", 2.5)


def test_an_unknown_name_lists_the_known_ones() -> None:
    """Wrong use, with the way out in the message."""
    with pytest.raises(UsageValueError, match=r"unknown model 'gpt2'; known: mixtral.8x7b, "):
        find_model("gpt2")
