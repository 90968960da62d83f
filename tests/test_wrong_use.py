"""Wrong use ends with one line that holds the numbers and exit code 2: no traceback, on every rank, no hang."""

import subprocess
import sys

import pytest

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Ranks
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.verify.run.run import EXIT_USAGE, Plan, run_plan, usage_errors

CASE = "v1-T9.H64.I48.E4.K2-fp32-norm-tp2"

MISTAKES = {
    "k_mismatch": "K mismatch: w13_EGIH makes an activation shard of 24 columns, but the w2_EHI shard takes 23",
    "ids_out_of_range": "ids_TK: values from 4 to 7, but should be in [0, 4)",
    "wrong_world_size": "world size: the tp group has 1 ranks, but parallel.tp is 2",
    "fp64_input": "x_TH: dtype torch.float64, but should be one of torch.float32, torch.float16, torch.bfloat16",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_rank_reports_the_numbers(mistake: str) -> None:
    """On virtual and on gloo ranks alike, all ranks raise the same error before anything is communicated."""
    for ranks in (Ranks.LOCAL, Ranks.GLOO):
        planned = PlannedCase(case=parse_case(CASE), purpose="wrong use", ranks=ranks)
        result = run_plan(Plan(implementation=f"tests.wrong_use:{mistake}", cases=[planned], tier="",
                               minimum_executed=1, lanes=1, time_limit=60.0))
        assert result.end.exit_code == EXIT_USAGE, result.lines[0].message
        [line] = usage_errors(result.lines)
        assert MISTAKES[mistake] in line
        assert line.endswith("[on all 2 ranks]")


COMMANDS = {
    "unknown implementation": (["verify", "nosuch"], "unknown implementation 'nosuch'"),
    "unknown attribute": (["verify", "moe_fast:nosuch"], "unknown implementation 'moe_fast:nosuch'"),
    "a file named as an attribute": (["verify", "tests.subjects:whole"], "did you mean tests.subjects.whole?"),
    "not an implementation": (["verify", "json"], "implementation 'json' lacks moe and CAPABILITIES"),
    "malformed case id": (["replay", "v1-T9.H64", "--impl", "moe_fast"], "case id 'v1-T9.H64'"),
    "misspelt word": (["show", "v1-T9.H64.I48-fp32-gleu"], "unknown word 'gleu'"),
    "unknown model": (["show", "v1-mixtral.9x9b.T4-bf16"], "unknown model 'mixtral.9x9b'"),
    "a model misspelt": (["show", "gpt.oss.20b"], "the nearest being gptoss.20b"),
    "impossible sizes": (["show", "v1-T9.H64.I48.E4.K5-fp32"], "top_k=5, but should be at most num_experts=4"),
    "unknown tier": (["verify", "moe_fast", "--tier", "nosuch"], "'nosuch' is not one of"),
    "no such tp in the tier": (["verify", "moe_fast", "--tp", "5"], "tier smoke has no case with tp 5"),
    "tp that is no number": (["verify", "moe_fast", "--tp", "two"], "should be numbers with commas"),
    "shard beyond the count": (["verify", "moe_fast", "--shard", "3/2"], "should be from 1 to the second"),
    "tier and case": (["verify", "moe_fast", "--tier", "smoke", "--case", CASE], "exclude each other"),
    "a wrong call, on two ranks": (["verify", "tests.wrong_use:k_mismatch", "--case", CASE], "K mismatch"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_line(name: str) -> None:
    arguments, text = COMMANDS[name]
    done = subprocess.run([sys.executable, "-m", "moe_ref", *arguments], capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == EXIT_USAGE, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len([line for line in done.stderr.splitlines() if line.startswith("moe-ref: ")]) == 1
    assert done.stdout == ""
