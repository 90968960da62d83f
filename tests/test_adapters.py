"""Protects the list of adapters: nothing of a library is imported to read it, and what is missing is said in words."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from moe_ref.adapters.catalogue import ADAPTERS, TORCH, Adapter, find
from moe_ref.adapters.experts_layer import ExpertsCall, ExpertsLayer
from moe_ref.adapters.library import Library, release
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.features import Feature
from moe_ref.contract.vocabulary import Direction, Dtype, Format, Ranks, Stage, Verdict
from moe_ref.inputs.build import build_inputs
from moe_ref.verify.run.subjects import known_names, load_subject, source_digest
from tests.in_process import judged

ABSENT = Library(distribution="no-such-distribution", module="no_such_module", least="1", below="2")


def test_the_list_imports_nothing() -> None:
    """Optional dependencies never leak: `moe-ref adapters list`, the tier and the table start without torch."""
    script = ("import sys\n"
              "import moe_ref.adapters.catalogue, moe_ref.tiers.conformance, moe_ref.report.conformance_page\n"
              "from moe_ref.adapters.catalogue import ADAPTERS\n[one.lacking() for one in ADAPTERS]\n"
              "named = {library.module for one in ADAPTERS for library in one.libraries}\n"
              "print(sorted(named & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_names_and_targets() -> None:
    """A name is what a record holds and a folder is called, and belongs to one adapter, whose module is there."""
    names = [one.name for one in ADAPTERS]
    assert len(set(names)) == len(names)
    assert set(names) <= set(known_names())
    for one in ADAPTERS:
        module, _, attribute = one.target.partition(":")
        path = Path(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
        assert attribute.isidentifier()
        assert one.name.replace(".", "_").isidentifier()
        assert one.libraries
        assert set(one.devices) <= {"cpu", "cuda"}


@pytest.mark.parametrize(("text", "numbers"), [("2.11.0+cu130", (2, 11)), ("0.8.5", (0, 8, 5)), ("2.11rc1", (2, 11)),
                                               ("5.23.0.dev0", (5, 23)), ("10", (10,))])
def test_releases(text: str, numbers: tuple[int, ...]) -> None:
    """Versions compare as numbers: 2.9 is before 2.11."""
    assert release(text) == numbers


def test_what_is_missing_is_said() -> None:
    """Of an absent library and of one outside of its range: what is there, and what should be."""
    assert ABSENT.lacking() == "no-such-distribution is not installed; should be no-such-distribution>=1,<2"
    old = replace(TORCH, least="99", below="100")
    assert old.lacking() == f"torch {torch.__version__} is installed, but should be torch>=99,<100"
    assert TORCH.lacking() is None


def test_an_adapter_without_its_library_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong use, with the words of the library; its module is not imported."""
    absent = Adapter(name="absent", target="no.such:module", libraries=(ABSENT,), what="", kernels="own", lineage="")
    monkeypatch.setattr("moe_ref.adapters.catalogue.ADAPTERS", (absent,))
    assert find("absent") is absent
    with pytest.raises(UsageValueError, match=r"implementation 'absent': no-such-distribution is not installed"):
        load_subject("absent")


def capabilities(**more: object) -> Capabilities:
    numerics = Numerics(storage={Stage.REDUCED: Format.FP32})
    return Capabilities(name="x", version="1", numerics={Dtype.FP32: numerics}, max_tp=4, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("case", "more", "reason"), [
    ("v1-T3.H48.I64.E4.K2-fp32-norm", {"hidden_multiple": 32}, "hidden size 48, no multiple of 32"),
    ("v1-T3.H64.I48.E4.K2-fp32-norm-tp2", {"intermediate_multiple": 16},
     "a rank's intermediate size 24, no multiple of 16"),
    ("v1-T3.H64.I48.E4.K2-fp32-norm-tp2-split1.0", {"intermediate_multiple": 16},
     "a rank's intermediate size 0, no multiple of 16"),
    ("v1-T3.H64.I48.E4.K2-fp32-norm-zipf", {"injected_logits": False}, "injected logits")])
def test_sizes_and_injected_logits_are_declared(case: str, more: dict[str, object], reason: str) -> None:
    """Block formats and aligned strides need sizes, and a whole block may not let its logits be replaced."""
    parsed = parse_case(case)
    assert capabilities().refusal(parsed, Ranks.LOCAL, "cpu") is None
    assert capabilities(**more).refusal(parsed, Ranks.LOCAL, "cpu") == f"not declared: {reason}"


def test_a_router_of_ones_own_needs_no_injected_logits() -> None:
    """Pattern uniform is x @ router^T, which any block computes by itself."""
    parsed = parse_case("v1-T3.H64.I48.E4.K2-fp32-norm")
    assert capabilities(injected_logits=False).refusal(parsed, Ranks.LOCAL, "cpu") is None


@pytest.mark.parametrize("case", ["v1-T9.H64.I32.E8.K3-fp32", "v1-T9.H64.I32.E8.K3-fp32-norm-routerbias",
                                  "v1-T9.H64.I32.E8.K3-fp32-sigmoid-norm-eps1em06-scale2.5-zipf"])
def test_the_routing_for_bare_experts_is_that_of_the_oracle(case: str) -> None:
    """Ids are equal; weights in fp32 are within a few units of the fp64 ones."""
    from moe_ref import route
    from moe_ref.adapters.routed import routed
    problem = parse_case(case).problem
    inputs = build_inputs(problem)
    found = routed(inputs.x_TH, inputs.weights, problem.spec, None, inputs.logits_TE)
    truth = route(inputs.x_TH, inputs.weights, problem.spec, logits_TE=inputs.logits_TE)
    assert torch.equal(found.ids_TK, truth.ids_TK)
    units_TK = (found.weights_TK.double() - truth.weights_TK).abs() / truth.weights_TK.abs() * 2 ** 24
    assert float(units_TK.max()) < 64


