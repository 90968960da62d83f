"""Protects the history: a run is stored once, trends say what changed, and no file that is not ours is ever written."""

import json
import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import Run
from moe_ref.report.evidence import Evidence
from moe_ref.report.history import APPLICATION, VERSION, Past, add_runs, past_ratios, read_past
from moe_ref.report.sections.history import history_section
from moe_ref.report.sections.view import View
from moe_ref.report.trends import change_lines, newest_run, sparkline, trend_table, trends_of
from tests import made_records as made
from tests.command_line import command


def passing(case: str, ratio: float | str) -> CaseLine:
    """A pass whose output stands at this ratio."""
    return msgspec.structs.replace(made.passing(case), stages=[
        msgspec.structs.replace(made.stage("output", 0.5), ratio=ratio)])


def run_of(number: int, ratio: float | str = 0.25, *more: CaseLine, name: str = "moe_fast", tier: str = "smoke",
           tolerances: str = "77aa", **environment: str) -> Run:
    """The run of a day: a case at tp 1 with a fixed ratio, one at tp 4 with this one."""
    lines = [msgspec.structs.replace(line, run=f"r{number}")
             for line in (passing(made.PLAIN, 0.1), passing(made.TP4, ratio), *more)]
    run = made.make_run(*lines, run=f"r{number}", tier=tier, **environment)
    header = msgspec.structs.replace(
        run.header, started=f"2026-11-{number:02}T04:00:00+00:00", tolerances_digest=tolerances,
        implementation=msgspec.structs.replace(run.header.implementation, name=name))
    return replace(run, header=header)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Three nights: torch changed before the second, the driver and the tolerances before the third."""
    path = tmp_path / "history.db"
    add_runs(path, [run_of(1, torch="2.12.0", driver="550"), run_of(2, 0.5, torch="2.13.0", driver="550"),
                    run_of(3, 1.5, torch="2.13.0", driver="560", tolerances="88bb")])
    return path


def tp4(path: Path) -> list[float | None]:
    """The worst ratios of the class at tp 4."""
    past = read_past(path)
    [trend] = trends_of(past, newest_run(past), "bf16 tp4").trends
    return [point.worst if point else None for point in trend.points]


def test_a_trend_has_a_point_per_run(database: Path) -> None:
    past = read_past(database)
    found = trends_of(past, newest_run(past))
    assert [trend.group for trend in found.trends] == ["bf16 tp1 ep1 uniform", "bf16 tp4 ep1 uniform"]
    assert tp4(database) == [0.25, 0.5, 1.5]
    assert past.verdicts["r1"] == {"pass": 2}


def test_changes_are_marked_where_they_are(database: Path) -> None:
    """Error / allowed as height, full above the bound, a stroke before the run that ran on something else."""
    past = read_past(database)
    found = trends_of(past, newest_run(past))
    assert found.changes == {1: ("torch 2.12.0 -> 2.13.0",), 2: ("driver 550 -> 560", "tolerances 77aa -> 88bb")}
    assert [sparkline(trend, found.changes) for trend in found.trends] == ["▁|▁|▁", "▂|▄|█"]
    assert change_lines(found)[0] == "| before run 2 (2026-11-02 0.4.1@a91d123): torch 2.12.0 -> 2.13.0"


def test_another_gpu_is_a_change_and_a_cpu_another_trend(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    add_runs(path, [run_of(1, device="NVIDIA H100"), run_of(2), run_of(3, device="NVIDIA H200")])
    past = read_past(path)
    found = trends_of(past, newest_run(past))
    assert [run.run for run in found.runs] == ["r1", "r3"]
    assert found.changes == {1: ("device NVIDIA H100 -> NVIDIA H200",)}


def test_what_was_not_recorded_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    add_runs(path, [run_of(1), run_of(2, driver="550")])
    past = read_past(path)
    assert trends_of(past, newest_run(past)).changes == {}


def test_other_implementations_and_tiers_are_kept_apart(database: Path) -> None:
    """The newest run says which, unless one is named."""
    add_runs(database, [run_of(4, name="peer"), run_of(5, tier="full")])
    past = read_past(database)
    assert len(trends_of(past, newest_run(past, "moe_fast", "smoke")).runs) == 3
    assert [run.run for run in trends_of(past, newest_run(past)).runs] == ["r5"]
    with pytest.raises(UsageValueError, match="no run of nobody, tier any; the history holds moe_fast full, "):
        newest_run(past, "nobody")


def test_adding_again_changes_nothing(database: Path) -> None:
    """By the run's id; a run whose records say more by now replaces what was there."""
    before = database.read_bytes()
    assert add_runs(database, [run_of(2, 0.5, torch="2.13.0", driver="550")]) == ["unchanged"]
    assert database.read_bytes() == before
    assert add_runs(database, [run_of(2, 0.75, torch="2.13.0", driver="550"), run_of(4)]) == ["replaced", "added"]
    assert tp4(database) == [0.25, 0.75, 1.5, 0.25]


