"""Protects the report of lanes: one that was lost or not run is named in the first line."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moe_ref.records.lanes import LANE_FILE, LaneRecord, write_lane
from tests.command_line import command
from tests.made_records import PLAIN, TP2, idle, make_run, passing, write


def record(name: str, verdict: Any = "pass", **changes: Any) -> LaneRecord:
    base = LaneRecord(lane=name, started="2026-11-22T02:17:00+00:00", verdict=verdict, device="1x H100",
                      counted="cases", executed=300, minimum=250, seconds=61.0, minutes=15, exit_code=0)
    return msgspec.structs.replace(base, **changes)


def reported(folder: Path, lanes_file: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report.json and summary.md of `moe-ref report FOLDER --lanes ...`."""
    code = command("report", str(folder), "--out", str(folder / "out"), "--lanes", str(lanes_file), *options)
    document = json.loads((folder / "out" / "report.json").read_text())
    return code, document, (folder / "out" / "summary.md").read_text()


def test_a_lane_that_was_lost_or_not_run_is_never_green(tmp_path: Path, lanes_file: Path) -> None:
    """All cases pass, but the GPU lane left nothing: its name stands in the first line, and the exit code is 4."""
    run = make_run(passing(PLAIN), passing(TP2))
    run.header = msgspec.structs.replace(run.header, lane="cpu")
    write(run, tmp_path / "runs")
    nightly = ("--event", "nightly", "--event", "push")
    code, document, summary = reported(tmp_path / "runs", lanes_file, *nightly)
    assert code == 4
    assert document["head"][0].startswith("FAIL  lane LOST: gpu1 (should have run on this event and left no record); "
                                          "moe_fast 0.4.1")
    assert document["head"][2].endswith("1 of 2 lanes ran")
    assert document["head"][3] == ("first lane gpu1: should have run on this event and left no record; "
                                   "repro: bash ci/lane gpu1; in the cases nothing failed")
    assert "| gpu1 |  | LOST | - | - | should have run" in summary
    page = (tmp_path / "runs" / "out" / "index.html").read_text()
    assert '<h2 id="lanes">' in page
    assert '<td class="w bad">LOST</td>' in page
    missing = record("gpu1", "not_run", executed=0, reason="no <b>device</b>", exit_code=4)
    write_lane(tmp_path / "runs" / "gpu1", missing)
    code, document, summary = reported(tmp_path / "runs", lanes_file, *nightly)
    assert code == 4
    assert "lane NOT RUN: gpu1 (no <b>device</b>); " in document["head"][0]
    assert "<b>device" not in (tmp_path / "runs" / "out" / "index.html").read_text()
    assert "&lt;b&gt;device" in summary


@pytest.mark.parametrize(("records", "code", "said"), [
    pytest.param([record("gpu1", "fail", exit_code=1, reason="exit code 1")], 1, "lane FAIL: gpu1 (exit code 1)",
                 id="failed"),
    pytest.param([record("gpu1", executed=9)], 4, "lane gpu1 executed 9 of at least 250 cases",
                 id="passed by a minimum of its own"),
    pytest.param([record("gpu1", "fail", exit_code=1, reason="first"), record("gpu1")], 1, "gpu1 (first)",
                 id="passed at the second attempt"),
    pytest.param([record("gpu1")], 0, "PASS  lanes: no case was verified", id="passed"),
    pytest.param([], 4, "lane LOST: gpu1", id="no record"),
])
def test_lanes_alone_make_a_report(tmp_path: Path, lanes_file: Path, records: list[LaneRecord], code: int,
                                   said: str) -> None:
    """Where no case was verified the lanes are what there is to tell."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for number, one in enumerate(records):
        write_lane(folder / str(number), one)
    found, document, summary = reported(folder, lanes_file, "--event", "label", "--workflow", "gpu")
    assert (found, document["exit_code"]) == (code, code)
    assert said in document["head"][0] + document["lanes"][0]["reason"]
    assert "## Lanes" in summary


def test_a_broken_record_of_a_lane_is_a_failure_of_that_lane(tmp_path: Path, lanes_file: Path) -> None:
    """It loses nothing else, and is not taken for lost."""
    folder = tmp_path / "runs" / "lane-gpu1"
    folder.mkdir(parents=True)
    (folder / LANE_FILE).write_text('{"lane": "gpu1"')
    code, document, _ = reported(tmp_path / "runs", lanes_file, "--event", "label", "--workflow", "gpu")
    assert (code, document["lanes"][0]["verdict"]) == (3, "FAIL")
    assert "lane.json" in document["lanes"][0]["reason"]


def test_reports_of_lanes_stand_in_the_summary(tmp_path: Path, lanes_file: Path) -> None:
    """Five lines of each, so that nobody has to open artefacts to learn which lane broke where."""
    write(make_run(passing(PLAIN), idle(TP2, "unsupported", "not declared")), tmp_path / "runs")
    write_lane(tmp_path / "runs" / "gpu1", record("gpu1", "fail", exit_code=1, reason="exit code 1", head=[
        "FAIL  moe_fast on a GPU", "on    1x H100", "cases 300", "first `down`\n```", "close none"]))
    _, _, summary = reported(tmp_path / "runs", lanes_file, "--event", "label", "--workflow", "gpu")
    assert "## Reports of lanes" in summary
    assert "FAIL  moe_fast on a GPU\non    1x H100" in summary
    assert "````text" in summary


def test_events_and_lanes_belong_together(tmp_path: Path, lanes_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong use, exit code 2."""
    folder = write(make_run(passing(PLAIN)), tmp_path / "runs")
    for words, said in ((("report", str(folder), "--event", "push"), "events without --lanes"),
                        (("report", str(folder), "--lanes", str(lanes_file)), "no --event; give one of push"),
                        (("lanes", "select", "--event", "ci", "--fork"), "--event ci with --changed")):
        assert command(*words) == 2
        assert said in capsys.readouterr().err
