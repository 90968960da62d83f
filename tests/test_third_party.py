"""The oracle against transformers' mixture-of-experts blocks; docs/third_party.md has the table and the findings.

Without transformers this file fails. A run that is meant to do without says why in MOE_REF_WITHOUT_TRANSFORMERS,
and pytest counts the skip with that reason.
"""

import os
import re
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

if reason := os.environ.get("MOE_REF_WITHOUT_TRANSFORMERS"):
    pytest.skip(f"MOE_REF_WITHOUT_TRANSFORMERS: {reason}", allow_module_level=True)

import transformers

from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP, MoESpec
from moe_ref.contract.vocabulary import Format
from moe_ref.contract.weights import MoEWeights
from moe_ref.oracle.released import moe_as_released
from moe_ref.verify.bounds.released import released_bound
from tests.third_party import mistakes, rounding
from tests.third_party.blocks import build, run
from tests.third_party.compare import MODEL
from tests.third_party.data import tokens
from tests.third_party.evaluate import evaluate, ran
from tests.third_party.families import FAMILIES
from tests.third_party.families.outside import NOT_COVERED
from tests.third_party.family import TOKENS, H, I
from tests.third_party.gradients import compare_gradients

MODELS = Path(transformers.__file__).parent / "models"



def test_version() -> None:
    """Adapters, declared rounding points and everything found are those of one release."""
    assert version("transformers") == "5.23.0"


def test_every_architecture_is_compared_or_named() -> None:
    """A family that the release has and nobody looked at would be counted as covered by silence."""
    defines = re.compile(r"^class \w*(Experts|SparseMoe\w*|MoE)\(", re.MULTILINE)
    found = {path.parent.name for path in MODELS.glob("*/modeling_*.py") if defines.search(path.read_text())}
    compared = {family.module for family in FAMILIES.values()}
    assert found - compared - NOT_COVERED.keys() == set()
    assert len(compared) >= 40


def test_the_document_names_every_block() -> None:
    """The table in docs/third_party.md is printed by hand; a block without a row would go unnoticed."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "third_party.md").read_text()
    assert [title for title in FAMILIES if f"| {title} |" not in text] == []
    assert [module for module in NOT_COVERED if f"| {module} |" not in text] == []


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("title", FAMILIES)
def test_family(title: str) -> None:
    """Choice, weights, experts, gradients in fp32 against fp64, and bf16 against fp64, each within its bound."""
    result = evaluate(title)
    assert result.refusals() == []
    for choice in (result.forward.choice, result.rounded.choice):
        # What is judged on tokens with the same experts says little if there are few of them.
        assert choice is None or int(choice.flipped_T.sum()) < TOKENS / 2
    reached = [name for name in result.gradients.silent
               if result.family.unread is None or not name.startswith(result.family.unread)]
    assert reached == [], "no gradient arrives"
    # Tokens and router, and both matrices of the experts where they are compared.
    assert result.gradients.number >= (2 if result.family.fit == "router" else 4)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("title", FAMILIES)
def test_default_experts(title: str) -> None:
    """from_pretrained gives a model grouped_mm, not the eager loop: in bf16 it adds up wider, so it has rounding
    points of its own, and eager's explain it no better."""
    result = evaluate(title, "grouped_mm")
    assert result.refusals() == []
    _, weights, x_TH, called = ran(title, torch.bfloat16, "grouped_mm")
    eager = rounding.agreement(x_TH, called, weights, FAMILIES[title])
    assert result.rounded.equal is None or eager.output <= result.rounded.equal


@cache
def points(title: str) -> tuple[rounding.Agreement, list[tuple[str, rounding.Agreement]]]:
    """Bit agreement of the block with its declared rounding points, and with each of them changed."""
    _, weights, x_TH, called = ran(title, torch.bfloat16)
    family = FAMILIES[title]
    return (rounding.agreement(x_TH, called, weights, family),
            list(rounding.alternatives(x_TH, called, weights, family)))


@pytest.mark.parametrize("title", FAMILIES)
def test_rounding_points(title: str) -> None:
    """No single change of a declared rounding point reproduces more of the block's bits: the declaration explains
    the block best, without a threshold that somebody chose."""
    declared, others = points(title)
    assert [field for field, other in others if not rounding.declared_is_best(field, declared, other)] == []


def test_every_rounding_point_is_visible() -> None:
    """The comparison above says something of a field only if some family tells its two values apart."""
    titles = ("mixtral", "qwen3_moe", "deepseek_v3", "mistral4", "beam")
    visible = {field for title in titles for declared, others in [points(title)] for field, other in others
               if rounding.is_visible(field, declared, other)}
    assert visible == rounding.ROUTING.keys() | rounding.EXPERTS.keys()