def test_another_run_under_the_same_id_is_refused(database: Path) -> None:
    """And nothing of the runs that were given with it is stored."""
    stranger = run_of(1, name="peer")
    with pytest.raises(UsageValueError, match=r"run r1 of peer, started .*, but the database holds one of moe_fast"):
        add_runs(database, [run_of(7), stranger])
    assert [run.run for run in read_past(database).runs] == ["r1", "r2", "r3"]


def test_failures_count_where_they_begin(tmp_path: Path) -> None:
    """A red case counts at its first failing stage; a crash at none; what did not run counts nowhere."""
    crash = made.idle(made.EMPTY_TP4, "crash", "died")
    ratios = {(one.group, one.stage): one for one in past_ratios(
        run_of(1, 0.25, made.failing(made.TP2), crash, made.idle(made.PLAIN + "-res", "not_run", "why")))}
    down = ratios["bf16 tp2 ep1 uniform", "down"]
    assert (down.worst, down.cases, down.failures) == (41.0, 1, 1)
    assert ratios["bf16 tp2 ep1 uniform", "act"].failures == 0
    lost = ratios["bf16 tp4 ep1 empty", ""]
    assert (lost.worst, lost.cases, lost.failures) == (None, 1, 1)
    assert ratios["bf16 tp1 ep1 uniform", "output"].cases == 1
    path = tmp_path / "history.db"
    add_runs(path, [run_of(1, 0.25, crash), run_of(2)])
    past = read_past(path)
    [_, row, _] = trend_table(trends_of(past, newest_run(past), stages=("", "output"))).rows
    assert row == ("bf16 tp4 ep1 empty", "no stage", "not run", "failed", "", "0", "0", "█·")


@pytest.mark.parametrize(("ratio", "stored"), [("inf", math.inf), ("nan", math.inf), (1e300, 1e300)])
def test_numbers_beyond_all_bounds_survive(tmp_path: Path, ratio: float | str, stored: float) -> None:
    path = tmp_path / "history.db"
    add_runs(path, [run_of(1, ratio)])
    assert tp4(path) == [stored]


HOSTILE = "'); DROP TABLE runs; --"


def test_words_of_records_are_never_sql(tmp_path: Path) -> None:
    """Every value goes through a placeholder."""
    path = tmp_path / "history.db"
    add_runs(path, [run_of(1, name=HOSTILE, tier='"; DELETE FROM ratios; --', torch=HOSTILE)])
    past = read_past(path)
    assert (past.runs[0].implementation, past.runs[0].torch) == (HOSTILE, HOSTILE)
    assert len(past.ratios) == 2


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE runs (a)")


def newer_history(path: Path) -> None:
    add_runs(path, [run_of(1)])
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")


def damaged_history(path: Path) -> None:
    add_runs(path, [run_of(number) for number in range(1, 28)])
    content = bytearray(path.read_bytes())
    content[4096 * 2:4096 * 4] = b"\xff" * 8192
    path.write_bytes(content)


def cut_history(path: Path) -> None:
    add_runs(path, [run_of(number) for number in range(1, 28)])
    path.write_bytes(path.read_bytes()[:-4096])


def lacks_a_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"PRAGMA application_id = {APPLICATION}")
        database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("CREATE TABLE ratios (a)")


def holds_words_for_numbers(path: Path) -> None:
    add_runs(path, [run_of(1)])
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE ratios SET worst = 'large'")


