"""torchao's MXFP8 product as an implementation; skipped, with the reason, where torchao is not installed."""

from pathlib import Path

from tests.adapter_mistakes import require
from tests.adapter_runs import LAYER, verdicts

require("torchao.mxfp8")

CASES = (f"{LAYER}-bf16-norm-tp2", f"{LAYER}-bf16-norm-outlier", "v1-T0.H128.I256.E8.K2-bf16-norm")


def test_cases(tmp_path: Path) -> None:
    """Judged by the products of rounded operands: as closely as a product in bf16."""
    assert verdicts("torchao.mxfp8", tmp_path, *CASES) == dict.fromkeys(CASES, "pass")


def test_a_planted_mistake_is_seen(tmp_path: Path) -> None:
    [verdict] = verdicts("tests.subjects.swapped:torchao_mxfp8", tmp_path, CASES[0]).values()
    assert verdict.startswith("mismatch: act")
