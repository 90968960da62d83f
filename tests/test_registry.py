"""Protects the published models: every entry is complete, sourced, computable and can be named in an id."""

import importlib
import os
import re
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.spec import MLP, MoESpec
from moe_ref.contract.weights import MoEWeights, parameter_shapes
from moe_ref.models.entries import read
from moe_ref.models.registry import DEFAULTS_OF, Model, _model, cut_experts, families, find_model, models
from moe_ref.oracle.layer import moe


def test_there_are_models() -> None:
    """The families that people run; a family without a model would be a promise nobody can try."""
    assert {"mixtral.8x7b", "deepseek.v3", "qwen3.235b.a22b", "llama4.maverick", "gptoss.120b"} <= set(models())
    assert {model.family.name for model in models().values()} == set(families())


@pytest.mark.parametrize("name", list(models()))
def test_a_model_is_complete(name: str) -> None:
    """A router, a title, a document or a configuration class as the source, and every weight has a size."""
    model = models()[name]
    spec = model.spec
    assert model.title
    assert re.match(rf"https://[^ ]+|{DEFAULTS_OF}\w+/configuration_\w+\.py \w+, defaults$", model.source)
    assert spec.router is not None
    assert 1 <= spec.router.top_k < spec.router.num_experts
    assert all(size > 0 for shape in parameter_shapes(spec).values() for size in shape)
    assert not model.beside_source or model.note, "what is not the source's needs a word"
    assert "NOT EXPRESSED" not in model.note


@pytest.mark.parametrize("name", list(models()))
def test_a_name_can_stand_in_an_id(name: str) -> None:
    """Lower case letters, digits and dots; no word that reads as a number of tokens or experts."""
    assert re.fullmatch(r"[a-z][a-z0-9.]*", name)
    assert not any(re.fullmatch(r"[TE]\d+", word) for word in name.split("."))
    for text in (f"v1-{name}.T32-bf16", f"v1-{name}.T32-bf16-tp8", f"v1-{name}.T1.E2-fp32-res-outlier-s3"):
        if ".E2" not in text or models()[name].spec.num_experts > 2:
            assert format_case(parse_case(text)) == text


def small(spec: MoESpec) -> MoESpec:
    """The same mathematics, 8 wide: hidden 8, intermediate 4, four groups of two experts or eight experts."""
    assert spec.router is not None
    groups = {"num_groups": 4, "num_groups_kept": 2} if spec.router.num_groups > 1 else {}
    router = replace(spec.router, num_experts=8, top_k=min(2, spec.router.top_k),
                     num_zero_experts=min(2, spec.router.num_zero_experts), **groups)
    shared = spec.shared and replace(spec.shared, intermediate_size=4 * spec.shared.num_experts)
    return replace(spec, hidden_size=8, intermediate_size=4, router=router, shared=shared)


@pytest.mark.parametrize("name", list(models()))
def test_the_oracle_computes_every_model(name: str) -> None:
    """An entry whose options contradict each other must fail here, not in the case of a user."""
    spec = small(models()[name].spec)
    draw = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(spec)
    weights = MoEWeights(**{key: torch.randn(shape, generator=draw) for key, shape in shapes.items()})
    y_TH = moe(torch.randn(3, 8, generator=draw), weights, spec)
    assert y_TH.shape == (3, 8)
    assert y_TH.isfinite().all()
    assert y_TH.any(dim=-1).all()


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


def test_known_mathematics() -> None:
    """The parts that once stood in notes as not expressed."""
    assert models()["llama4.scout"].spec.weight_on == "input"
    assert models()["gptoss.20b"].spec.experts == MLP(bias=True, limit=7.0, sigmoid_scale=1.702, up_offset=1.0)
    assert models()["gptoss.20b"].spec.router.logit_bias
    assert models()["longcat.flash"].spec.router.num_choices == 512 + 256
    assert models()["ernie4.5.21b.a3b"].spec.router.epsilon_rule == "clamp"
    assert models()["deepseek.v2"].spec.router.group_fill == "zero"
    assert models()["jetmoe.8b"].spec.output_bias
    assert models()["hy4.preview"].spec.shared.mlp == MLP() != models()["hy4.preview"].spec.experts
    assert models()["gptoss.20b"].numerics == ReleasedNumerics(score="model", weight="model",
                                                               score_after_selection=True)


