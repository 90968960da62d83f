"""Protects assert_conforms: right functions pass with what ran on record, wrong ones fail with a message to act on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

import moe_ref
from moe_ref import MLP, Mismatch, MoESpec, Router, SharedExpert, UsageValueError, assert_conforms
from moe_ref.conforms.cases import PROBES
from moe_ref.records.store import read_run
from tests.subjects import right

SPEC = MoESpec(hidden_size=64, intermediate_size=96, router=Router(num_experts=8, top_k=2, renormalize=True))
FEW: dict[str, Any] = {"tokens": (1, 33), "probes": ("empty", "exact", "none")}
"""Enough where a test is about something else than coverage."""


def fused_experts(x_TH: torch.Tensor, w13_EFH: torch.Tensor, w2_EHI: torch.Tensor, weights_TK: torch.Tensor,
                  ids_TK: torch.Tensor, w13_bias_EF: torch.Tensor | None = None,
                  w2_bias_EH: torch.Tensor | None = None, activation: Any = silu) -> torch.Tensor:
    """As stored_rows: fp32 between, act and weighted rows in the dtype of x."""
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float32)
    for e in range(len(w13_EFH)):
        token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
        rows_RF = x_TH[token_R].float() @ w13_EFH[e].float().T
        gate_RI, up_RI = (rows_RF if w13_bias_EF is None else rows_RF + w13_bias_EF[e].float()).chunk(2, 1)
        down_RH = (activation(gate_RI) * up_RI).to(x_TH.dtype).float() @ w2_EHI[e].float().T
        down_RH = down_RH if w2_bias_EH is None else down_RH + w2_bias_EH[e].float()
        y_TH = y_TH.index_add(0, token_R, (down_RH * weights_TK[token_R, slot_R, None]).to(x_TH.dtype).float())
    return y_TH.to(x_TH.dtype)


def test_a_right_function(tmp_path: Path) -> None:
    """Two dtypes, two degrees, both directions; the record is one that every reader of records takes."""
    found = assert_conforms(fused_experts, SPEC, dtypes=("bf16", "fp32"), tp=(1, 2), directions=("fwd", "bwd"),
                            record=tmp_path, **FEW)
    run = read_run(tmp_path / "records.jsonl")
    assert found.executed == len(found.lines) == len(run.cases) == 2 * 2 * 2 * 2 + 2 * 3
    assert (found.skipped, found.left_out) == ({}, {})
    assert 0 < found.worst_ratio < 1
    assert found.worst_case in run.cases
    assert 7 < found.bits < 12, "an output in bf16 is the coarsest"
    assert "nothing ends a hang" in found.process
    assert {line.guard["process"] for line in run.cases.values()} == {found.process}
    assert run.header.implementation.name == f"{__name__}:fused_experts"
    assert found.setup is not None
    assert found.setup.num_passed == len(found.setup.steps)


def test_every_probe_is_passed() -> None:
    """Those beside the usual ones too: the loop skips ids that name no expert, and reads through strides."""
    assert assert_conforms(fused_experts, SPEC, tokens=(5,), probes=tuple(PROBES)).executed == 1 + len(PROBES)


def test_a_probe_that_a_layer_cannot_have_is_said() -> None:
    """Two experts, both chosen, leave none to be empty."""
    spec = MoESpec(hidden_size=64, intermediate_size=64, router=Router(num_experts=2, top_k=2))
    found = assert_conforms(fused_experts, spec, tokens=(5,), probes=("empty", "one"))
    assert list(found.left_out) == ["empty"]
    assert "two experts to spare" in found.left_out["empty"]


def test_of_a_router_the_choice_alone_is_asked() -> None:
    """DeepSeek's groups, selection bias and shared expert are none of a function of experts."""
    router = Router(num_experts=8, top_k=2, score="sigmoid", selection_bias="score", num_groups=4, num_groups_kept=2,
                    renormalize=True, scaling_factor=2.5)
    spec = MoESpec(hidden_size=64, intermediate_size=64, router=router, shared=SharedExpert(intermediate_size=64))
    found = assert_conforms(fused_experts, spec, **FEW)
    assert {line.case.split("-", 3)[3].split("-")[0] for line in found.lines} == {"sigmoid"}
    assert not any("sh64" in line.case or "g4.2" in line.case for line in found.lines)


