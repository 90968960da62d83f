"""jax.lax.ragged_dot as an implementation; skipped, with the reason, where jax is not installed."""

from pathlib import Path

from tests.adapter_mistakes import require
from tests.adapter_runs import LAYER, verdicts

require("jax.ragged_dot")

CASES = (f"{LAYER}-bf16-norm-tp2-bwd", f"{LAYER}-fp16-norm", f"{LAYER}-fp32-norm-zipf-nonfinite",
         f"{LAYER}-fp32-norm-holes-exact", "v1-T0.H128.I256.E8.K2-bf16-norm")


def test_cases(tmp_path: Path) -> None:
    assert verdicts("jax.ragged_dot", tmp_path, *CASES) == dict.fromkeys(CASES, "pass")


def test_a_planted_mistake_is_seen(tmp_path: Path) -> None:
    [verdict] = verdicts("tests.subjects.swapped:jax_ragged_dot", tmp_path, CASES[0]).values()
    assert verdict.startswith("mismatch: act")
