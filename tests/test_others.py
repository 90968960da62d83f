"""What stands beside the matrix speaks in the same head lines: a kernel that spills is no green report."""

from pathlib import Path

from moe_ref.records.score import MutantOutcome
from moe_ref.report.evidence import Evidence
from moe_ref.report.others import with_others
from moe_ref.report.render import render_evidence
from tests.made_evidence import bench_run, combination, compiled_run, growth_line, growth_run, score_run, timing
from tests.made_records import PLAIN, failing, make_run, passing

HEAD = ("PASS  moe_fast: 0 failures", "on    cpu", "cases 1 chosen", "first nothing failed", "close nothing")
RUN = make_run(passing(PLAIN))


def test_evidence_without_fault_changes_no_line() -> None:
    clean = Evidence(RUN, growth=(growth_run(growth_line("moe_fast:bf16")),), compiled=(compiled_run(),),
                     bench=(bench_run(timing("moe_fast", 16, 1e-3)),))
    assert with_others(HEAD, 0, clean) == (HEAD, 0)


def test_each_kind_is_named_with_its_number_and_its_first_words() -> None:
    spill = combination("sm_90 product_kernel a", worse=["spills 64 bytes, accepted 0"])
    drift = growth_line("moe_fast:bf16", faults=["exponent 0.9, band 0.2 to 0.8"])
    missed = MutantOutcome(id="A01.x", outcome="missed", tried=12)
    evidence = Evidence(RUN, growth=(growth_run(drift),), score=score_run(missed), compiled=(compiled_run(spill),),
                        bench=(bench_run(timing("moe_fast", 16, 1e-3, "WRONG", "ratio 3")),))
    head, code = with_others(HEAD, 0, evidence)
    assert code == 1
    assert head[0] == ("FAIL  moe_fast: 0 failures; divergence: 1 failure, mutation score: 1 failure, "
                       "cross-compile: 1 failure, benchmark: 1 failure")
    assert head[3] == "first divergence: moe_fast:bf16: exponent 0.9, band 0.2 to 0.8"


def test_a_peer_that_is_wrong_is_no_failure_of_the_implementation() -> None:
    wrong = Evidence(RUN, bench=(bench_run(timing("torch:loop", 16, 1e-3, "WRONG", "ratio 3")),))
    assert with_others(HEAD, 0, wrong) == (HEAD, 0)


def test_a_run_that_was_cut_short_is_not_green() -> None:
    head, code = with_others(HEAD, 0, Evidence(RUN, compiled=(compiled_run(ended=False),)))
    assert (code, head[0]) == (4, "FAIL  moe_fast: 0 failures; cross-compile cut short")


def test_the_report_ends_with_that_code_and_keeps_what_failed_in_the_matrix_first(tmp_path: Path) -> None:
    spill = combination("sm_90 product_kernel a", worse=["spills 64 bytes, accepted 0"])
    report = render_evidence(Evidence(make_run(failing(PLAIN)), compiled=(compiled_run(spill),)), tmp_path)
    assert report.exit_code == 1
    assert report.head[3].startswith("first 1 failure starts in down")
    assert report.head[3].endswith("cross-compile: sm_90 product_kernel a: spills 64 bytes, accepted 0")
    assert report.document["verdict"] == "fail"