@pytest.mark.parametrize("mistake", mistakes.MISTAKES, ids=lambda mistake: f"{mistake.family}: {mistake.title}")
def test_mistake_is_seen(mistake: mistakes.Mistake) -> None:
    """Agreement means something only if the data would have shown the mistake; fp32 decides the mathematics."""
    _, weights, x_TH, called = ran(mistake.family, torch.float32)
    assert mistakes.seen(mistakes.compare_mistaken(mistake, x_TH, called, weights))


@pytest.mark.parametrize(("title", "changed"), [
    ("mixtral", mistakes.in_router(renormalize=False)), ("mixtral", mistakes.in_experts(activation="gelu_tanh")),
    ("lfm2_moe", mistakes.in_router(renormalize_epsilon=0.0)), ("gpt_oss", mistakes.in_experts(limit=None)),
    ("laguna", mistakes.in_router(logit_softcap=0.0)), ("llama4", mistakes.of_layer(weight_on="output")),
    ("inkling2", mistakes.in_experts(up_softcap=0.0)), ("cohere2_moe", mistakes.in_shared(merge="sum"))])
def test_mistake_is_seen_in_gradients(title: str, changed: mistakes.Change) -> None:
    """What is allowed of a gradient is coarser than a bound per element, but far below a wrong derivative."""
    block, weights, _, _ = ran(title, torch.float32)
    family = FAMILIES[title]
    found = compare_gradients(block, replace(family, spec=changed(family.spec, weights)[0]), tokens())
    assert found.worst > found.allowed


@pytest.mark.parametrize("title", ["mixtral", "gpt_oss", "deepseek_v4", "nemotron_h", "longcat_flash"])
def test_weight_on_the_activation(title: str) -> None:
    """No block of transformers weights its routed experts there, so the mimic meets the bound alone."""
    _, weights, x_TH, called = ran(title, torch.bfloat16)
    family, released = FAMILIES[title], replace(FAMILIES[title].released, weight_at="act")
    got_TH = moe_as_released(x_TH, weights, family.spec, released, routing=called.routing)
    want_TH, bound_TH = released_bound(x_TH, called.routing, weights, family.spec, released, Format.BF16, MODEL)
    assert bool(((got_TH.double() - want_TH).abs() <= bound_TH).all())


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, Format.FP32), (torch.float16, Format.FP16)])
@pytest.mark.parametrize("title", ["gpt_oss", "inkling", "llama4"])
def test_other_formats(title: str, dtype: torch.dtype, stored: Format) -> None:
    """The blocks run in bf16; that the mimic rounds to the dtype of the tokens is shown by the bound of each."""
    family, (_, weights, x_TH, called) = FAMILIES[title], ran(title, torch.float32)
    x_TH, weights = x_TH.to(dtype), replace(weights, **{
        name: tensor.detach().to(dtype) for name, tensor in weights.named_tensors()})
    got_TH = moe_as_released(x_TH, weights, family.spec, family.released, routing=called.routing)
    want_TH, bound_TH = released_bound(x_TH, called.routing, weights, family.spec, family.released, stored, MODEL)
    assert got_TH.dtype == dtype
    assert bool(((got_TH.double() - want_TH).abs() <= bound_TH).all())


