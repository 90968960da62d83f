"""Defects planted in the router of a copy of moe_fast, one per option: the case of each option reports its own.

All of them are in one copy, since no case needs two of the options; each names the first stage that goes wrong.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import moe_fast
from tests.command_line import command


class Defect(NamedTuple):
    """One replaced piece of one file, the case that needs it right, and the first stage that then goes wrong."""

    file: str
    right: str
    wrong: str
    case: str
    stage: str


FORWARD = {
    "logit bias left out": Defect(
        "kernels/product.py", "    if HAS_BIAS:", "    if HAS_BIAS and BLOCK_M < 0:",
        "v1-T21.H48.I40.E8.K3-bf16-norm-routerbias", "logits"),
    "the last part of H left out": Defect(
        "kernels/select.py", "tl.static_range(1, PARTS)", "tl.static_range(1, PARTS - 1)",
        "v1-T21.H96.I40.E8.K3-bf16-norm", "logits"),
    "other logits kept than selected by": Defect(
        "kernels/route.py", "tl.store(logits_at, logit, ", "tl.store(logits_at, logit + (hidden_size == 56), ",
        "v1-T40.H56.I40.E8.K3-bf16-norm", "logits"),
    "logits not scaled": Defect(
        "kernels/scores.py", "result = logit * logit_scale", "result = logit",
        "v1-T21.H48.I40.E8.K3-fp32-norm-logitscale0.5", "weights"),
    "half the argument of the cap": Defect(
        "kernels/scores.py", "tl.sigmoid(2.0 * (result / logit_softcap))", "tl.sigmoid(result / logit_softcap)",
        "v1-T21.H48.I40.E8.K3-bf16-sigmoid-norm-bias-scale2.5-logitcap1.5-sh26", "ids"),
    "no root of softplus": Defect(
        "kernels/scores.py", "tl.sqrt(softplus(value))", "softplus(value)",
        "v1-T21.H48.I40.E8.K3-fp32-sqrtsoftplus", "weights"),
    "groups filled with minus infinity": Defect(
        "kernels/select.py", "selection = tl.where(kept, selection, 0.0)", "candidates = kept",
        "v1-T21.H48.I40.E8.K4-fp32-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-fillzero-sh26-zipf", "ids"),
    "bias on the score": Defect(
        "kernels/select.py", "selection = value + bias[None, :]", "selection = score + bias[None, :]",
        "v1-T21.H48.I40.E8.K3-bf16-sigmoid-norm-biaslogit", "ids"),
    "epsilon added": Defect(
        "kernels/weigh.py", "tl.where(total < epsilon, epsilon, total)", "total + epsilon",
        "v1-T21.H48.I40.E8.K3-fp32-norm-eps0.5-epsclamp", "weights"),
    "scale of another expert": Defect(
        "kernels/select.py", "weight_scale + chosen * stride_scale_E", "weight_scale + (chosen ^ 1) * stride_scale_E",
        "v1-T21.H48.I40.E8.K3-bf16-norm-expertscale-gelutanh", "weights"),
    "scale of the layer left out": Defect(
        "kernels/select.py", "scale * learned[:, None]", "scale * (1.0 if stride_scale_E == 0 else learned[:, None])",
        "v1-T21.H48.I40.E8.K3-fp32-sigmoid-norm-learnscale", "weights"),
    "choices served by token": Defect(
        "kernels/drop.py", "earlier = (choice < k) | ((choice == k) & earlier)", "earlier = (choice >= 0) & earlier",
        "v1-T21.H48.I40.E8.K3-fp32-sigmoid-bias-scale2.5-cap4-capchoice-zipf", "ids"),
    "smaller weights first": Defect(
        "kernels/drop.py", "(other_rank > rank[:, None])", "(other_rank < rank[:, None])",
        "v1-T21.H48.I40.E8.K2-fp32-norm-cap4-capweight", "ids"),
    "divided by what was dropped": Defect(
        "kernels/drop.py", "    if RENORMALIZE:", "    if RENORMALIZE and TOP_K > 3:",
        "v1-T21.H48.I40.E8.K3-fp32-sigmoid-norm-cap5-capafter", "weights"),
    "a last, shorter sequence with the limit of others": Defect(
        "kernels/drop.py", "num_tokens, last_limit, limit)", "num_tokens, limit, limit)",
        "v1-T21.H48.I40.E8.K2-fp32-norm-capfactor0.75-capseq8", "ids"),
    "identity experts that return nothing": Defect(
        "slot_rows.py", "(tokens.ids_TK < spec.num_choices)", "(tokens.ids_TK < spec.num_experts)",
        "v1-T21.H48.I40.E8.K3-fp32-bias-scale6-zero4", "down"),
    "shared columns left out of the sum": Defect(
        "kernels/weigh.py", "must be 0.\"\"\"\n    total = tl.sum(score, axis=1)\n    if HAS_SHARED:",
        "must be 0.\"\"\"\n    total = tl.sum(score, axis=1)\n    if HAS_SHARED and CLAMP:",
        "v1-T21.H48.I40.E8.K3-bf16-sigmoid-norm-bias-sh26-shrouter2", "weights"),
    "shared experts with one weight": Defect(
        "slot_rows.py", "return [(block, cut) for block, cut in cuts", "return [(0, cut) for block, cut in cuts",
        "v1-T21.H48.I40.E8.K3-fp32-sigmoid-sh26-shrouter2", "shared"),
}
BACKWARD = {
    "no slope of the cap": Defect(
        "kernels/select_gradient.py", "slope * score_gradient(grad, score, value, SCORE)",
        "score_gradient(grad, score, value, SCORE)", "v1-T12.H40.I36.E6.K3-fp32-norm-logitscale0.5-logitcap1.5-tp2-bwd",
        "grad_router"),
    "divided below a clamp": Defect(
        "kernels/weigh.py", "tl.where(total < epsilon, 0.0, result)", "result + 0.0",
        "v1-T12.H40.I36.E6.K3-fp32-sigmoid-norm-eps1.5-epsclamp-tp2-bwd", "grad_router"),
    "sums of scales not divided": Defect(
        "kernels/select_gradient.py", "by_expert = grad * chosen_score / divisor[:, None]",
        "by_expert = grad * chosen_score",
        "v1-T12.H40.I36.E6.K3-fp32-norm-scale2.5-sqrtsoftplus-expertscale-tp2-bwd", "grad_weight_scale"),
    "half a gradient behind a drop": Defect(
        "kernels/drop_gradient.py", "tl.store(grad_scores + own, grad, mask=in_slots)",
        "tl.store(grad_scores + own, grad * 0.5, mask=in_slots)",
        "v1-T12.H40.I36.E6.K3-fp32-sigmoid-norm-cap2-capchoice-tp2-bwd", "grad_router"),
}


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("planted", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_every_option_is_judged(planted: dict[str, Defect], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "moe_broken"
    shutil.copytree(Path(moe_fast.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for source in copy.rglob("*.py"):
        source.write_text(re.sub(r"\bmoe_fast\b(?=\.)", "moe_broken", source.read_text()))
    for name, defect in planted.items():
        text = (copy / defect.file).read_text()
        assert text.count(defect.right) == 1, f"{name}: the piece to break is not there once"
        (copy / defect.file).write_text(text.replace(defect.right, defect.wrong))
    monkeypatch.syspath_prepend(tmp_path)
    assert command("verify", "moe_broken", "--json", "--lanes", "1",
                   *(word for defect in planted.values() for word in ("--case", defect.case))) == 1
    lines = json.loads(capsys.readouterr().out)["cases"]
    found = {line["case"]: (line["verdict"], line["first_stage"]) for line in lines}
    assert {name: found[defect.case] for name, defect in planted.items()} == {
        name: ("mismatch", defect.stage) for name, defect in planted.items()}
