"""Blocks of transformers as implementations: cases of the tier conformance, and mistakes of the adapter's that show.

The whole tier is run by `moe-ref verify transformers.eager --tier conformance`; docs/adapters.md says what is red.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if reason := os.environ.get("MOE_REF_WITHOUT_TRANSFORMERS"):
    pytest.skip(f"MOE_REF_WITHOUT_TRANSFORMERS: {reason}", allow_module_level=True)

from moe_ref.adapters.transformers_blocks import layer, parameters
from moe_ref.adapters.transformers_blocks.blocks import build, served_family
from moe_ref.adapters.transformers_blocks.families import FAMILIES
from moe_ref.adapters.transformers_blocks.family import Family
from moe_ref.adapters.transformers_blocks.subjects import BATCHED_MM, EAGER, GROUPED_MM
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage, Verdict
from moe_ref.contract.weights import MoEWeights, parameter_shapes
from moe_ref.tiers.conformance import FAMILIES as LAYERS
from tests.command_line import command
from tests.in_process import judged
from tests.subjects import transformers_own

SIZES = "v1-T33.H128.I256.E8"
CASES = {one.name: f"v1-{one.sizes}-bf16{f'-{one.words}' if one.words else ''}" for one in LAYERS}
BACKENDS = {"eager": EAGER, "grouped_mm": GROUPED_MM, "batched_mm": BATCHED_MM}


@pytest.mark.parametrize("name", CASES)
def test_every_layer_of_the_tier_has_a_block(name: str) -> None:
    """And its parameters are all that the block has: none is left without a value."""
    spec = parse_case(CASES[name]).problem.spec
    family = served_family(spec)
    assert family.module == {"gelu_tanh": "mixtral", "gpt_oss limit 1": "gpt_oss"}.get(name, name)
    block = build(spec, spec.intermediate_size, spec.shared.intermediate_size if spec.shared else 1, "eager")
    weights = MoEWeights(**{field: torch.empty(shape) for field, shape in parameter_shapes(spec).items()})
    held = parameters.parameters_of(weights, family)
    assert {key: tensor.shape for key, tensor in held.items()} == {
        key: tensor.shape for key, tensor in block.state_dict().items()}


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_case_of_every_family(name: str, backend: str) -> None:
    """Two virtual ranks in bf16; Llama 4 has one way to compute its experts."""
    line = judged(BACKENDS[backend], CASES[name] + "-tp2")
    expected = Verdict.UNSUPPORTED if name == "llama4" and backend != "eager" else Verdict.PASS
    assert (line.verdict, line.reason if expected is Verdict.PASS else "") == (expected, "")


@pytest.mark.sampled(every=3, each="words")
@pytest.mark.parametrize("words", ["K2-fp32-norm-holes-exact", "K2-bf16-norm-exact-tp2", "K2-bf16-norm-zipf-nonfinite",
                                   "K2-bf16-norm-zipf", "K4-fp32-norm-routerbias-mlpbias-limit7-alpha1.702-up1-zipf",
                                   "K3-bf16-sigmoid-norm-eps1em20-bias-scale2.5-relu2-nogate-sh256-shrelu2-shnogate-bwd",
                                   "K4-fp32-norm-routerbias-mlpbias-limit7-alpha1.702-up1-large-tp2-bwd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_injected_and_backward(words: str, backend: str) -> None:
    """Slots without an expert, exact sums, NaN in rows, logits in place of the router's, with and without its bias."""
    line = judged(BACKENDS[backend], f"{SIZES}.{words}")
    assert (line.verdict, line.reason) == (Verdict.PASS, "")


def test_each_block_is_held_to_its_own_roundings() -> None:
    """DeepSeek's router is in fp32, Qwen's in the model's dtype: one contract for both would allow too much."""
    declared = {name: EAGER.CAPABILITIES.serving(parse_case(case), Ranks.LOCAL, "cpu").numerics[Dtype.BF16].storage
                for name, case in CASES.items()}
    kept = {name: (storage[Stage.LOGITS], storage[Stage.WEIGHTS]) for name, storage in declared.items()}
    bf16, fp32 = Format.BF16, Format.FP32
    assert kept == {"mixtral": (bf16, fp32), "gelu_tanh": (bf16, fp32), "olmoe": (bf16, bf16),
                    "qwen2_moe": (bf16, bf16), "gpt_oss": (bf16, bf16),
                    "gpt_oss limit 1": (bf16, bf16), "llama4": (bf16, bf16),
                    "deepseek_v2": (fp32, fp32), "deepseek_v3": (fp32, fp32), "nemotron_h": (fp32, fp32)}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gate_and_up_the_wrong_way_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter's own likeliest mistake, in both layouts."""
    for layout, right in parameters._EXPERTS.items():
        monkeypatch.setitem(parameters._EXPERTS, layout, lambda weights, right=right: right(_swapped(weights)))
    assert judged(EAGER, CASES[name]).verdict is Verdict.MISMATCH