def test_biases_come_by_keyword_and_once() -> None:
    """Each rank calls the function; w2's bias must not be in the sum of two ranks twice, nor its gradient halved."""
    spec = MoESpec(hidden_size=64, intermediate_size=96, router=SPEC.router, experts=MLP(bias=True))
    assert assert_conforms(fused_experts, spec, dtypes=("fp32",), tp=(1, 2), directions=("fwd", "bwd"), tokens=(9,),
                           probes=()).executed == 4


def test_a_whole_layer() -> None:
    """With the contract's signature: its own router, its own collectives."""
    layer = right.round_each_stage
    found = assert_conforms(layer.moe, SPEC, takes="layer", numerics=layer.CAPABILITIES.numerics[moe_ref.Dtype.FP32],
                            dtypes=("fp32",), tp=(1, 3), **FEW)
    assert found.executed == 2 * 2 + 3


def test_without_words_for_a_routing_probes_are_skips_with_a_reason() -> None:
    """A layer that takes no injected routing cannot have exact data; it is counted."""
    def moe(x_TH: Any, weights: Any, spec: Any, parallel: Any = None, groups: Any = None, *, logits_TE: Any = None,
            residual_TH: Any = None, trace: Any = None) -> torch.Tensor:
        return right.round_each_stage.moe(x_TH, weights, spec, parallel, groups, logits_TE=logits_TE)

    found = assert_conforms(moe, SPEC, takes="layer", dtypes=("fp32",), **FEW)
    assert found.skipped == {"unsupported: not declared: an injected routing": 1}


