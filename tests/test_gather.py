"""Records of many files as one report: what is found, what belongs together, and what tiers and shards add up to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from moe_ref.cli.report_commands import report_command
from moe_ref.contract.errors import UsageValueError
from moe_ref.records.gather import gather
from moe_ref.records.growth import DivergeLine, GrowthLine
from moe_ref.records.schema import EndLine
from moe_ref.records.score import MutantOutcome, ScoreLine
from moe_ref.records.store import RecordWriter, Run
from moe_ref.report.accept import accept_run
from moe_ref.report.evidence import build_evidence
from moe_ref.report.head import exit_code, head_lines
from moe_ref.report.shards import merge_runs
from tests.made_records import PLAIN, SUBJECT, TP2, TP4, failing, idle, make_run, passing, write

ROOT = Path(__file__).parents[1]


def write_growth(folder: Path, *subjects: str) -> Path:
    """A `moe-ref diverge` record of these subjects."""
    with RecordWriter(folder) as writer:
        writer.append(DivergeLine(run="g", started="", subjects=list(subjects), lengths=[64], sizes={}, dtype="bf16",
                                  data=["unit"], device="cpu", hardware="cpu", environment={}, tolerances_digest=""))
        for subject in subjects:
            writer.append(GrowthLine(run="g", subject=subject, status="MEASURED"))
        writer.append(EndLine(run="g", finished="", seconds=1.0, verdicts={}, executed=1, exit_code=0))
    return folder


def renamed(run: Run, name: str) -> Run:
    """The run as one of another implementation."""
    other = msgspec.structs.replace(SUBJECT, name=name)
    run.header = msgspec.structs.replace(run.header, implementation=other)
    run.cases = {case: msgspec.structs.replace(line, implementation=other) for case, line in run.cases.items()}
    return run


def test_all_kinds_of_records_are_found_below_a_folder(tmp_path: Path) -> None:
    """What a lane leaves: folders of several verbs, a log that is JSON lines too, and pages of an earlier report."""
    write(make_run(passing(PLAIN)), tmp_path / "matrix")
    write_growth(tmp_path / "growth", "moe_fast:bf16")
    with RecordWriter(tmp_path / "score", "score.jsonl") as writer:
        writer.append(ScoreLine(started="", digest="", tiers=[], device="cpu", classes={}, entries={}, unseeded={}))
        writer.append(MutantOutcome(id="A01.x", outcome="caught"))
    os.rename(write(make_run(passing(TP2), run="r2"), tmp_path / "other") / "records.jsonl", tmp_path / "mine.jsonl")
    (tmp_path / "log.jsonl").write_text('{"type": "note", "text": {"type": "run"}}\n')
    (tmp_path / "report.json").write_text("{}")
    gathered = gather([tmp_path])
    assert [run.header.run for run in gathered.runs] == ["r2", "r1"]
    assert [list(run.subjects) for run in gathered.growth] == [["moe_fast:bf16"]]
    assert [list(run.mutants) for run in gathered.score] == [["A01.x"]]
    assert (gathered.bench, gathered.refused) == ([], [])


def test_a_bad_line_of_another_verb_is_refused_alone(tmp_path: Path) -> None:
    """Curves are read line by line too: one that cannot be drawn loses no other."""
    write(make_run(passing(PLAIN)), tmp_path / "matrix")
    path = write_growth(tmp_path / "growth", "moe_fast:bf16", "torch:loop") / "records.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = lines[1].replace(b'"exponent":"nan"', b'"exponent":"steep"', 1)
    path.write_bytes(b"\n".join([*lines, lines[2].replace(b'"run":"g"', b'"run":"h"')]) + b"\n")
    (one,) = build_evidence(gather([tmp_path]))
    assert [list(run.subjects) for run in one.growth] == [["torch:loop"]]
    assert [refused.line for refused in one.run.refused] == [2, 5]
    assert "holds run g" in one.run.refused[1].reason
    assert exit_code(one.run) == 3


def test_a_file_that_is_met_twice_counts_once(tmp_path: Path) -> None:
    """Given itself, with its folder, and through a link; a folder that links to itself ends the search too."""
    folder = write(make_run(passing(PLAIN)), tmp_path / "run")
    (folder / "again.jsonl").symlink_to(folder / "records.jsonl")
    (folder / "loop").symlink_to(folder)
    gathered = gather([folder, folder / "records.jsonl", tmp_path])
    assert len(gathered.runs) == 1
    assert gathered.refused == []


def test_tiers_of_a_lane_are_one_report_in_which_each_must_reach_its_own_minimum(tmp_path: Path) -> None:
    """A quick matrix that executed plenty does not make up for whole layers that never ran."""
    write(make_run(passing(PLAIN), passing(TP2), tier="quick", minimum=1), tmp_path / "matrix")
    write(make_run(idle(TP4, "not_run", "no time left"), tier="", minimum=1, run="r2"), tmp_path / "layers")
    (one,) = build_evidence(gather([tmp_path]))
    assert one.run.header.tier == "layers + quick"
    assert [(part.name, part.executed, part.minimum_executed) for part in one.run.tiers] == [
        ("layers", 0, 1), ("quick", 2, 1)]
    assert "executed 0 of at least 1 of layers" in head_lines(one.run)[0]
    assert exit_code(one.run) == 4


def test_a_case_that_any_of_two_runs_executed_has_run() -> None:
    """A deadline that cut one run short takes nothing back from the other."""
    left = idle(PLAIN, "not_run", "the run's deadline, 9 s, had passed")
    for runs in ([make_run(left), make_run(passing(PLAIN))], [make_run(passing(PLAIN)), make_run(left)]):
        assert merge_runs(runs).cases[PLAIN].verdict == "pass"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_case_with_two_verdicts_is_red_and_says_both(order: tuple[int, int]) -> None:
    """Neither the first nor the better one is silently believed, whichever comes first."""
    runs = [make_run(passing(PLAIN)), make_run(msgspec.structs.replace(failing(PLAIN), ranks="nccl"), run="r2")]
    merged = merge_runs([runs[number] for number in order])
    line = merged.cases[PLAIN]
    assert exit_code(merged) == 1
    assert line.reason.startswith("records disagree: ")
    assert "pass in run r1 on local, cpu" in line.reason
    assert "mismatch (down at 41 of its bound) in run r2 on nccl, cpu" in line.reason
    assert line.first_stage == "down", "where to look stays known"


def test_every_implementation_has_a_page_and_the_growth_that_names_it(tmp_path: Path) -> None:
    write(make_run(passing(PLAIN)), tmp_path / "in/a")
    write(renamed(make_run(failing(PLAIN), run="r2"), "other"), tmp_path / "in/b")
    write_growth(tmp_path / "in/c", "other:bf16")
    write_growth(tmp_path / "in/d", "torch:loop")
    first, second = build_evidence(gather([tmp_path / "in"]))
    assert [list(run.subjects) for run in first.growth] == [["torch:loop"]]
    assert [list(run.subjects) for run in second.growth] == [["other:bf16"], ["torch:loop"]]
    accept_run(first.run, tmp_path / "accepted.json").write()
    result = CliRunner().invoke(report_command, [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--baseline",
                                                 str(tmp_path / "accepted.json")])
    assert result.exit_code == 1, "of the two the worse"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["moe_fast-cpu", "other-cpu", "summary.md"]
    both = (tmp_path / "out/summary.md").read_text()
    for name, word in (("moe_fast-cpu", "PASS"), ("other-cpu", "FAIL")):
        document = json.loads((tmp_path / "out" / name / "report.json").read_text())
        head = document["head"]
        assert head[0].startswith(word)
        assert (document["comparison"] is None) == (name == "other-cpu"), "the baseline is of the first alone"
        assert all(line in both for line in head)


def test_runs_of_other_sources_are_reported_apart_and_never_green(tmp_path: Path) -> None:
    """Two versions under one name are a mistake in what was put together; neither of them is lost for it."""
    write(make_run(passing(PLAIN)), tmp_path / "a")
    other = make_run(passing(TP2), run="r2")
    other.header = msgspec.structs.replace(other.header, tolerances_digest="other")
    write(other, tmp_path / "b")
    evidences = build_evidence(gather([tmp_path]))
    assert [list(one.run.cases) for one in evidences] == [[PLAIN], [TP2]]
    assert [exit_code(one.run) for one in evidences] == [0, 3]
    assert "tolerances digest '77aa' and 'other'" in evidences[1].run.refused[0].reason


def test_nothing_to_report_says_what_was_found_and_what_was_refused(tmp_path: Path) -> None:
    write_growth(tmp_path / "growth", "moe_fast:bf16")
    with pytest.raises(UsageValueError, match=r"no run of .* found: 1 of diverge; .*gone: cannot be read: No such"):
        build_evidence(gather([tmp_path, tmp_path / "gone"]))


def test_five_thousand_cases_take_little_memory_and_time(tmp_path: Path) -> None:
    """What a case costs once it is read bounds how many a report can hold; ci/bench_report.py shows 100,000."""
    lines = [passing(f"{PLAIN}-s{number}") for number in range(1, 5001)]
    full = msgspec.structs.replace(lines[0], guard={"poison": "nan"}, message="pass " * 200,
                                   stages=[*lines[0].stages * 4])
    run = make_run(*(msgspec.structs.replace(full, case=line.case) for line in lines))
    path = tmp_path / "records.jsonl"
    path.write_bytes(msgspec.json.Encoder().encode_lines([run.header, *run.cases.values(), run.end]))
    program = ("import sys, tracemalloc; from pathlib import Path; from moe_ref.records.gather import gather\n"
               "tracemalloc.start(); found = gather([Path(sys.argv[1])])\n"
               "print(len(found.runs[0].cases), tracemalloc.get_traced_memory()[0] / 5000)")
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    number, per_case = done.stdout.split()
    assert int(number) == 5000
    assert float(per_case) < 6000, "bytes of a case with 8 stages; as it is decoded it has 9000"


def test_a_report_needs_neither_torch_nor_triton(tmp_path: Path) -> None:
    """The whole command, in a process where importing them fails."""
    write(make_run(passing(PLAIN), failing(TP2)), tmp_path / "run")
    program = ("import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"
               "from moe_ref.cli.main import main; main()")
    done = subprocess.run([sys.executable, "-c", program, "report", str(tmp_path / "run")], capture_output=True,
                          text=True, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("FAIL  moe_fast")
    assert (tmp_path / "run/report/index.html").exists()
