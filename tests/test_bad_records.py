"""Records that are torn, corrupt, foreign or made to mislead: refused by file, line and reason, nothing else lost.

Each test spoils one thing in a good record of three cases and looks at the whole report: the other cases stay, what was
refused is told, and the exit code is not 0.
"""

import json
import os
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import CliRunner

from moe_ref.cli.report_commands import report_command
from moe_ref.contract.errors import UsageValueError
from moe_ref.records import lines as record_lines
from moe_ref.records.faults import MOST_CASES
from moe_ref.records.gather import gather
from moe_ref.records.store import read_run
from moe_ref.report.axes import case_axes
from moe_ref.report.document import document
from moe_ref.report.evidence import build_evidence
from moe_ref.report.head import exit_code, head_lines
from tests.made_records import PLAIN, TP2, TP4, failing, make_run, passing, write
from tests.page_reader import own_script

HOSTILE = "</td><script>alert(1)</script>{{7*7}}"


def good_lines(folder: Path) -> list[bytes]:
    """Run line, three passing cases and end line of a record in FOLDER, to spoil one of."""
    write(make_run(passing(PLAIN), passing(TP2), passing(TP4)), folder)
    return (folder / "records.jsonl").read_bytes().splitlines()


def report(folder: Path, *lines: bytes) -> tuple[int, dict]:
    """Exit code and data of the report of these lines as a record, without its pages."""
    folder.mkdir(parents=True, exist_ok=True)
    if lines:
        (folder / "records.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (evidence,) = build_evidence(gather([folder]))
    code = exit_code(evidence.run)
    return code, document(evidence.run, head_lines(evidence.run), code)


def report_pages(folder: Path, *lines: bytes) -> tuple[int, dict]:
    """The same by the command, with all its files; the page must hold no markup of a record."""
    report(folder, *lines)
    out = folder / "report"
    result = CliRunner().invoke(report_command, [str(folder), "--out", str(out)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert (out / "index.html").read_text().lower().replace(own_script().lower(), "").count("<script") == 1, "its own"
    ElementTree.parse(out / "junit.xml")
    return result.exit_code, json.loads((out / "report.json").read_text())


def changed(line: bytes, **fields: object) -> bytes:
    return json.dumps(json.loads(line) | fields).encode()


def with_stage(line: bytes, **fields: object) -> bytes:
    """The line with its first stage changed; a str that begins with `raw ` stands in the JSON without quotes."""
    plain = json.loads(line)
    plain["stages"][0] |= fields
    return re.sub(rb'"raw ([^"]*)"', rb"\1", json.dumps(plain).encode())


UNREADABLE = {
    "binary garbage": (lambda line: b"\x00\xff\xfe garbage \x80" * 9, "malformed", False),
    "bytes that are no UTF-8": (lambda line: line.replace(b'"purpose":""', b'"purpose":"\xff"'), "utf-8", True),
    "half a line": (lambda line: line[:len(line) // 2], "JSON is malformed", True),
    "deep nesting": (lambda line: line[:-1] + b',"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "recursion", True),
    "a float beyond floats": (lambda line: with_stage(line, ratio="raw 1e999"), "out of range", True),
    "an integer of 10,000 digits": (
        lambda line: with_stage(line, num_checked="raw " + "9" * 10_000), "out of range", True),
    "NaN, which is no JSON": (lambda line: with_stage(line, ratio="raw NaN"), "malformed", True),
    "a word that is no number": (lambda line: with_stage(line, ratio="many"), "regex", True),
    "a negative ratio": (lambda line: with_stage(line, ratio=-1.0), ">= 0", True),
    "a negative count": (lambda line: with_stage(line, num_bad=-3), ">= 0", True),
    "a drawing of 2^60 tiles": (lambda line: with_stage(line, num_tiles=2 ** 60), "<= 65536", True),
    "seconds of a long life": (lambda line: changed(line, subject_seconds=1e308), "<= 1000000000.0", True),
    "a pass that measured nothing": (lambda line: with_stage(line, ratio="nan"), "verdict pass, but stage act", True),
    "a pass far above its bound": (lambda line: with_stage(line, ratio=1e308), "verdict pass, but stage act", True),
    "a verdict that does not exist": (lambda line: changed(line, verdict="fine"), "verdict 'fine', but", True),
    "a stage of markup": (lambda line: with_stage(line, stage=HOSTILE), "is none of a layer's", True),
    "another schema": (lambda line: changed(line, schema=1), "schema 1, but this version reads 2", True),
    "another schema with other fields": (lambda line: b'{"type":"case","schema":3,"case":"' + TP2.encode() + b'"}',
                                         "schema 3, but this version reads 2", True),
    "a type of another program": (lambda line: b'{"type":"note"}', "Invalid value 'note'", False),
    "a case of another implementation": (
        lambda line: changed(line, implementation={"name": HOSTILE, "version": "1"}), "the run is of moe_fast", True),
    "a message without an end": (lambda line: changed(line, message="x" * 200_000), "message has 200000", True),
    "numbers without an end": (lambda line: with_stage(line, bad_tiles=[1] * 70_000), "more than 65536 places", True),
    "an id of 10,000 characters": (lambda line: changed(line, case="v" * 10_000), "a case id of 10000", False),
    "an id that moves a cursor": (lambda line: changed(line, case=TP2 + "\x1b[2J"), "cannot be printed", False),
}
"""What becomes of the line of TP2, a part of the reason, and whether the case can still be told."""


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_bad_line_is_refused_and_loses_no_other_case(name: str, tmp_path: Path) -> None:
    spoil, reason, is_told = UNREADABLE[name]
    lines = good_lines(tmp_path / "run")
    lines[2] = spoil(lines[2])
    code, data = report(tmp_path / "run", *lines)
    assert code == 3
    (refused,) = data["refused"]
    assert (refused["file"], refused["line"]) == (str(tmp_path / "run/records.jsonl"), 3)
    assert reason in refused["reason"]
    assert refused["case"] == (TP2 if is_told else "")
    assert "1 line refused" in data["head"][0]
    assert [data["cases"][case]["verdict"] for case in (PLAIN, TP2, TP4)] == ["pass", "not_run", "pass"]
    assert data["cases"][TP2]["reason"].startswith("its record line was refused: " if is_told else "no line was")


def test_every_bad_line_at_once_is_listed_on_page_and_summary(tmp_path: Path) -> None:
    """The path has markup in it too."""
    lines = good_lines(tmp_path / "run")
    bad = [spoil(lines[2]) for spoil, _, _ in UNREADABLE.values()]
    folder = tmp_path / "<script>alert(2)<"
    code, data = report_pages(folder, lines[0], lines[1], *bad, lines[3], lines[4])
    assert code == 3
    assert f"{len(bad)} lines refused" in data["head"][0]
    assert [one["line"] for one in data["refused"]] == list(range(3, 3 + len(bad)))
    assert "Refused records" in (folder / "report/index.html").read_text()
    summary = (folder / "report/summary.md").read_text()
    assert f"## Refused records: {len(bad)}" in summary
    assert "<script" not in re.sub(r"`[^`]*`", "", summary)


def test_markup_in_an_id_is_shown_as_text(tmp_path: Path) -> None:
    """An id of another grammar is no fault: it is printed, nothing in it works."""
    lines = good_lines(tmp_path / "run")
    lines[2] = changed(lines[2], case=HOSTILE)
    code, data = report_pages(tmp_path / "run", *lines)
    assert code == 0
    assert data["refused"] == []
    assert data["cases"][HOSTILE]["verdict"] == "pass"


def test_a_case_of_a_billion_experts_costs_what_any_other_does(tmp_path: Path) -> None:
    """Nobody could run it, but its id can be read; what is shown of it are words of the id."""
    lines = good_lines(tmp_path / "run")
    huge = "v1-T999999999.H999999999.I999999999.E999999999.K1-bf16-norm-tp999999999-ep999999999-copy0"
    began = time.process_time()
    code, data = report(tmp_path / "run", *lines[:2], changed(lines[2], case=huge), *lines[3:])
    assert case_axes(huge)["experts"] == "999999999"
    assert time.process_time() - began < 2
    assert (code, data["executed"]) == (0, 3)


def test_half_a_line_at_the_end_is_what_a_kill_leaves(tmp_path: Path) -> None:
    lines = good_lines(tmp_path / "run")
    path = tmp_path / "run/records.jsonl"
    path.write_bytes(b"\n".join(lines[:3]) + b"\n" + lines[3][:200])
    code, data = report(tmp_path / "run")
    assert code == 3
    assert data["refused"][0]["reason"] == "half a line: the file ends in it"
    assert (data["cut_short"], data["cases"][TP4]["verdict"]) == (True, "not_run")
    # A line that lacks nothing but its end says all that it should.
    path.write_bytes(b"\n".join(lines))
    assert report(tmp_path / "run")[0] == 0


def test_a_line_without_an_end_is_skipped_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lowered here, so that the test needs no 200 MB."""
    monkeypatch.setattr(record_lines, "LINE_LIMIT", 100_000)
    lines = good_lines(tmp_path / "run")
    lines[2] = lines[2][:-1] + b',"x":"' + b"y" * 5_000_000 + b'"}'
    code, data = report(tmp_path / "run", *lines)
    assert code == 3
    (refused,) = data["refused"]
    assert refused["reason"] == f"a line of {len(lines[2]) + 1} bytes, but should have at most 100000"
    assert (refused["case"], data["executed"]) == (TP2, 2)


def test_a_file_of_garbage_is_counted_not_listed(tmp_path: Path) -> None:
    lines = good_lines(tmp_path / "run")
    _, data = report(tmp_path / "run", *lines[:2], *[b"\x01garbage"] * 5000, *lines[2:])
    assert "5000 lines refused" in data["head"][0]
    assert len(data["refused"]) < 1100
    assert data["executed"] == 3


def test_a_later_line_that_is_lost_may_have_taken_a_pass_back_but_hides_no_failure(tmp_path: Path) -> None:
    """A resumed run writes a case again, and the last line counts."""
    lines = good_lines(tmp_path / "run")
    torn = lines[2][:-9]
    assert report(tmp_path / "a", *lines[:4], torn, lines[4])[1]["cases"][TP2]["verdict"] == "not_run"
    assert report(tmp_path / "b", *lines[:2], torn, *lines[2:])[1]["cases"][TP2]["verdict"] == "pass"
    red = msgspec.json.encode(failing(TP2))
    code, data = report(tmp_path / "c", *lines[:2], red, *lines[3:4], torn, lines[4])
    assert (code, data["cases"][TP2]["verdict"]) == (1, "mismatch")


def test_a_lost_run_line_leaves_its_cases_with_the_shards_that_they_belong_to(tmp_path: Path) -> None:
    """Tier, versions and chosen cases stand in it alone; what ran is known all the same, failures too."""
    write(make_run(passing(PLAIN)), tmp_path / "run/a")
    lines = good_lines(tmp_path / "other")
    (tmp_path / "run/b").mkdir()
    red = changed(msgspec.json.encode(failing(TP2)), run="r2")
    shard = [lines[0][:99], red, changed(lines[3], run="r2")]
    (tmp_path / "run/b/records.jsonl").write_bytes(b"\n".join(shard) + b"\n")
    code, data = report(tmp_path / "run")
    assert code == 1
    assert {case: entry["verdict"] for case, entry in data["cases"].items()} == {
        PLAIN: "pass", TP2: "mismatch", TP4: "pass"}
    assert data["tier"] == "smoke + b"
    assert [one["line"] for one in data["refused"]] == [1]


@pytest.mark.parametrize(("fields", "reason"), [
    ({"cases": ["a"] * (MOST_CASES + 1)}, "should name at most 250000"),
    ({"environment": {}}, "names no device"), ({"axis_pairs": [-1, 4]}, ">= 0"), ({"minimum_executed": -1}, ">= 0")])
def test_a_run_line_that_cannot_be_is_refused_alone(fields: dict, reason: str, tmp_path: Path) -> None:
    """A run of millions of cases would fill the memory with what did not run."""
    lines = good_lines(tmp_path / "run")
    code, data = report(tmp_path / "run", changed(lines[0], **fields), *lines[1:])
    assert (code, data["executed"]) == (3, 3)
    assert reason in data["refused"][0]["reason"]


def test_an_end_line_that_lies_is_told(tmp_path: Path) -> None:
    """What is shown is counted from case lines, so a lie changes no number; but its writer is not to be believed."""
    lines = good_lines(tmp_path / "run")
    red = msgspec.json.encode(failing(TP2))
    code, data = report(tmp_path / "run", *lines[:2], red, *lines[3:])
    assert code == 1
    assert data["refused"] == [{
        "file": str(tmp_path / "run/records.jsonl"), "line": 5, "case": "", "number": 1,
        "reason": "the end line says 3 pass where case lines have 2; 0 mismatch where case lines have 1; "
                  "exit code 0 where 1 cases failed"}]
    code, data = report(tmp_path / "run", *lines[:4], changed(lines[4], executed=10 ** 6))
    assert (code, data["executed"]) == (3, 3)
    assert "1000000 executed where case lines have 3" in data["refused"][0]["reason"]


def test_a_line_of_a_run_that_the_file_does_not_hold_is_foreign(tmp_path: Path) -> None:
    lines = good_lines(tmp_path / "run")
    code, data = report(tmp_path / "run", *lines[:4], changed(lines[3], run="elsewhere"), lines[4])
    assert code == 3
    assert data["refused"][0]["reason"] == "a line of run elsewhere, but the file holds r1"


def test_what_is_no_file_of_records_never_blocks_and_never_ends_a_report(tmp_path: Path) -> None:
    """A pipe without a writer, a folder in a file's place, a link to nowhere and to itself, a file of nothing."""
    good_lines(tmp_path / "run/good")
    for name in ("pipe", "loop", "nowhere", "empty", "folder", "photo", "nobody's"):
        (tmp_path / "run" / name).mkdir()
    os.mkfifo(tmp_path / "run/pipe/records.jsonl")
    (tmp_path / "run/loop/records.jsonl").symlink_to("records.jsonl")
    (tmp_path / "run/nowhere/records.jsonl").symlink_to("gone")
    (tmp_path / "run/empty/records.jsonl").touch()
    (tmp_path / "run/folder/records.jsonl").mkdir()
    (tmp_path / "run/photo/records.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n" * 99)
    (tmp_path / "run/nobody's/\udcff.jsonl").write_bytes(b'{"type":"run"\n')
    began = time.monotonic()
    code, data = report(tmp_path / "run")
    assert time.monotonic() - began < 60
    assert (code, data["executed"]) == (3, 3)
    told = {Path(one["file"]).parent.name: one["reason"] for one in data["refused"]}
    assert told == {
        "pipe": "cannot be read: not a regular file", "loop": "cannot be read: Too many levels of symbolic links",
        "nowhere": "cannot be read: No such file or directory",
        "empty": "no record: none of its lines has a known type",
        "photo": "no record: none of its lines has a known type", "nobody's": "Input data was truncated"}
    assert "6 files refused" not in data["head"][0]
    assert "1 line and 5 files refused" in data["head"][0]


def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is made up: root, who may run tests, reads every file."""
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    good_lines(tmp_path / "run")
    monkeypatch.setattr(record_lines.os, "open", refuse)
    assert "Permission denied" in gather([tmp_path]).refused[0].reason


def test_strict_readers_name_the_line_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    """Accepting and resuming stop at the first such line, with a sentence and never with a traceback."""
    lines = good_lines(tmp_path)
    for name in ("binary garbage", "deep nesting", "bytes that are no UTF-8", "a negative ratio"):
        (tmp_path / "records.jsonl").write_bytes(b"\n".join([*lines[:2], UNREADABLE[name][0](lines[2])]) + b"\n")
        with pytest.raises(UsageValueError, match=r"records\.jsonl:3: "):
            read_run(tmp_path)


def test_a_passing_case_is_kept_lean_and_whole_where_it_counts(tmp_path: Path) -> None:
    """What reports show of a pass is as it was recorded; of a failure nothing is left out."""
    full = msgspec.structs.replace(passing(PLAIN), guard={"poison": "nan"}, message="pass")
    red = msgspec.structs.replace(failing(TP2), guard={"poison": "nan"})
    write(make_run(full, red), tmp_path)
    (run,) = gather([tmp_path]).runs
    assert run.cases[PLAIN] == msgspec.structs.replace(full, guard={}, message="")
    assert run.cases[TP2] == red
