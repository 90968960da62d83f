"""Wrong use ends with one line that holds the numbers and exit code 2: no traceback, on every rank, no hang."""

import subprocess
import sys
from itertools import chain

import pytest

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Ranks
from moe_ref.records.schema import CaseLine
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.verify.run.run import EXIT_USAGE, Plan, run_plan, usage_errors
from tests.command_line import command
from tests.wrong_use import TOKENS

CASE = "v1-T9.H64.I48.E4.K2-fp32-norm-tp2"

MISTAKES = {
    "k_mismatch": "K mismatch: w13_EGIH makes an activation shard of 24 columns, but the w2_EHI shard takes 23",
    "ids_out_of_range": "ids_TK: values from 4 to 7, but should be in [0, 4)",
    "wrong_world_size": "world size: the tp group has 1 ranks, but parallel.tp is 2",
    "fp64_input": "x_TH: dtype torch.float64, but should be one of torch.float32, torch.float16, torch.bfloat16",
}


@pytest.fixture(scope="module")
def reported() -> dict[str, list[CaseLine]]:
    """What one run says of every mistake, on virtual and on gloo ranks."""
    # A seed, which these mistakes do not depend on, makes two cases of one.
    cases = {name: [PlannedCase(case=parse_case(CASE.replace("T9", f"T{tokens}").replace("-tp2", f"-s{seed}-tp2")),
                                purpose="wrong use", ranks=ranks)
                    for seed, ranks in enumerate((Ranks.LOCAL, Ranks.GLOO), 1)] for name, tokens in TOKENS.items()}
    result = run_plan(Plan(implementation="tests.wrong_use:by_tokens", cases=[*chain(*cases.values())], tier="",
                           minimum_executed=1, lanes=1, time_limit=60.0))
    assert result.end.exit_code == EXIT_USAGE
    lines = {line.case: line for line in result.lines}
    return {name: [lines[one.case_id] for one in both] for name, both in cases.items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_rank_reports_the_numbers(reported: dict[str, list[CaseLine]], mistake: str) -> None:
    """On virtual and on gloo ranks alike, all ranks raise the same error before anything is communicated."""
    assert [line.ranks for line in reported[mistake]] == [Ranks.LOCAL, Ranks.GLOO]
    for one in reported[mistake]:
        [line] = usage_errors([one])
        assert MISTAKES[mistake] in line
        assert line.endswith("[on all 2 ranks]")


COMMANDS = {
    "unknown implementation": (["verify", "nosuch"], "unknown implementation 'nosuch'"),
    "unknown attribute": (["verify", "moe_fast:nosuch"], "unknown implementation 'moe_fast:nosuch'"),
    "a file named as an attribute": (["verify", "tests.subjects:whole"], "did you mean tests.subjects.whole?"),
    "not an implementation": (["verify", "json"], "implementation 'json' lacks moe and CAPABILITIES"),
    "capabilities of another type": (["verify", "tests.subjects.misbehaving:without_numerics"], "lacks CAPABILITIES"),
    "malformed case id": (["replay", "v1-T9.H64", "--impl", "moe_fast"], "case id 'v1-T9.H64'"),
    "malformed case id in a list": (["verify", "moe_fast", "--case", CASE, "--case", "v1-T5-bf16"], "case id 'v1-T5"),
    "misspelt word": (["show", "v1-T9.H64.I48-fp32-gleu"], "unknown word 'gleu'"),
    "unknown model": (["show", "v1-mixtral.9x9b.T4-bf16"], "unknown model 'mixtral.9x9b'"),
    "a model misspelt": (["show", "gpt.oss.20b"], "the nearest being gptoss.20b"),
    "impossible sizes": (["show", "v1-T9.H64.I48.E4.K5-fp32"], "top_k=5, but should be at most num_experts=4"),
    "unknown tier": (["verify", "moe_fast", "--tier", "nosuch"], "'nosuch' is not one of"),
    "no such tp in the tier": (["verify", "moe_fast", "--tp", "5"], "tier smoke has no case with tp 5"),
    "tp that is no number": (["verify", "moe_fast", "--tp", "two"], "should be numbers with commas"),
    "shard beyond the count": (["verify", "moe_fast", "--shard", "3/2"], "should be from 1 to the second"),
    "shard without a slash": (["verify", "moe_fast", "--shard", "3"], "'3', but should be as 2/3"),
    "tier and case": (["verify", "moe_fast", "--tier", "smoke", "--case", CASE], "exclude each other"),
    "a wrong call, on two ranks": (["verify", "tests.wrong_use:by_tokens", "--case", CASE], "K mismatch"),
}


IN_A_SHELL = ("a wrong call, on two ranks", "misspelt word")
"""Where ranks say what is wrong, and where nothing is started; the others need no process of their own."""


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in IN_A_SHELL])
def test_command_line(capfd: pytest.CaptureFixture[str], name: str) -> None:
    """Nothing but that line is printed, so no traceback either."""
    arguments, text = COMMANDS[name]
    assert command(*arguments) == EXIT_USAGE
    captured = capfd.readouterr()
    [line] = captured.err.splitlines()
    assert line.startswith("moe-ref: ")
    assert text in line
    assert captured.out == ""


@pytest.mark.parametrize("name", IN_A_SHELL)
def test_command_line_of_a_shell(name: str) -> None:
    """As a user meets it; beside that line there may be progress."""
    arguments, text = COMMANDS[name]
    done = subprocess.run([sys.executable, "-m", "moe_ref", *arguments], capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == EXIT_USAGE, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len([line for line in done.stderr.splitlines() if line.startswith("moe-ref: ")]) == 1
    assert done.stdout == ""