def _swapped(weights: MoEWeights) -> MoEWeights:
    return replace(weights, w13_EGIH=weights.w13_EGIH.flip(1))


def test_a_bias_that_every_rank_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias of w2 is in a partial sum of one rank alone; in bf16 it is lost beside values of this size."""
    case = CASES["gpt_oss"].replace("bf16", "fp32") + "-tp2"
    assert judged(EAGER, case).verdict is Verdict.PASS
    monkeypatch.setattr(layer, "once", lambda tensor, here: tensor)
    assert judged(EAGER, case).verdict is Verdict.MISMATCH


def test_a_router_below_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of DeepSeek-V3 that passed through bf16 on their way: far less than the output would show."""
    right = layer.given_routing

    def rounded(logits_TE: Any, *others: Any) -> Any:
        logits_TE, weights_TK, ids_TK = right(logits_TE, *others)
        return logits_TE, weights_TK.to(torch.bfloat16).float(), ids_TK

    case = CASES["deepseek_v3"] + "-zipf"
    assert judged(EAGER, case).verdict is Verdict.PASS
    monkeypatch.setattr(layer, "given_routing", rounded)
    line = judged(EAGER, case)
    assert line.verdict is Verdict.MISMATCH
    assert line.reason.startswith("weights")


def test_what_no_block_computes_is_refused() -> None:
    """A softmax router with a scale and no groups is declared by none, and a call of the layer says so too."""
    spec = MoESpec(hidden_size=16, intermediate_size=16, router=Router(num_experts=4, top_k=2, scaling_factor=3.0))
    with pytest.raises(UsageValueError, match="no block that is known here computes"):
        served_family(spec)


def test_declarations_say_what_they_need() -> None:
    """Mixtral always renormalises, DeepSeek-V2 never."""
    families: dict[str, Family] = {family.module: family for family in FAMILIES}
    spec = parse_case(f"{SIZES}.K2-bf16").problem.spec
    refused = families["mixtral"].capabilities("one", "1", "eager").refused_mathematics(spec)
    assert refused == ["a layer without renormalised weights"]


def test_moe_fast_as_the_experts_of_a_block() -> None:
    """What is registered for whole models, with the block's router and roundings before it."""
    for case in (CASES["mixtral"], CASES["gpt_oss"] + "-tp2", f"{SIZES}.K2-fp32-norm-holes-exact"):
        line = judged(transformers_own.FAST, case)
        assert (line.verdict, line.reason) == (Verdict.PASS, "")


def _verified(subject: str, folder: Path, *cases: str) -> dict[str, tuple[str, str]]:
    """Verdict and reason of cases on gloo ranks."""
    command("verify", subject, "--ranks", "gloo", "--lanes", "1", "--record", str(folder),
            *(word for case in cases for word in ("--case", case)))
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return {line["case"]: (line["verdict"], line["reason"]) for line in lines if "verdict" in line}


def test_the_tensor_parallel_plan(tmp_path: Path) -> None:
    """transformers' own sharding and collectives, forward and backward, and what they cannot do.

    Llama4TextMoe adds in place to what a rowwise layer returns, a view of a DTensor, which autograd refuses: delete
    here and in docs/adapters.md when transformers no longer does.
    """
    passing = [CASES["mixtral"] + "-tp2", CASES["deepseek_v3"] + "-tp2-bwd", f"{SIZES}.K2-fp32-norm-holes-exact-tp2"]
    llama4 = CASES["llama4"] + "-tp2-bwd"
    found = _verified("transformers.tp_plan", tmp_path, *passing, llama4)
    verdict, reason = found.pop(llama4)
    assert found == dict.fromkeys(passing, ("pass", ""))
    assert verdict == "crash"
    assert "is a view and is being modified inplace" in reason


@pytest.mark.nightly("the tensor-parallel plan runs by default")
def test_the_expert_parallel_plan(tmp_path: Path) -> None:
    """An all-reduce forward; where gradients are recorded rows travel to their experts. No tier has ep cases for it."""
    cases = [CASES["gpt_oss"] + "-ep2", CASES["olmoe"] + "-ep2-bwd"]
    assert _verified("transformers.ep_plan", tmp_path, *cases) == dict.fromkeys(cases, ("pass", ""))


@pytest.mark.nightly("the tensor-parallel plan runs by default")
def test_a_plan_that_cuts_through_gate_and_up(tmp_path: Path) -> None:
    """One word of a plan; shapes are the same."""
    found = _verified("tests.subjects.transformers_own:CUT_THROUGH", tmp_path, CASES["mixtral"] + "-tp2")
    assert [verdict for verdict, _ in found.values()] == ["mismatch"]