FILES = {"text": lambda path: path.write_text("not a database\n" * 99), "json": lambda path: path.write_text("{}"),
         "another database": other_database, "a newer history": newer_history, "damaged": damaged_history,
         "cut": cut_history, "without its tables": lacks_a_table, "words for numbers": holds_words_for_numbers}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_history_is_refused_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    """Whoever mistypes a name must not lose what has it; the message names the file."""
    path = tmp_path / "file.db"
    FILES[name](path)
    before = path.read_bytes()
    for attempt in (lambda: read_past(path), lambda: add_runs(path, [run_of(1)])):
        with pytest.raises(UsageValueError) as caught:
            attempt()
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["file.db"]


def test_an_empty_file_becomes_a_history(tmp_path: Path) -> None:
    """As mktemp leaves one; there is nothing in it to lose."""
    path = tmp_path / "history.db"
    path.touch()
    with pytest.raises(UsageValueError, match="a database of something else"):
        read_past(path)
    assert add_runs(path, [run_of(1)]) == ["added"]


def test_a_history_that_is_not_there_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(UsageValueError, match="no such file, but should be a history"):
        read_past(tmp_path / "history.db")
    with pytest.raises(UsageValueError, match="a folder, but should be a history"):
        add_runs(tmp_path, [run_of(1)])
    assert list(tmp_path.iterdir()) == []


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Records in, a table with strokes out, the same as data; wrong use is a line and code 2."""
    folders = [str(made.write(run_of(number, number / 4, torch=f"2.{11 + number // 3}"), tmp_path / f"run{number}"))
               for number in (1, 2, 3)]
    path = str(tmp_path / "history.db")
    assert command("history", "add", *folders, "--database", path) == 0
    assert capsys.readouterr().out.startswith("added: run r1 of moe_fast, 2 cases\nadded: run r2")
    assert command("history", "show", "--database", path, "--class", "bf16 tp4") == 0
    shown = capsys.readouterr().out
    assert "▂▄|▆" in shown
    assert "| before run 3 (2026-11-03 0.4.1@a91d123): torch 2.11 -> 2.12" in shown
    assert "tp1" not in shown
    assert command("history", "show", "--database", path, "--stage", "all", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["trends"][1]["worst"] == [0.25, 0.5, 0.75]
    assert data["runs"][2]["changed"] == ["torch 2.11 -> 2.12"]
    assert command("history", "show", "--database", path, "--class", "fp8") == 2
    assert "classes are bf16 tp1 ep1 uniform; bf16 tp4 ep1 uniform" in capsys.readouterr().err
    assert command("report", folders[2], "--history", path, "--out", str(tmp_path / "report")) == 0
    assert 'aria-label="bf16 tp4 ep1 uniform output: 0.25, 0.5, 0.75"' in (tmp_path / "report/index.html").read_text()


def test_a_run_that_was_cut_short_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trend over fewer cases would look better than it is."""
    folder = made.write(replace(run_of(1), end=None), tmp_path / "run")
    path = tmp_path / "history.db"
    assert command("history", "add", str(folder), "--database", str(path)) == 2
    assert "run r1 was cut short" in capsys.readouterr().err
    assert not path.exists()


def test_the_page_shows_this_run_as_the_last(database: Path) -> None:
    """What grew most first, the strokes explained; later runs of the database are not this page's."""
    now = run_of(2, 0.9, torch="2.13.0", driver="550")
    section = section_of(now, read_past(database))
    assert section.index("bf16 tp4 ep1 uniform") < section.index("bf16 tp1 ep1 uniform")
    assert "in 2 runs, 2026-11-01 0.4.1@a91d123 to 2026-11-02" in section
    assert 'aria-label="bf16 tp4 ep1 uniform output: 0.25, 0.9"' in section
    assert "torch 2.12.0 -&gt; 2.13.0" in section
    assert "tolerances 77aa" not in section
    assert section_of(now, None) == ""


def test_the_page_of_a_first_run_says_so(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    add_runs(path, [run_of(1, name="<b>peer")])
    assert "This is the first run" in section_of(run_of(2), read_past(path))


def test_shards_of_this_run_are_no_runs_before_it(database: Path) -> None:
    """Each may have been added on its own before the page was made of both."""
    both = replace(run_of(1), header=msgspec.structs.replace(run_of(1).header, run="r1+r2"))
    assert "This is the first run" in section_of(both, read_past(database))


def section_of(run: Run, past: Past | None) -> str:
    """The section of the page of a run."""
    return str(history_section(View(Evidence(run, history=past), tuple(run.cases.values()), {})))
