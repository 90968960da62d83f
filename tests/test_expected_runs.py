"""Runs with an expectations file: exit codes, records, reports, and the same under pytest."""

import json
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from moe_ref.cli import verify_commands
from moe_ref.contract.case_id import parse_case
from moe_ref.expectations.load import load_expectations
from moe_ref.records.schema import EndLine, ExpectationsLine, KnownFailureLine, RunLine
from moe_ref.records.store import read_run
from moe_ref.report import shards
from moe_ref.report.head import exit_code, stale
from moe_ref.report.junit import junit
from moe_ref.tiers.tiers import PlannedCase, Tier
from tests.command_line import command
from tests.made_records import PLAIN, TP2, idle, make_run, passing

ROOT = Path(__file__).parents[1]
WRONG, RIGHT = "tests.subjects.wrong:gate_up_swapped", "tests.subjects.right:split_k"
SEEN = "v1-T9.H64.I48.E4.K2-fp32-norm-tp2"
FAR = "2999-12-31"


def expecting(folder: Path, implementation: str, *others: str, expires: str = FAR) -> str:
    """The path of a file with an entry for act of the case, and one of each other pattern."""
    path = folder / "expectations.yaml"
    entries = [f"  - {{cases: '{cases}', stage: act, reason: gate and up are swapped, link: 12, expires: {expires}}}\n"
               for cases in ("v1-T9.*", *others)]
    path.write_text(f"schema: 1\nimplementation: {implementation}\nentries:\n" + "".join(entries))
    return str(path)


@pytest.fixture
def one_case_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tier smoke is one case, which seconds are enough for."""
    whole = Tier("smoke", (PlannedCase(case=parse_case(SEEN), purpose="test"),), 1, 1, 1)
    monkeypatch.setattr(verify_commands, "tier", lambda name: whole)


def test_a_known_failure_ends_with_0_and_is_on_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the entries as data and the digest of the file; the page shows link, last day and reason."""
    path, folder = expecting(tmp_path, WRONG), tmp_path / "run"
    assert command("verify", WRONG, "--case", SEEN, "--expect", path, "--record", str(folder)) == 0
    assert "1 known_failure; 1 of 1 executed" in capsys.readouterr().out
    header = read_run(folder).header
    assert header.expectations is not None
    assert header.expectations.digest == load_expectations(Path(path), WRONG).digest
    [listed] = header.expectations.entries
    assert (listed.cases, listed.verdict, listed.stage, listed.link, listed.expires, listed.owner) == (
        "v1-T9.*", "mismatch", "act", "12", FAR, "")
    assert command("report", str(folder), "--out", str(tmp_path / "page")) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"issue 12, mismatch at act expected until {FAR}: gate and up are swapped" in page
    document = json.loads((tmp_path / "page" / "report.json").read_text())
    assert (document["expectations"]["entries"][0]["reason"], document["stale"]) == ("gate and up are swapped", [])


def test_a_replay_takes_the_file_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the failure itself is shown."""
    assert command("replay", SEEN, "--impl", WRONG, "--expect", expecting(tmp_path, WRONG)) == 0
    assert "known_failure: issue 12" in capsys.readouterr().out
    assert command("replay", SEEN, "--impl", WRONG) == 1


def test_a_pass_that_was_to_fail_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", RIGHT, "--case", SEEN, "--expect", expecting(tmp_path, RIGHT)) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("unexpected_pass: issue 12, mismatch at act expected until")
    assert "no entry covers what fails" not in printed


def test_a_failure_without_an_entry_is_shown_with_one_to_paste(tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(expecting(tmp_path, WRONG))
    path.write_text(path.read_text().replace("stage: act", "stage: down"))
    assert command("verify", WRONG, "--case", SEEN, "--expect", str(path)) == 1
    printed = capsys.readouterr().out
    assert "no entry covers what fails; to expect it, say why, and where it is tracked:\n" in printed
    assert f'  - cases: "{SEEN}"\n    verdict: mismatch\n    stage: act\n    reason: "..."\n' in printed


@pytest.mark.parametrize("verb", [["verify", WRONG, "--case", SEEN], ["replay", SEEN, "--impl", WRONG]])
def test_an_expired_entry_ends_with_2(tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything runs."""
    path = expecting(tmp_path, WRONG, expires="2020-01-31")
    assert command(*verb, "--expect", path) == 2
    assert capsys.readouterr().err.startswith(f"moe-ref: {path}:4: entries[0]: v1-T9.* expired on 2020-01-31, and it")