def test_an_unknown_score_is_refused() -> None:
    """Silence would be a wrong routing."""
    from moe_ref.adapters.routed import routed
    problem = parse_case("v1-T9.H64.I32.E8.K3-fp32-sqrtsoftplus").problem
    inputs = build_inputs(problem)
    with pytest.raises(UsageValueError, match="score sqrt_softplus"):
        routed(inputs.x_TH, inputs.weights, problem.spec, None, None)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("case", ["v1-T33.H128.I256.E8.K2-fp32-norm-holes-exact",
                                  "v1-T33.H128.I256.E8.K2-bf16-norm-bwd", "v1-T0.H128.I256.E8.K2-fp32-norm"])
def test_a_layer_around_a_function_of_experts(case: str) -> None:
    """Slots without an expert, no token at all, gradients: judged like any implementation."""
    assert judged(load_subject("torch.grouped_mm"), case).verdict == Verdict.PASS


def biased(call: ExpertsCall) -> torch.Tensor:
    """Experts with biases of w2, row by row, as libraries compute them that refuse a share without columns."""
    assert call.weights.w2_EHI.shape[2]
    assert call.weights.w2_bias_EH is not None
    assert call.weights.w13_bias_EGI is not None
    y_TH = torch.zeros_like(call.x_TH)
    for expert in range(call.spec.num_experts):
        token_R, slot_R = (call.ids_TK == expert).nonzero(as_tuple=True)
        gate_RI, up_RI = (call.x_TH[token_R] @ call.weights.w13_EGIH[expert, which].T
                          + call.weights.w13_bias_EGI[expert, which] for which in range(2))
        row_RH = (silu(gate_RI) * up_RI) @ call.weights.w2_EHI[expert].T + call.weights.w2_bias_EH[expert]
        y_TH = y_TH.index_add(0, token_R, call.weights_TK[token_R, slot_R, None] * row_RH)
    return y_TH


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("words", ["tp2-split1.0", "tp2-split0.1", "tp3-split0.1.1-bwd"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_rank_without_columns(words: str, bias: bool) -> None:
    """The function is not called there; the bias of w2 is the first rank's to add, whether it has columns or not."""
    right = load_subject("torch.grouped_mm")
    free = replace(right.CAPABILITIES, hidden_multiple=1, intermediate_multiple=1)
    shown = (Stage.IDS, Stage.WEIGHTS, Stage.MERGED)
    layer = replace(right, CAPABILITIES=free) if not bias else ExpertsLayer(
        replace(free, features=(*free.features, Feature.MLP_BIAS), stages=shown), biased)
    line = judged(layer, f"v1-T33.H96.I160.E8.K2-fp32-norm-{'mlpbias-' * bias}{words}")
    assert (line.verdict, line.reason) == (Verdict.PASS, "")


def test_a_record_names_the_sources_of_an_adapter() -> None:
    """Adapters share the class of their layer: its file alone would call all of them one implementation."""
    layer = load_subject("torch.grouped_mm")
    assert source_digest(layer) != source_digest(replace(layer, experts=biased))


def test_a_mistake_in_an_adapter_is_no_pass() -> None:
    """Up taken for gate: what an adapter does to weights is under the same judge."""
    right = load_subject("torch.grouped_mm")
    swapped = replace(right, experts=lambda call: right.experts(
        replace(call, weights=replace(call.weights, w13_EGIH=call.weights.w13_EGIH.flip(1)))))
    line = judged(swapped, "v1-T33.H128.I256.E8.K2-fp32-norm")
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.ACT)


def looped(call: ExpertsCall) -> torch.Tensor:
    """Experts in plain torch, with biases where there are any, slot by slot in the dtype of the tokens."""
    y_TH = torch.zeros_like(call.x_TH)
    for expert in range(call.spec.num_experts):
        w13_GIH, w2_HI, bias_GI, bias_H = call.weights.expert(expert)
        token_R, slot_R = (call.ids_TK == expert).nonzero(as_tuple=True)
        gate_RI, up_RI = (torch.nn.functional.linear(
            call.x_TH[token_R], w13_GIH[half], None if bias_GI is None else bias_GI[half]) for half in range(2))
        down_RH = torch.nn.functional.linear(torch.nn.functional.silu(gate_RI) * up_RI, w2_HI, bias_H)
        y_TH = y_TH.index_add(0, token_R, call.weights_TK[token_R, slot_R, None] * down_RH)
    return y_TH


def with_biases(weights_in: Format) -> ExpertsLayer:
    """`looped` as an implementation that shows its logits, with routing weights in a format."""
    stored = dict.fromkeys((Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), Format.BF16)
    numerics = Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: weights_in, **stored},
                        activation=Format.BF16, merge=Format.BF16, reduce=Format.BF16, weight_at="merge")
    return ExpertsLayer(Capabilities(
        name="looped", version="1", numerics={Dtype.BF16: numerics}, directions=tuple(Direction), max_tp=2,
        stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.MERGED), features=(Feature.MLP_BIAS,),
        injected_routing=True, collectives_through_groups=True), looped)


@pytest.mark.parametrize("case", ["v1-T9.H64.I32.E8.K2-bf16-norm-mlpbias-tp2-bwd",
                                  "v1-T9.H64.I32.E8.K2-bf16-norm-exact-tp2"])
def test_what_every_rank_holds_is_added_once(case: str) -> None:
    """The bias of w2 is in one rank's partial sum, its gradient complete on each; weights come in the declared format,
    and logits are shown where they are declared and not injected with the routing."""
    assert judged(with_biases(Format.BF16), case).verdict == Verdict.PASS