def test_a_wrong_mapping_is_named_before_anything_else() -> None:
    def swapped(x_TH: Any, w13_EFH: Any, *others: Any) -> torch.Tensor:
        return fused_experts(x_TH, w13_EFH.roll(w13_EFH.shape[1] // 2, 1), *others)

    with pytest.raises(Mismatch) as raised:
        assert_conforms(swapped, SPEC)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("setup 3 of 10 fails (gate and up): adapter: D01 gate and up exchanged")
    assert len(lines) <= 11
    assert lines[-1].startswith('  replay  assert_conforms(..., cases=["v1-T1.H')


def from_the_second_tile(x_TH: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Tokens past 128 get the row before: wrong in a kernel, and only beyond the set-up cases."""
    y_TH = fused_experts(x_TH, *others)
    return torch.cat([y_TH[:128], y_TH[127:-1]]) if len(y_TH) > 128 else y_TH


def test_failures_beyond_the_set_up() -> None:
    """The first in full, the others in a line each, and a case again by its id alone."""
    with pytest.raises(Mismatch, match="2 of 4 cases fail; beside the first:") as raised:
        assert_conforms(from_the_second_tile, SPEC, tokens=(1, 129, 257), probes=("zipf",))
    text = str(raised.value)
    assert text.startswith("mismatch: merged: ")
    assert text.splitlines()[-1].startswith("  v1-T257.H64.I96.E8.K2-bf16-norm: mismatch: merged: ")
    with pytest.raises(Mismatch) as again:
        assert_conforms(from_the_second_tile, SPEC, cases=["v1-T129.H64.I96.E8.K2-bf16-norm"])
    assert str(again.value) == "\n".join(text.splitlines()[:-2])
    assert assert_conforms(fused_experts, SPEC, cases=["v1-T1.H64.I32.E4.K1-bf16-norm-onehot"]).executed == 1


def test_other_numerics_than_declared() -> None:
    """Rows of bf16 added up in bf16 are wrong under stored_rows and right under a contract that says so."""
    def in_model(x_TH: torch.Tensor, w13_EFH: torch.Tensor, w2_EHI: torch.Tensor, weights_TK: torch.Tensor,
                 ids_TK: torch.Tensor) -> torch.Tensor:
        y_TH = torch.zeros_like(x_TH)
        for e in range(len(w13_EFH)):
            token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
            gate_RI, up_RI = (x_TH[token_R] @ w13_EFH[e].T).chunk(2, 1)
            rows_RH = (silu(gate_RI) * up_RI) @ w2_EHI[e].T * weights_TK[token_R, slot_R, None].to(x_TH.dtype)
            y_TH = y_TH.index_add(0, token_R, rows_RH)
        return y_TH

    with pytest.raises(Mismatch):
        assert_conforms(in_model, SPEC, **FEW)
    assert assert_conforms(in_model, SPEC, numerics="torch_loop", **FEW).executed == 5


def test_nothing_that_ran_is_no_pass() -> None:
    def moe(x_TH: Any, weights: Any, spec: Any, parallel: Any, groups: Any, *, trace: Any) -> torch.Tensor:
        return x_TH

    with pytest.raises(Mismatch, match="no case ran, which is no pass: 1 cases unsupported: not declared: an injected"):
        assert_conforms(moe, SPEC, takes="layer", cases=["v1-T9.H64.I96.E8.K2-bf16-norm-exact"])


@pytest.mark.parametrize(("options", "words"), [
    ({"takes": "module"}, "takes='module', but should be one of experts, layer"),
    ({"dtypes": ("fp8",)}, "dtypes holds 'fp8', but should be of fp32, fp16, bf16"),
    ({"dtypes": ()}, "dtypes is empty"),
    ({"tokens": (-1,)}, "tokens holds -1, but should hold integers of at least 0"),
    ({"tp": (0,)}, "tp holds 0"),
    ({"directions": ("both",)}, "directions holds 'both'"),
    ({"probes": ("everything",)}, "probes holds 'everything', but should be of zipf, empty"),
    ({"device": "tpu"}, "device holds 'tpu'"),
    ({"device": "cuda"}, "device cuda, but torch finds none"),
    ({"runs": 0}, "runs holds 0"),
    ({"numerics": "loose"}, "contract 'loose', but should be one of stored_rows"),
    ({"cases": ["v1-T9.H64"]}, "case id 'v1-T9.H64'"),
    ({"cases": ["v1-T9.H64.I96.E8.K2-bf16-norm-gelu"]}, "another layer than the spec"),
])
def test_wrong_use_raises_before_anything_runs(options: dict[str, Any], words: str) -> None:
    def never(*arguments: Any) -> torch.Tensor:
        raise AssertionError("called")

    with pytest.raises(UsageValueError) as raised:
        assert_conforms(never, SPEC, **options)
    assert words in str(raised.value)


@pytest.mark.parametrize(("spec", "words"), [
    ("mixtral", "spec='mixtral', but should be a MoESpec"),
    (MoESpec(hidden_size=64, intermediate_size=64), "without a router"),
    (MoESpec(hidden_size=64, intermediate_size=64, router=SPEC.router, weight_on="input"), "weight_on='input'"),
])
def test_layers_that_a_function_of_experts_is_not(spec: Any, words: str) -> None:
    with pytest.raises(UsageValueError) as raised:
        assert_conforms(fused_experts, spec)
    assert words in str(raised.value)


def test_other_activations() -> None:
    """A spec asks for what it says: the function that computes silu fails for it, the other passes."""
    spec = MoESpec(hidden_size=64, intermediate_size=96, router=SPEC.router, experts=MLP(activation="gelu"))
    with pytest.raises(Mismatch, match="adapter: D08 silu for the activation that was asked for"):
        assert_conforms(fused_experts, spec, **FEW)
    assert assert_conforms(lambda *call: fused_experts(*call, activation=gelu), spec, **FEW).executed == 5


def test_the_fixture(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line in a test of theirs: verdicts are counted, each call has a record, no traceback of ours is shown."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    pytester.makepyfile(test_kernel="""
        from tests.test_conforms import FEW, SPEC, from_the_second_tile, fused_experts

        def test_right(moe_conforms):
            moe_conforms(fused_experts, SPEC, **FEW)

        def test_wrong(moe_conforms):
            moe_conforms(from_the_second_tile, SPEC, tokens=(129,), probes=(), setup=False)
    """)
    result = pytester.runpytest_subprocess("--moe-device", "cpu", "--moe-record", "record")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["E *moe_ref.Mismatch: mismatch: merged*", "moe-ref verdicts: 5 pass"])
    result.stdout.no_fnmatch_line("*assertion.py*")
    names = sorted(one.parent.name for one in pytester.path.glob("record/*/records.jsonl"))
    assert names == ["test-kernel-py-test-right-1", "test-kernel-py-test-wrong-1"]
