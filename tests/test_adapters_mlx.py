"""mlx.core.gather_mm as an implementation; skipped, with the reason, where mlx is not installed."""

from pathlib import Path

from tests.adapter_mistakes import require
from tests.adapter_runs import LAYER, verdicts

require("mlx.gather_mm")

CASES = (f"{LAYER}-fp32-norm-tp2-bwd", f"{LAYER}-fp32-norm-zipf-nonfinite", f"{LAYER}-fp32-norm-holes-exact",
         "v1-T0.H128.I256.E8.K2-fp32-norm")


def test_cases(tmp_path: Path) -> None:
    assert verdicts("mlx.gather_mm", tmp_path, *CASES) == dict.fromkeys(CASES, "pass")


def test_a_planted_mistake_is_seen(tmp_path: Path) -> None:
    [verdict] = verdicts("tests.subjects.swapped:mlx_gather_mm", tmp_path, CASES[0]).values()
    assert verdict.startswith("mismatch: act")