def test_an_unknown_name_lists_the_known_ones() -> None:
    """Wrong use, with the way out in the message."""
    with pytest.raises(UsageValueError, match=r"unknown model 'gpt2'; known: mixtral.8x7b, "):
        find_model("gpt2")


ENTRY = {"family": "mixtral", "title": "One", "source": "https://example.org", "hidden_size": 8,
         "intermediate_size": 4, "router": {"num_experts": 4, "top_k": 2}}


@pytest.mark.parametrize(("change", "words"), [
    ({"hiden_size": 8}, "unknown field `hiden_size`"),
    ({"router": {"num_experts": 4, "top_k": 2, "capacity": {"tokens": 4, "prioriti": "token"}}}, "`prioriti`"),
    ({"shared": {"intermediate_size": 4, "mlp": {"limt": 7.0}}}, "unknown field `limt`"),
    ({"router": {"num_experts": 4, "top_k": "2"}}, r"Expected `int`, got `str` - at `\$.router.top_k`"),
    ({"router": {"num_experts": 4, "top_k": 5}}, "top_k=5, but should be at most num_experts=4"),
    ({"family": "mixtrl"}, "unknown family 'mixtrl'; known: mixtral, "),
    ({"routing": "injected"}, "a reason should stand beside an injected routing"),
    ({"reason": "why not"}, "a reason should stand beside an injected routing"),
])
def test_a_wrong_entry_is_refused(change: dict[str, object], words: str) -> None:
    """A misspelt option would otherwise be a model with another layer; the entry is named."""
    assert _model("one", ENTRY).spec == MoESpec(**(asdict(models()["mixtral.8x7b"].spec) | {
        "hidden_size": 8, "intermediate_size": 4, "router": _model("one", ENTRY).spec.router, "experts": MLP()}))
    with pytest.raises(UsageValueError, match=f"registry: one: .*{words}"):
        _model("one", ENTRY | change)


def test_numerics_are_read_as_strictly() -> None:
    """A misspelt rounding point would silently be the default."""
    with pytest.raises(UsageValueError, match="registry: family x: Object contains unknown field `logit`"):
        read("family x", {"logit": "fp32"}, ReleasedNumerics)


def test_fewer_experts_keep_every_other_option() -> None:
    """A cut case must fail on the same mistakes as the whole layer."""
    for name, model in models().items():
        spec, router = model.spec, model.spec.router
        cut = cut_experts(spec, 2)
        assert replace(cut, router=router) == spec, name
        kept = {key: value for key, value in asdict(cut.router).items() if not key.startswith("group_")}
        changed = {key for key, value in kept.items() if value != asdict(router)[key]}
        assert changed <= {"num_experts", "top_k", "num_zero_experts", "num_groups", "num_groups_kept"}, name
        assert cut_experts(spec, spec.num_experts) == spec


def test_identity_experts_are_cut_in_proportion() -> None:
    """With all 256 beside four experts nearly every choice would fall on them."""
    router = cut_experts(models()["longcat.flash"].spec, 8).router
    assert (router.num_experts, router.num_zero_experts, router.top_k) == (8, 4, 8)
    assert cut_experts(models()["longcat.flash"].spec, 1).router.num_zero_experts == 1


def test_more_experts_than_there_are() -> None:
    """Wrong use, with both numbers."""
    with pytest.raises(UsageValueError, match="experts cut to 9, but the layer has 8"):
        cut_experts(models()["mixtral.8x7b"].spec, 9)


