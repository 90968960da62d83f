"""The plugin as an adopter meets it: one test per case under the case's id, the message on failure, a record."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASE = "v1-T9.H64.I48.E4.K2-fp32-norm-tp2"


@pytest.fixture
def adopter(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A repository of somebody else with the one test that the documentation shows."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("CI", raising=False)
    pytester.makepyfile(test_matrix="def test_matrix(moe_case, moe_verify):\n    moe_verify(moe_case)\n")
    return pytester


def test_a_passing_case_leaves_a_record(adopter: pytest.Pytester) -> None:
    result = adopter.runpytest_subprocess("-v", "--moe-impl", "moe_fast", "--moe-case", CASE, "--moe-record", "record")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*test_matrix.py::test_matrix?{CASE}?*PASSED*", "moe-ref verdicts: 1 pass"])
    assert (adopter.path / "record" / "records.jsonl").read_text().count("\n") == 3


def test_a_failing_case_shows_verdict_and_replay(adopter: pytest.Pytester) -> None:
    result = adopter.runpytest_subprocess("--moe-impl", "tests.subjects.wrong:gate_up_swapped", "--moe-case", CASE)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *moe_ref.Mismatch: mismatch: act*", "E *replay  moe-ref replay *"])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_workers_share_the_cases(adopter: pytest.Pytester) -> None:
    """Under xdist every worker has a child and a record folder of its own."""
    result = adopter.runpytest_subprocess("-n", "2", "--moe-impl", "moe_ref", "--moe-case", CASE, "--moe-case",
                                          CASE.replace("tp2", "tp3"), "--moe-record", "record")
    result.assert_outcomes(passed=2)
    assert len(list((adopter.path / "record").glob("gw*/records.jsonl"))) >= 1


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("arguments", "words"), [
    (["--moe-tier", "nosuch"], "unknown tier 'nosuch'"),
    (["--moe-case", "v1-T9"], "case id 'v1-T9'"),
    (["--moe-impl", "nosuch", "--moe-case", CASE], "unknown implementation 'nosuch'"),
])
def test_wrong_use_is_one_line(adopter: pytest.Pytester, arguments: list[str], words: str) -> None:
    result = adopter.runpytest_subprocess(*arguments)
    assert result.ret != pytest.ExitCode.OK
    assert words in result.stdout.str() + result.stderr.str()
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_loading_the_plugin_loads_no_torch(adopter: pytest.Pytester) -> None:
    """`pytest --help` in a repository that has moe-ref installed must not take seconds longer."""
    adopter.makepyfile(test_matrix="import sys\n\ndef test_light():\n    assert 'torch' not in sys.modules\n")
    adopter.runpytest_subprocess().assert_outcomes(passed=1)