def test_dense_layer_as_released() -> None:
    """Without a router the only routing is expert 0 with weight 1."""
    generator = torch.Generator().manual_seed(3)
    spec = MoESpec(hidden_size=H, intermediate_size=I, experts=MLP(activation="gelu"))
    weights = MoEWeights(w13_EGIH=(torch.randn(1, 2, I, H, generator=generator) / 8).bfloat16(),
                         w2_EHI=(torch.randn(1, H, I, generator=generator) / 6).bfloat16())
    x_TH = torch.randn(5, H, generator=generator).bfloat16()
    routing = Routing(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
    want_TH, bound_TH = released_bound(x_TH, routing, weights, spec, ReleasedNumerics(), Format.BF16, MODEL)
    got_TH = moe_as_released(x_TH, weights, spec, ReleasedNumerics())
    assert bool(((got_TH.double() - want_TH).abs() <= bound_TH).all())


def test_wrong_use_of_the_mimic() -> None:
    """It rounds to the dtype of the tokens, so fp64 tokens have nothing to round to; fields are checked."""
    _, weights, x_TH, _ = ran("mixtral", torch.float32)
    with pytest.raises(UsageTypeError, match=r"dtype torch\.float64, but"):
        moe_as_released(x_TH.double(), weights, FAMILIES["mixtral"].spec, ReleasedNumerics())
    with pytest.raises(UsageValueError, match="logits='bf16', but should be one of model, fp32; merge='fp64'"):
        ReleasedNumerics(logits="bf16", merge="fp64")  # type: ignore[arg-type]


# What was found in the release; each stands in docs/third_party.md and fails here when it changes.


def test_nllb_runs_two_experts() -> None:
    """Its block loops over the hits of a mask that it has turned around, so only experts 0 and 1 ever run."""
    from transformers.models.nllb_moe import modeling_nllb_moe as nllb
    config = transformers.NllbMoeConfig(d_model=32, num_experts=8, expert_capacity=64, moe_token_dropout=0.0)
    with torch.no_grad():
        block = nllb.NllbMoeSparseMLP(config, 16).eval()
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        ran_experts: set[str] = set()
        for name, expert in block.experts.items():
            expert.register_forward_hook(lambda module, inputs, output, name=name: ran_experts.add(name))
        x_BSH = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(100))
        block(x_BSH)
        chosen_TE = block.router(x_BSH.view(-1, 32))[1] > 0
    assert int(chosen_TE.any(0).sum()) > 2
    assert ran_experts == {"expert_0", "expert_1"}


def test_deepseek_v2_ignores_norm_topk_prob() -> None:
    """The option is in its configuration; the router does not read it."""
    family = FAMILIES["deepseek_v2"]
    outputs = [run(build(replace(family, options=family.options | {"norm_topk_prob": value}), torch.float32),
                   family, tokens()).output_TH for value in (False, True)]
    assert torch.equal(*outputs)


def test_hy_v3_fp32_combine_changes_nothing() -> None:
    """A sum of two bf16 tensors is computed in fp32 and rounded once with or without the option."""
    family = FAMILIES["hy_v3"]
    outputs = [run(build(replace(family, options=family.options | {"enable_moe_fp32_combine": value}),
                         torch.bfloat16), family, tokens().bfloat16()).output_TH for value in (False, True)]
    assert torch.equal(*outputs)


def test_selection_biases_that_loading_rounds() -> None:
    """Their classes do not ask from_pretrained to keep the bias in fp32, so that a bf16 load rounds it."""
    rounded = {title for title, family in FAMILIES.items() if "selection_bias_E" in (held := family.read(
        ran(title, torch.bfloat16)[0])) and held["selection_bias_E"].dtype == torch.bfloat16}
    assert rounded == {"afmoe", "kimi_linear", "laguna", "longcat_flash", "minimax_m2", "minimax_m3_vl", "step3p7"}


@pytest.mark.parametrize(("name", "kept"), [("MiniMaxM2", False), ("DeepseekV3", True), ("Lfm2Moe", True)])
def test_loading_in_bf16(name: str, kept: bool, tmp_path: Path) -> None:
    """What `blocks.cast` does to a block is what from_pretrained does to a model."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16,
             "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
             "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
             "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 8, "q_lora_rank": 8,
             "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_experts": 8, "num_dense_layers": 0}
    wanted = {key: size for key, size in sizes.items() if name == "DeepseekV3" or "rank" not in key}
    kinds = {"layer_types": ["full_attention"]} if name == "Lfm2Moe" else {}
    model_class = getattr(transformers, f"{name}ForCausalLM")
    model_class(getattr(transformers, f"{name}Config")(**wanted, **kinds)).save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {value.dtype for key, value in model.state_dict().items()
              if key.endswith(("e_score_correction_bias", "expert_bias"))}
    assert dtypes == {torch.float32 if kept else torch.bfloat16}


def test_laguna_is_marked_for_a_softmax_kernel() -> None:
    """Its router is a sigmoid with a selection bias, but asks the kernel hub for "SoftmaxTopKRouter"."""
    source = (MODELS / "laguna" / "modeling_laguna.py").read_text()
    assert '@use_kernel_forward_from_hub("SoftmaxTopKRouter")\nclass LagunaTopKRouter(' in source
    assert FAMILIES["laguna"].spec.router.score == "sigmoid"


def test_longcat_holds_matrices_that_nothing_reads() -> None:
    """Identity experts have rows in gate_up_proj, none in down_proj."""
    block = ran("longcat_flash", torch.float32)[0]
    spec = FAMILIES["longcat_flash"].spec
    assert (len(block.experts.gate_up_proj), len(block.experts.down_proj)) == (spec.num_choices, spec.num_experts)
