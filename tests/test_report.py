"""Reports: head lines word by word, what a comparison finds and refuses, budgets, escaping, no torch.

Runs are built by hand from the record schema, so every expected word can be traced to a field.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from moe_ref.cli.report_commands import accept_command, report_command
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.store import Run, read_run
from moe_ref.report.accept import accept_run
from moe_ref.report.baseline import baseline_of, device_class
from moe_ref.report.compare import DRIFT_FACTOR, DRIFT_FLOOR, Drift, compare
from moe_ref.report.head import exit_code, head_lines
from moe_ref.report.matrix import colour_of
from moe_ref.report.render import render
from moe_ref.report.shards import merge_runs
from moe_ref.report.summary import SUMMARY_BUDGET, summary
from moe_ref.report.words import format_ratio
from tests.made_records import (
    BF16,
    EMPTY_TP4,
    PLAIN,
    SIZES,
    SUBJECT,
    TP2,
    TP4,
    failing,
    idle,
    make_run,
    passing,
    stage,
    write,
)
from tests.page_reader import Reader, own_script

# --- head lines ---------------------------------------------------------------------------------


def test_head_of_a_passing_run_still_names_the_case_closest_to_its_bound() -> None:
    run = make_run(passing(PLAIN), passing(TP2, down=0.91), idle(TP4, "unsupported", "not declared: tp 4"))
    assert head_lines(run) == (
        "PASS  moe_fast 0.4.1+3f2c1ab: 0 failures; no baseline given",
        "on    cpu, torch 2.13.0, commit a91d1234567; tier smoke, 14 s",
        "cases 3 chosen, 2 executed (minimum 1): 2 pass, 0 FAIL, 0 known failures, "
        "1 unsupported (1 not declared: tp 4), 0 not run",
        "first nothing failed",
        f"close nearest pass: down of {TP2} at 0.91 of its bound; "
        f"repro: moe-ref replay {TP2} --impl moe_fast")
    assert exit_code(run) == 0


def test_head_of_a_failing_run_says_what_failures_share_and_where_the_smallest_is_wrong() -> None:
    """Both failures have pattern empty, no passing case has: that is the first thing to look at."""
    larger = EMPTY_TP4.replace("H96", "H128")
    run = make_run(passing(PLAIN), passing(TP4), failing(EMPTY_TP4, "inf"), failing(larger))
    before = baseline_of(make_run(passing(PLAIN), passing(TP4, down=0.4), passing(EMPTY_TP4)))
    comparison = compare(run, before)
    head = head_lines(run, comparison, before)
    assert head[0] == ("FAIL  moe_fast 0.4.1+3f2c1ab: 2 new failures, 0 fixed, coverage -0 +1, drift +0; "
                       "vs 0.4.1@a91d123 (2026-11-20)")
    assert head[2] == ("cases 4 chosen, 4 executed (minimum 1): 2 pass, 2 FAIL (2 mismatch), "
                       "0 known failures, 0 unsupported, 0 not run")
    assert head[3] == ("first 2 new failures start in down, all with pattern empty and tp 4 (2 of the 2 such "
                       "that ran); smallest case: error / allowed is inf, expert 5, rank 1, tile 1 of 2, tokens "
                       "7-8; "
                       f"repro: moe-ref replay {EMPTY_TP4} --impl moe_fast")
    assert head[4].startswith(f"close nearest pass: down of {PLAIN} at 0.5 of its bound (was 0.5); repro: ")
    assert exit_code(run, comparison) == 1


def test_a_run_that_was_cut_short_fails_and_counts_what_never_ran() -> None:
    run = make_run(passing(PLAIN), chosen=[PLAIN, TP2, TP4], minimum=2, ended=False)
    head = head_lines(run)
    assert head[0] == ("FAIL  moe_fast 0.4.1+3f2c1ab: run was cut short, executed 1 of at least 2, "
                       "0 failures; no baseline given")
    assert head[1].endswith("tier smoke, unknown duration")
    assert head[2].endswith("0 unsupported, 2 not run (2 the run was cut short before it)")
    assert head[3] == "first nothing failed in what ran, which is too little to say more"
    assert exit_code(run) == 4


def test_an_empty_run_is_not_green() -> None:
    run = make_run(minimum=0)
    head = head_lines(run)
    assert head[0] == "FAIL  moe_fast 0.4.1+3f2c1ab: executed 0 of at least 1, 0 failures; no baseline given"
    assert head[4] == "close no passing case with a measured ratio"
    assert exit_code(run) == 4


def test_harness_errors_are_neither_green_nor_blamed_on_the_implementation() -> None:
    run = make_run(passing(PLAIN), idle(TP2, "harness_error", "case has no power\nTraceback"))
    head = head_lines(run)
    assert head[0] == "FAIL  moe_fast 0.4.1+3f2c1ab: 1 harness error, 0 failures; no baseline given"
    assert head[3].startswith("first harness error, not a verdict on the implementation: case has no power")
    assert exit_code(run) == 3


def test_a_crash_has_no_stage_and_is_named_by_its_verdict() -> None:
    run = make_run(passing(PLAIN), idle(TP2, "crash", "RuntimeError: misaligned address\nTraceback"))
    assert head_lines(run)[3] == ("first 1 failure ends in crash; RuntimeError: misaligned address; "
                                  f"repro: moe-ref replay {TP2} --impl moe_fast")


def test_room_left_is_that_of_the_whole_layer() -> None:
    """A stage that is rounded when stored uses up its bound by that one rounding, so it says little."""
    rounded = msgspec.structs.replace(passing(PLAIN), stages=[stage("reduced", 1.0), stage("output", 0.4)])
    other = msgspec.structs.replace(passing(TP2), stages=[stage("reduced", 0.7), stage("output", 0.6)])
    assert head_lines(make_run(rounded, other))[4].startswith(f"close nearest pass: output of {TP2} at 0.6")


def test_a_case_that_was_recorded_without_being_chosen_is_reported_too() -> None:
    run = make_run(passing(PLAIN), failing(TP2), chosen=[PLAIN])
    assert head_lines(run)[2].startswith("cases 2 chosen, 2 executed (minimum 1): 1 pass, 1 FAIL")


def test_a_verdict_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageValueError, match="verdict 'fine', but should be one of pass, mismatch, struct"):
        head_lines(make_run(idle(PLAIN, "fine", "")))


# --- comparison ---------------------------------------------------------------------------------


def test_comparison_sorts_every_case_into_its_class() -> None:
    case = {name: f"{SIZES}-s{number}" for number, name in enumerate(
        ("steady", "broken", "still", "mended", "excused", "dropped", "gone", "fresh"), 1)}
    before = baseline_of(make_run(passing(case["steady"]), passing(case["broken"]), failing(case["still"]),
                                  failing(case["mended"]), passing(case["excused"]), passing(case["dropped"]),
                                  passing(case["gone"]), idle(case["fresh"], "unsupported", "later")))
    now = compare(make_run(passing(case["steady"]), failing(case["broken"]), failing(case["still"]),
                           passing(case["mended"]), idle(case["excused"], "known_failure", "issue 12"),
                           idle(case["dropped"], "unsupported", "not declared: ep 2"),
                           passing(case["fresh"])), before)
    assert now.new_failures == (case["broken"],)
    assert now.old_failures == (case["still"],)
    assert now.fixed == (case["mended"],)
    assert now.excused == (case["excused"],)
    assert now.coverage_lost == ((case["dropped"], "unsupported: not declared: ep 2"),
                                 (case["gone"], "gone: not among the chosen cases"))
    assert now.coverage_gained == (case["fresh"],)
    assert (now.drift, now.notes) == ((), ())


@pytest.mark.parametrize(("before", "now", "drifts"), [
    (0.4, 0.4 * DRIFT_FACTOR, False), (0.4, 0.4 * DRIFT_FACTOR + 0.01, True),
    (0.01, DRIFT_FLOOR, False), (0.01, DRIFT_FLOOR + 0.01, True), (0.9, 0.3, False)])
def test_drift_needs_both_the_factor_and_the_floor(before: float, now: float, drifts: bool) -> None:
    baseline = baseline_of(make_run(passing(PLAIN, act=before)))
    found = compare(make_run(passing(PLAIN, act=now)), baseline).drift
    assert found == ((Drift(PLAIN, "act", before, now),) if drifts else ())


def test_lost_coverage_fails_a_run_in_which_nothing_failed() -> None:
    run = make_run(passing(PLAIN))
    comparison = compare(run, baseline_of(make_run(passing(PLAIN), passing(TP2), tier="full")))
    assert exit_code(run, comparison) == 1
    assert head_lines(run, comparison)[3] == (
        "first nothing failed, but 1 case of the baseline did not run (tier full -> smoke: coverage is that "
        f"of another choice of cases), such as {TP2} (gone: not among the chosen cases)")


def test_runs_that_say_nothing_about_each_other_are_refused_with_both_values() -> None:
    baseline = baseline_of(make_run(passing(PLAIN)))
    wider = make_run(msgspec.structs.replace(passing(PLAIN), numerics=BF16 | {"accumulate": "fp16"}))
    with pytest.raises(UsageValueError, match=r"numerics contract .*'fp16'.* of run r1 cannot be compared "
                                              r"with .*'accumulate': 'fp32'"):
        compare(wider, baseline)
    with pytest.raises(UsageValueError, match=r"device class 'nvidia-h100-80gb-hbm3' of run r1 .* 'cpu' of"):
        compare(make_run(passing(PLAIN), device="NVIDIA H100 80GB HBM3"), baseline)
    with pytest.raises(UsageValueError, match=r"implementation 'moe_fast' of run r1 .* 'other' of the"):
        compare(make_run(passing(PLAIN)), msgspec.structs.replace(baseline, implementation="other"))


def test_a_case_of_another_contract_is_named_and_loses_the_others_nothing() -> None:
    """Its ratio would look like drift, or like progress; whoever changed the contract accepts it on purpose."""
    before = baseline_of(make_run(passing(PLAIN), passing(TP2, down=0.3)))
    wider = msgspec.structs.replace(passing(TP2, down=0.9), numerics=BF16 | {"accumulate": "fp16"})
    run = make_run(passing(PLAIN, down=0.8), wider)
    comparison = compare(run, before)
    assert comparison.other_contract == (TP2,)
    assert [drift.case for drift in comparison.drift] == [PLAIN]
    assert exit_code(run, comparison) == 1
    head = head_lines(run, comparison, before)
    assert "1 case of another numerics contract" in head[0]
    assert head[3].startswith(f"first nothing failed, but 1 case, as {TP2}, declare other roundings than were accepted")


def test_device_class_is_the_model_of_a_gpu_and_one_word_for_any_cpu() -> None:
    assert device_class(make_run(device="2x NVIDIA H100 80GB HBM3").header) == "nvidia-h100-80gb-hbm3"
    assert device_class(make_run(device="CPU (x86_64)").header) == "cpu"
    with pytest.raises(UsageValueError, match="environment device '', but should name cpu or a GPU model"):
        device_class(make_run(device="").header)


# --- shards ----------------------------------------------------------------------------------------


def test_shards_add_up_to_the_whole_matrix() -> None:
    """A case that both shards ran counts once, in the minimum too; one missing end cuts the whole short."""
    first = make_run(passing(PLAIN), passing(TP2), minimum=2)
    second = make_run(passing(TP2), failing(TP4), minimum=2, run="r2")
    merged = merge_runs([first, second])
    assert list(merged.cases) == [PLAIN, TP2, TP4] == merged.header.cases
    assert (merged.header.minimum_executed, merged.header.run) == (3, "r1+r2")
    assert merged.end is not None
    assert merged.end.seconds == 2 * 14.2
    assert merge_runs([first, make_run(passing(TP4), ended=False)]).end is None


def test_shards_of_other_sources_are_refused() -> None:
    other = make_run(passing(TP2), run="r2")
    other.header = msgspec.structs.replace(
        other.header, implementation=msgspec.structs.replace(SUBJECT, source_digest="0000"))
    with pytest.raises(UsageValueError, match=r"r1 and r2: implementation 'moe_fast 0\.4\.1 digest 3f2c1ab99'"
                                              r" and 'moe_fast 0\.4\.1 digest 0000'"):
        merge_runs([make_run(passing(PLAIN)), other])


# --- files -----------------------------------------------------------------------------------------


def outside_code(markdown: str) -> str:
    """Markdown without what fenced blocks and code spans hold, by the rules of CommonMark."""
    kept, fence = [], ""
    for row in markdown.splitlines():
        opening = re.fullmatch(r"(`{3,})text", row)
        if fence:
            fence = "" if re.fullmatch(fence + r"`*\s*", row) else fence
        elif opening:
            fence = opening[1]
        else:
            kept.append(row)
    assert not fence, "a fenced block was never closed"
    return re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", "\n".join(kept))


HOSTILE = ("</pre><script>alert(1)</script><img src=x onerror=alert(2)> | `` ` \n``````\n# @all \x1b[31m "
           "${7*7} {{ 7*7 }}")


def hostile_run() -> Run:
    """Every free text of the records, and even a case id and a stage name, tries to break out."""
    attacked = msgspec.structs.replace(
        failing(EMPTY_TP4), reason=HOSTILE, message=HOSTILE, replay=HOSTILE, purpose=HOSTILE,
        stages=[stage("down", 41.0), msgspec.structs.replace(stage(HOSTILE, 2.0), note=HOSTILE)])
    run = make_run(passing(PLAIN), passing(TP2), attacked, idle(HOSTILE, "unsupported", HOSTILE),
                   msgspec.structs.replace(failing(HOSTILE + "2"), first_stage=HOSTILE),
                   tier=HOSTILE, host=HOSTILE)
    run.header = msgspec.structs.replace(
        run.header, implementation=msgspec.structs.replace(SUBJECT, name=HOSTILE, version=HOSTILE))
    return run


def test_the_page_is_one_inert_file_in_which_every_link_leads_somewhere(tmp_path: Path) -> None:
    run = make_run(passing(PLAIN), passing(TP2), passing(TP4, act=0.9), failing(EMPTY_TP4, "inf"))
    report = render(write(run, tmp_path / "run"), tmp_path / "out")
    page = Reader((tmp_path / "out/index.html").read_text())
    assert page.scripts == [own_script()]
    assert {"svg", "details", "table"} <= page.tags
    assert {link for link in page.links if not link.startswith(("#", "data:image/png;base64,"))} == set()
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors <= set(page.ids)
    for line in report.head:
        assert line in page.text
    assert failing(EMPTY_TP4).message in page.text


def test_hostile_records_stay_text(tmp_path: Path) -> None:
    report = render(write(hostile_run(), tmp_path / "run"), tmp_path / "out")
    text = (tmp_path / "out/index.html").read_text()
    page = Reader(text)
    assert page.scripts == [own_script()]
    assert "img" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert all(line.isprintable() for line in report.head)
    markdown = (tmp_path / "out/summary.md").read_text()
    assert "\x1b" not in markdown
    prose = outside_code(markdown)
    assert "## Failures: 2" in prose
    assert "## Environment" in prose
    assert "<script" not in prose
    assert "<img" not in prose
    assert "@all" not in prose
    assert "\n# " not in prose


def test_the_summary_keeps_its_budget_and_states_what_it_cut() -> None:
    """2,000 failures with long texts would need megabytes."""
    cases = [f"{SIZES}-s{number}" for number in range(1, 2001)]
    run = make_run(*(msgspec.structs.replace(failing(case), message=HOSTILE * 99) for case in cases))
    text = summary(run, head_lines(run))
    assert len(text) <= SUMMARY_BUDGET
    assert "## Failures: 2000" in text
    assert "1940 more of 2000 not shown here" in text
    # Reasons that grow fourfold when escaped fill the budget before the table has its 60 rows.
    run = make_run(*(idle(case, "crash", "<" * 999) for case in cases))
    text = summary(run, head_lines(run))
    assert SUMMARY_BUDGET - 2000 < len(text) <= SUMMARY_BUDGET
    shown = text.count("| crash | `")
    assert 0 < shown < 60
    assert f"{2000 - shown} more of 2000 not shown here" in text
    assert "## Coverage" in text
    assert "## Environment" in text


def test_markdown_html_json_and_terminal_say_the_same_five_lines(tmp_path: Path) -> None:
    folder = write(make_run(passing(PLAIN), failing(TP2)), tmp_path / "run")
    result = CliRunner().invoke(report_command, [str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    head = result.stdout.splitlines()
    assert len(head) == 5
    assert head == list(head_lines(read_run(folder)))
    assert (tmp_path / "out/summary.md").read_text().startswith("```text\n" + result.stdout + "```\n")
    data = json.loads((tmp_path / "out/report.json").read_text())
    assert data["head"] == head
    assert data["failures"] == [{
        "case": TP2, "verdict": "mismatch", "stage": "down", "ratio": 41.0, "message": failing(TP2).message,
        "where": "expert 5, rank 1, tile 1 of 2, tokens 7-8", "replay": failing(TP2).replay, "new": None}]
    as_json = CliRunner().invoke(report_command, [str(folder), "--json", "--out", str(tmp_path / "out")])
    assert json.loads(as_json.stdout) == data


def test_every_key_of_the_json_report_is_documented(tmp_path: Path) -> None:
    report = render(write(make_run(passing(PLAIN)), tmp_path / "run"), tmp_path / "out")
    documented = (Path(__file__).parents[1] / "docs/reports.md").read_text()
    assert [key for key in report.document if f"`{key}`" not in documented] == []


def test_accept_then_report_against_it_then_against_a_folder_of_baselines(tmp_path: Path) -> None:
    folder = write(make_run(passing(PLAIN), passing(TP2)), tmp_path / "run")
    path = tmp_path / "baselines/moe_fast-cpu.json"
    accepted = CliRunner().invoke(accept_command, [str(folder), "--baseline", str(path), "--json"])
    assert json.loads(accepted.stdout)["changed"] is True
    worse = write(make_run(passing(PLAIN), failing(TP2)), tmp_path / "worse")
    for baseline in (path, path.parent, folder):
        result = CliRunner().invoke(report_command, [str(worse), "--baseline", str(baseline)])
        assert result.exit_code == 1
        assert "1 new failure, 0 fixed" in result.stdout
    assert (worse / "report/index.html").exists()
    missing = CliRunner().invoke(report_command, [str(worse), "--baseline", str(tmp_path)])
    assert isinstance(missing.exception, UsageValueError)
    assert "no such baseline" in str(missing.exception)


def test_a_device_without_a_baseline_yet_is_told_and_a_baseline_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """The first run on a new device has a report; a broken file of its own does not pass for one that is missing."""
    accept_run(make_run(passing(PLAIN)), tmp_path / "baselines/moe_fast-cpu.json").write()
    folder = write(make_run(passing(PLAIN), device="NVIDIA H100"), tmp_path / "run")
    found = CliRunner().invoke(report_command, [str(folder), "--baseline", str(tmp_path / "baselines")])
    assert found.stdout.splitlines()[0].endswith("; nothing accepted yet as moe_fast-nvidia-h100.json")
    assert found.exit_code == 0
    (tmp_path / "baselines/moe_fast-nvidia-h100.json").write_text("{")
    broken = CliRunner().invoke(report_command, [str(folder), "--baseline", str(tmp_path / "baselines")])
    assert isinstance(broken.exception, UsageValueError)


def test_a_ratio_above_its_bound_never_reads_as_1() -> None:
    ratios = (0.31415, 41.3, 0.99996, 1.0, 1.0123, 1.00000012, "inf", "nan")
    assert [format_ratio(ratio) for ratio in ratios] == [
        "0.31", "41", "1", "1", "1.012", "1.00000012", "inf", "nan"]


def test_colours_break_off_at_the_bound() -> None:
    assert [colour_of(ratio) for ratio in (0.0, 0.001, 0.018, 0.3, 1.0)] == [
        "level0", "level0", "level1", "level5", "level7"]
    assert [colour_of(ratio) for ratio in (1.001, "inf", "nan")] == ["bad"] * 3


def test_reports_need_neither_torch_nor_the_harness() -> None:
    """Only a run that draws a page may load jinja2 and matplotlib; torch, oracle and harness never load."""
    program = ("import importlib, pkgutil, sys, moe_ref.report as report, moe_ref.cli.report_commands\n"
               "for found in pkgutil.iter_modules(report.__path__):\n"
               "    importlib.import_module('moe_ref.report.' + found.name)\n"
               "heavy = ('torch', 'triton', 'jinja2', 'matplotlib', 'moe_ref.oracle', 'moe_ref.verify')\n"
               "print([name for name in sys.modules if name in heavy])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_verdict_has_a_place_on_the_page(tmp_path: Path) -> None:
    lines = [idle(f"{SIZES}-s{number}", verdict, "because") for number, verdict in enumerate(Verdict, 1)]
    render(write(make_run(*lines), tmp_path / "run"), tmp_path / "out")
    ids = Reader((tmp_path / "out/index.html").read_text()).ids
    assert {f"verdict-{verdict}" for verdict in Verdict} <= set(ids)
