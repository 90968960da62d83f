"""torchtitan's MoE as an implementation; skipped, with the reason, where torchtitan is not installed."""

import warnings
from pathlib import Path

import torch

from tests.adapter_mistakes import require
from tests.adapter_runs import LAYER, verdicts

require("torchtitan.moe")

CASES = (f"{LAYER}-bf16-norm-tp2-bwd", f"{LAYER}-bf16-norm-zipf", f"{LAYER}-bf16-norm-exact",
         "v1-T33.H128.I256.E8.K4-bf16-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-sh256-tp2",
         "v1-T33.H128.I256.E8.K4-bf16-sh256-shgate-bwd",
         "v1-T33.H128.I256.E8.K4-bf16-norm-routerbias-mlpbias-limit1-alpha1.702-up1-tp2-bwd")


def test_families(tmp_path: Path) -> None:
    """Softmax and sigmoid routers, shared experts, gpt-oss; the limit of 1 is passed often enough to see the clamp."""
    assert verdicts("torchtitan.moe", tmp_path, *CASES) == dict.fromkeys(CASES, "pass")


def test_what_is_not_served(tmp_path: Path) -> None:
    """Its experts are bf16 whatever the tokens are; ids outside [0, E) are an error of scatter_ in MoE.forward."""
    fp32, holes = f"{LAYER}-fp32-norm", f"{LAYER}-bf16-norm-holes-exact"
    found = verdicts("torchtitan.moe", tmp_path, fp32, holes)
    assert found[fp32] == "unsupported: not declared: dtype fp32"
    assert found[holes] == "unsupported: not declared: ids that name no expert"


def test_a_planted_mistake_is_seen(tmp_path: Path) -> None:
    """Of both kinds of experts, whose matrices are laid out differently."""
    found = verdicts("tests.subjects.swapped:torchtitan_moe", tmp_path, CASES[1], CASES[5]).values()
    assert [verdict.partition(" ")[0] for verdict in found] == ["mismatch:"] * 2


def test_autocast_of_a_cpu_leaves_the_router_in_bf16() -> None:
    """TokenChoiceTopKRouter means its logits to be fp32; when a CPU casts them too, the adapter's cast can go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast(device_type="cpu", dtype=torch.float32):
            logits = torch.nn.functional.linear(torch.ones(2, 4).bfloat16(), torch.ones(3, 4).bfloat16())
    assert logits.dtype == torch.bfloat16