# Spec key -> what a configuration class of transformers may call it; the first name that it has counts.
NAMES = {
    "hidden_size": ("hidden_size", "d_model"),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "router.num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "router.top_k": ("num_experts_per_tok",),
    "router.num_groups": ("n_group",),
    "router.num_groups_kept": ("topk_group",),
    "router.renormalize": ("norm_topk_prob",),
    "router.renormalize_epsilon": ("moe_norm_min",),
    "router.scaling_factor": ("routed_scaling_factor", "route_scale", "router_scaling_factor",
                              "moe_router_scaling_factor", "moe_routed_scaling_factor"),
    "router.logit_softcap": ("moe_router_logit_softcapping",),
    "router.num_zero_experts": ("zero_expert_num",),
    "experts.activation": ("hidden_act", "activation_function"),
    "experts.limit": ("swiglu_limit",),
    "experts.sigmoid_scale": ("swiglu_alpha",),
    "experts.gate_softcap": ("mlp_gate_softcap",),
    "experts.up_softcap": ("mlp_up_softcap",),
}
SHARED_WIDTHS = ("shared_expert_intermediate_size", "share_expert_dim", "shared_intermediate_size")
SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def first(config: object, names: tuple[str, ...]) -> object:
    """The first of the attributes that is there, or None."""
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def expected(config: object) -> dict[str, object]:
    """What the defaults say, by spec key; keys that the class does not have are left out."""
    values = {key: first(config, names) for key, names in NAMES.items() if any(hasattr(config, n) for n in names)}
    for key in ("router.num_groups", "router.num_groups_kept"):  # None: no groups
        values[key] = values.get(key) or 1
    if values["router.num_groups"] == 1:
        values["router.num_groups_kept"] = 1
    count = first(config, SHARED_COUNTS) or 0
    each = getattr(config, "shared_experts_intermediate_size", values["intermediate_size"])
    values["shared.intermediate_size"] = first(config, SHARED_WIDTHS) or count * each or None
    return values


def differences(model: Model) -> set[str]:
    """Spec keys of `model` that are not the defaults that its source names."""
    module, name = re.fullmatch(rf"{DEFAULTS_OF}(\w+)/\S+ (\w+), defaults", model.source).groups()
    assert module == model.family.name
    config = getattr(importlib.import_module(f"transformers.models.{module}.configuration_{module}"), name)()
    spec = asdict(model.spec)
    flat = {key: value for key, value in spec.items() if not isinstance(value, dict)}
    flat |= {f"{outer}.{key}": value for outer in ("router", "experts", "shared")
             for key, value in (spec[outer] or {"intermediate_size": None}).items()}
    return {key for key, value in expected(config).items() if flat[key] != value}


def test_defaults_are_those_of_the_installed_classes() -> None:
    """The numbers of an entry, and the list of those that are not the source's, against the source itself."""
    if reason := os.environ.get("MOE_REF_WITHOUT_TRANSFORMERS"):
        pytest.skip(f"MOE_REF_WITHOUT_TRANSFORMERS: {reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the import of a large library, none of them ours
        import transformers
        if (version := transformers.__version__) != "5.23.0":
            pytest.skip(f"the registry names the defaults of transformers 5.23.0, installed is {version}")
        compared = {name: model for name, model in models().items() if model.source.startswith(DEFAULTS_OF)}
        assert len(compared) > 40
        assert {name: differences(model) for name, model in compared.items()} == {
            name: set(model.beside_source) for name, model in compared.items()}


def test_shares_of_a_width_that_does_not_divide() -> None:
    """tp 8 over 1408 = 11 * 128 columns: every rank holds 176, the parameters show it."""
    shapes = parameter_shapes(models()["qwen1.5.moe.a2.7b"].spec, Parallel(tp=8), 7)
    assert shapes["w13_EGIH"] == (60, 2, 176, 2048)
    assert shapes["shared_w2_HI"] == (2048, 704)