def test_a_stale_entry_ends_a_whole_tier_with_1(tmp_path: Path, one_case_tier: None,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing failed that was not expected, and the run is red; so is its report."""
    folder = tmp_path / "run"
    path = expecting(tmp_path, WRONG, "v1-*-tp99*")
    assert command("verify", WRONG, "--expect", path, "--record", str(folder)) == 1
    sentence = "stale: entry 2 (cases v1-*-tp99*) covers no case that ran; remove it, or mend its cases"
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == sentence
    assert "FAIL" in printed
    end = read_run(folder).end
    assert end is not None
    assert (end.exit_code, end.stale, end.verdicts) == (1, [sentence], {"known_failure": 1})
    assert command("report", str(folder), "--out", str(tmp_path / "page")) == 1
    head = capsys.readouterr().out
    assert "1 stale in the expectations" in head
    assert f"first nothing failed, but the expectations are {sentence}" in head


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("part", [["--case", SEEN], ["--tp", "2"], ["--shard", "1/2"]])
def test_a_part_of_a_tier_calls_nothing_stale(part: list[str], tmp_path: Path, one_case_tier: None) -> None:
    """The entry may cover what was left out."""
    assert command("verify", WRONG, *part, "--expect", expecting(tmp_path, WRONG, "v1-*-tp99*")) == 0


def test_a_run_goes_on_under_the_same_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A verdict that an entry has made is on record already."""
    arguments = ["verify", WRONG, "--case", SEEN, "--record", str(tmp_path / "run"), "--resume"]
    path = expecting(tmp_path, WRONG)
    assert command(*arguments, "--expect", path) == 0
    assert command(*arguments, "--expect", path) == 0
    for others in (["--expect", expecting(tmp_path, WRONG, "v1-*-tp99*")], []):
        assert command(*arguments, *others) == 2
        assert "expectations of the recorded run differ from this one; cannot resume" in capsys.readouterr().err


def test_a_record_from_before_expectations_is_read() -> None:
    """The fields are new in schema 2 and have defaults."""
    old = (b'{"type":"run","schema":2,"run":"r","started":"","implementation":{"name":"a","version":"1"},"tier":"",'
           b'"cases":[],"minimum_executed":0,"axis_pairs":[0,0],"environment":{},"tolerances_digest":"",'
           b'"oracle_version":""}')
    end = b'{"type":"end","schema":2,"run":"r","finished":"","seconds":1,"verdicts":{},"executed":0,"exit_code":0}'
    assert msgspec.json.decode(old, type=RunLine).expectations is None
    assert msgspec.json.decode(end, type=EndLine).stale == []


def test_shards_are_looked_at_when_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them can call an entry stale, all of a tier together can; junit.xml has a test of it."""
    whole = Tier("smoke", tuple(PlannedCase(case=parse_case(text), purpose="test") for text in (PLAIN, TP2)), 1, 1, 1)
    monkeypatch.setattr(shards, "tier", lambda name: whole)
    listed = [KnownFailureLine(cases=cases, verdict="mismatch", stage="act", contains="", reason="known", link="1",
                               expires=FAR, owner="") for cases in (TP2, "v1-*-tp99*")]
    runs = [make_run(passing(PLAIN)), make_run(idle(TP2, "known_failure", "issue 1"))]
    given = ExpectationsLine(digest="77", entries=listed)
    for name, run in zip("ab", runs, strict=True):
        run.header = msgspec.structs.replace(run.header, run=name, expectations=given)
    merged = shards.merge_runs(runs)
    assert stale(merged) == [
        "stale: entry 2 (cases v1-*-tp99*) covers no case that ran; remove it, or mend its cases"]
    assert merged.header.expectations == given
    assert exit_code(merged) == 1
    document = ElementTree.fromstring("".join(junit(merged)))
    [failure] = document.iter("failure")
    assert failure.get("message") == "1 stale in the expectations"
    assert stale(shards.merge_runs([runs[1], runs[1]])) == [], "a part of the tier says nothing"


# --- under pytest ---------------------------------------------------------------------------------


@pytest.fixture
def adopter(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A repository of somebody else with the one test that the documentation shows; tier smoke is two cases."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("CI", raising=False)
    pytester.makepyfile(test_matrix="def test_matrix(moe_case, moe_verify):\n    moe_verify(moe_case)\n")
    pytester.makeconftest(f"""
                from dataclasses import replace
        from moe_ref.contract.case_id import parse_case
        from moe_ref.tiers import tiers
        cases = [tiers.PlannedCase(case=parse_case(text), purpose="test")
                 for text in ("{SEEN}", "{SEEN.replace("tp2", "tp3")}")]
        small = replace(tiers.tier("smoke"), cases=tuple(cases))
        tiers.tier = lambda name: small
    """)
    return pytester


def test_a_known_failure_is_an_xfail(adopter: pytest.Pytester) -> None:
    """With its reason; of named cases nothing is stale."""
    path = expecting(adopter.path, WRONG, "v1-*-tp99*")
    result = adopter.runpytest_subprocess("-rx", "--moe-impl", WRONG, "--moe-case", SEEN, "--moe-expect", path)
    result.assert_outcomes(xfailed=1)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["moe-ref verdicts: 1 known_failure", "XFAIL *issue 12, mismatch at act expected*"])
    result.stdout.no_fnmatch_line("moe-ref stale*")


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "workers"])
def test_a_stale_entry_fails_the_session(adopter: pytest.Pytester, workers: list[str]) -> None:
    """Also where no worker has seen all cases."""
    path = expecting(adopter.path, WRONG, "v1-*-tp99*")
    result = adopter.runpytest_subprocess("--moe-impl", WRONG, "--moe-expect", path, *workers)
    result.assert_outcomes(xfailed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["moe-ref stale: entry 2 (cases v1-?-tp99?) covers no case that ran; remove it, or*"])


@pytest.mark.nightly("the command line says the same by default")
def test_a_session_of_a_part_calls_nothing_stale(adopter: pytest.Pytester) -> None:
    """The entry may cover what was deselected; a pass that was to fail is a failure."""
    path = expecting(adopter.path, RIGHT, "v1-*-tp99*")
    result = adopter.runpytest_subprocess("--moe-impl", RIGHT, "--moe-expect", path, "-k", "tp3")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["E *moe_ref.Mismatch: unexpected_pass: issue 12*"])
    result.stdout.no_fnmatch_line("moe-ref stale*")


def test_an_expired_entry_is_wrong_use(adopter: pytest.Pytester) -> None:
    """A sentence before anything is collected."""
    path = expecting(adopter.path, WRONG, expires="2020-01-31")
    result = adopter.runpytest_subprocess("--moe-impl", WRONG, "--moe-expect", path)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    printed = result.stdout.str() + result.stderr.str()
    assert f"{path}:4: entries[0]: v1-T9.* expired on 2020-01-31" in printed
    assert "Traceback" not in printed
