"""Baselines are accepted on purpose: changes are said in words, the file is small, gaps do not become the norm."""

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from moe_ref.cli.report_commands import accept_command
from moe_ref.contract.errors import UsageValueError
from moe_ref.records.store import Run
from moe_ref.report.accept import accept_run
from moe_ref.report.baseline import BASELINE_FOLDER, baseline_of, baseline_path
from moe_ref.report.baseline_file import format_baseline, read_baseline
from tests.made_records import PLAIN, SUBJECT, TP2, TP4, failing, idle, make_run, passing, write

COMMITTED = sorted((Path(__file__).parents[1] / BASELINE_FOLDER).glob("moe_*.json"))


def accept(run: Run, path: Path) -> tuple[tuple[str, ...], list[str]]:
    """Accept; what was said, and the changed lines of the file."""
    accepted = accept_run(run, path)
    accepted.write()
    return accepted.words, [row for row in accepted.diff.splitlines()[2:] if row[0] in "+-"]


def judged_with(run: Run, **numbers: float) -> Run:
    """The run under other tolerances; `__` stands for the dots of a path."""
    tolerances = {path.replace("__", "."): number for path, number in numbers.items()}
    run.header = msgspec.structs.replace(run.header, tolerances=tolerances)
    return run


def test_a_file_holds_one_case_per_line_and_survives_a_round_trip(tmp_path: Path) -> None:
    """Cases that did not run are left out: nothing is judged by them."""
    run = judged_with(make_run(passing(TP2, act=0.123456), failing(PLAIN, "inf"), idle(TP4, "not_run", "no GPU")),
                      checks__stage__alpha=1e-9, checks__stage__sigmas_factor=3.0)
    path = baseline_path(run, tmp_path)
    assert path.name == "moe_fast-cpu.json"
    accept(run, path)
    assert read_baseline(path) == baseline_of(run)
    assert TP4 not in read_baseline(path).cases
    rows = [row.strip() for row in path.read_text().splitlines()]
    assert f'"{PLAIN}": [0.25, "inf"]' in rows
    assert f'"{TP2}": [0.12, 0.5]' in rows
    assert '"checks.stage": {"alpha": 1e-09, "sigmas_factor": 3.0}' in rows
    assert '"bf16 tp 1": {"cases": 1},' in rows  # worst ratios are of cases that pass
    assert '"bf16 tp 2": {"cases": 1, "act": 0.12, "down": 0.5}' in rows


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_baselines_are_as_they_were_written(path: Path) -> None:
    """Nobody edits them by hand: text and content determine each other, the summary by class included."""
    assert format_baseline(read_baseline(path)) == path.read_text()


def test_accepting_shows_only_what_changes(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    words, _ = accept(make_run(passing(PLAIN), passing(TP2)), path)
    assert words == ("new baseline: 2 cases",)
    assert accept(make_run(passing(PLAIN), passing(TP2)), path)[1] == []
    words, changed = accept(make_run(passing(PLAIN), passing(TP2, down=0.61)), path)
    assert words == ("cases: 2 accepted, 0 new, 0 gone",
                     "ratios of bf16 tp 2: 1 rose, 0 fell, the largest down 0.5 -> 0.61")
    assert [row.strip("+- ,") for row in changed] == [
        '"bf16 tp 2": {"cases": 1, "act": 0.25, "down": 0.5}', '"bf16 tp 2": {"cases": 1, "act": 0.25, "down": 0.61}',
        f'"{TP2}": [0.25, 0.5]', f'"{TP2}": [0.25, 0.61]']


def test_everything_that_is_accepted_is_said_in_words_first(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    accept(judged_with(make_run(passing(PLAIN), passing(TP2)), checks__stage__sigmas_factor=3.0), path)
    run = judged_with(make_run(failing(PLAIN), passing(TP4), tier="full", hardware="cpu"),
                      checks__stage__sigmas_factor=6.0)
    words, _ = accept(run, path)
    assert words == (
        "hardware: not recorded -> cpu", "tier: smoke -> full", "bound LOOSER: checks.stage.sigmas_factor 3 -> 6",
        f"cases: 2 accepted, 1 new, 1 gone, such as {TP2}", "verdicts: 1 pass -> mismatch",
        "failures: 1 are accepted as failures; they are reported as old, and still fail",
        "ratios of bf16 tp 1: 1 rose, 0 fell, the largest down 0.5 -> 41")


def test_gaps_do_not_become_the_norm(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    with pytest.raises(UsageValueError, match="run r1 was cut short: no end line after 1 executed cases"):
        accept_run(make_run(passing(PLAIN), ended=False), path)
    with pytest.raises(UsageValueError, match=r"run r1 executed 1 cases, but should .* at least 24"):
        accept_run(make_run(passing(PLAIN), minimum=24), path)


def test_a_file_that_is_no_baseline_is_neither_read_nor_written_over(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    for text, said in (('{"schema": 9}', r"b\.json: baseline schema 9, but this version reads 3"),
                       ("[1]", r"b\.json: baseline schema None"), ("{", r"b\.json: ")):
        path.write_text(text)
        with pytest.raises(UsageValueError, match=said):
            read_baseline(path)
        with pytest.raises(UsageValueError, match=said):
            accept_run(make_run(passing(PLAIN)), path)
    accept_run(make_run(passing(PLAIN)), tmp_path / "good.json").write()
    good = (tmp_path / "good.json").read_text()
    path.write_text(good.replace("[0.25, 0.5]", "[0.25]"))
    with pytest.raises(UsageValueError, match="has 1 ratios for 2 stages"):
        read_baseline(path)
    # An older schema can only be written anew: there is nothing to compare with.
    path.write_text('{"schema": 2}')
    assert accept_run(make_run(passing(PLAIN)), path).words[0] == "baseline of schema 2 written anew with 3: 1 case"


def test_a_baseline_of_another_implementation_or_device_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    accept(make_run(passing(PLAIN)), path)
    with pytest.raises(UsageValueError, match=r"b\.json belongs to moe_fast on cpu, but the run is .* on nvidia-h100"):
        accept_run(make_run(passing(PLAIN), device="NVIDIA H100"), path)


def test_the_command_merges_shards_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    shards = [str(write(make_run(passing(case)), tmp_path / f"shard{case}")) for case in (PLAIN, TP2)]
    path = tmp_path / "moe_fast-cpu.json"
    dry = CliRunner().invoke(accept_command, [*shards, "--baseline", str(path), "--dry-run"])
    assert dry.stdout.startswith("new baseline: 2 cases\n\n--- moe_fast-cpu.json (before)\n")
    assert dry.stdout.endswith(f"{path}: would change\n")
    assert not path.exists()
    accepted = CliRunner().invoke(accept_command, [*shards, "--baseline", str(path), "--json"])
    said = json.loads(accepted.stdout)
    assert (said["changed"], said["written"], said["words"]) == (True, True, ["new baseline: 2 cases"])
    assert set(read_baseline(path).cases) == {PLAIN, TP2}
    assert read_baseline(path).implementation == SUBJECT.name
