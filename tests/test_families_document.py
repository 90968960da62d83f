"""Protects what is said about models: the table of families, `show`, `list --models`, and the formulas in words."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_ref import MLP, Capacity, Router
from moe_ref.cli.main import cli
from moe_ref.models.registry import families, models
from moe_ref.models.words import brief, mlp_formula, numerics_words, router_steps

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"


def rows() -> list[list[str]]:
    """Cells of the first table."""
    table = DOCUMENT.read_text().split("## What the specification spans")[1].split("## What does not fit")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_the_document_is_the_registry() -> None:
    """Every family with its models, mathematics and rounding points, word by word, and no other."""
    expected = []
    for family in families().values():
        members = [model for model in models().values() if model.family.name == family.name]
        kinds = dict.fromkeys(brief(model.spec) + ("; routing injected" if model.routing == "injected" else "")
                              for model in members)
        expected.append([family.name, "<br>".join(kinds), ", ".join(model.name for model in members),
                         ", ".join(numerics_words(family.numerics))])
    assert sorted(rows()) == sorted(expected)


def run(*arguments: str) -> str:
    """What the command prints."""
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", ["gptoss.20b", "deepseek.v3", "longcat.flash", "llama4.scout", "inkling",
                                  "phi3.5.moe"])
def test_a_model_is_shown_with_its_shapes_per_rank(name: str) -> None:
    """In words and as JSON, for uneven ranks; the words hold the source, the JSON the shapes of every rank."""
    model = models()[name]
    words = run("show", name, "--tp", "3")
    assert model.title in words
    assert model.source in words
    document = json.loads(run("show", name, "--tp", "3", "--json"))
    text = json.dumps(document)
    assert name in text
    start, stop = -(-model.spec.intermediate_size // 3), model.spec.intermediate_size
    assert f"{start}" in text
    assert f"{stop}" in text
    assert "rank 2" in words


def test_the_list_names_family_and_features() -> None:
    """One line a model; JSON has as many."""
    lines = run("list", "--models").splitlines()
    assert len(lines) == len(models()) == len(json.loads(run("list", "--models", "--json"))["models"])
    [line] = [line for line in lines if line.startswith("llama4.scout ")]
    assert "llama4" in line.split()[1]
    assert "weights on the input" in line


@pytest.mark.parametrize(("mlp", "formula"), [
    (MLP(), "w2 @ (silu(w1 @ x) * (w3 @ x))"),
    (MLP(activation="relu_squared", gated=False, bias=True), "w2 @ relu(w1 @ x + b1)^2 + b2"),
    (MLP(limit=7.0, sigmoid_scale=1.702, up_offset=1.0),
     "w2 @ (g * sigmoid(1.702 * g) * (clamp(w3 @ x, +-7) + 1)), g = min(w1 @ x, 7)"),
    (MLP(limit=7.0, limit_at="after"), "w2 @ (min(silu(w1 @ x), 7) * (clamp(w3 @ x, +-7)))"),
    (MLP(gate_softcap=4.0, up_softcap=25.0),
     "w2 @ (4 * tanh(g / 4) * sigmoid(g) * (25 * tanh(u / 25))), g = w1 @ x, u = w3 @ x"),
])
def test_an_mlp_as_a_formula(mlp: MLP, formula: str) -> None:
    """The order of limit, activation, cap and offset can be read off."""
    assert mlp_formula(mlp) == formula


def test_every_option_of_a_router_has_its_sentence() -> None:
    """Nothing that changes ids or weights goes unsaid."""
    plain = router_steps(Router(num_experts=8, top_k=2))
    for options, word in (({"score": "sqrt_softplus"}, "softplus"), ({"logit_bias": True}, "learned bias"),
                          ({"logit_scale": 0.5}, "0.5"), ({"logit_softcap": 3.0}, "tanh"),
                          ({"selection_bias": "logit"}, "logit"), ({"selection_bias": "score"}, "score"),
                          ({"num_groups": 4, "num_groups_kept": 2}, "groups"), ({"renormalize": True}, "divided"),
                          ({"scaling_factor": 2.5}, "2.5"), ({"learned_scale": "expert"}, "number per expert"),
                          ({"num_zero_experts": 2}, "identity"), ({"capacity": Capacity(tokens=3)}, "3 tokens")):
        steps = router_steps(Router(num_experts=8, top_k=2, **options))  # pyrefly: ignore
        assert steps != plain
        assert any(word in step for step in steps), (options, steps)
