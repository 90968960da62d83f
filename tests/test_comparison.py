"""What changed since the accepted run, by its right name: bounds, lost cases, drift, faults."""

import math

import msgspec
import pytest

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.schema import DiagnosisLine, Number
from moe_ref.records.store import Run
from moe_ref.report.baseline import baseline_of
from moe_ref.report.bounds import BoundChange, Effect, bound_changes
from moe_ref.report.compare import Comparison, compare
from moe_ref.report.head import exit_code, head_lines
from moe_ref.report.summary import summary
from tests.made_records import PLAIN, SIZES, TP2, TP4, failing, idle, make_run, passing

SIGMAS = "checks.stage.sigmas_factor"
DRAWS = [f"{SIZES}-s{number}" for number in range(1, 7)]
TP8 = [f"{SIZES}-s{number}-tp8" for number in range(1, 7)]


def judged_with(run: Run, tolerances: dict[str, Number], digest: str = "77aa", lane: str = "") -> Run:
    run.header = msgspec.structs.replace(run.header, tolerances=tolerances, tolerances_digest=digest, lane=lane)
    return run


def said(run: Run, comparison: Comparison) -> tuple[str, str]:
    """The verdict line and the first line."""
    head = head_lines(run, comparison)
    return head[0], head[3]


# --- bounds -----------------------------------------------------------------------------------


def test_a_looser_bound_fails_until_it_is_accepted() -> None:
    """Every ratio falls where a constant is raised, so that nothing else would tell."""
    before = baseline_of(judged_with(make_run(passing(PLAIN, 0.4, 0.5), passing(TP2, 0.4, 0.5)), {SIGMAS: 3.0}))
    run = judged_with(make_run(passing(PLAIN, 0.2, 0.5), passing(TP2, 0.2, 0.25)), {SIGMAS: 6.0}, "88bb")
    comparison = compare(run, before)
    assert comparison.bounds == (BoundChange(SIGMAS, 3.0, 6.0, looser=True),)
    assert comparison.effect == Effect(compared=4, fell=3, rose=0, median=0.5)
    assert exit_code(run, comparison) == 1
    verdict, first = said(run, comparison)
    assert verdict.startswith("FAIL  ")
    assert f": bounds looser: {SIGMAS} 3 -> 6, 0 new failures," in verdict
    assert first == (f"first nothing failed, but bounds are looser than accepted: {SIGMAS} 3 -> 6 (3 of 4 ratios fell, "
                     "to 0.5 of what they were in the median); `moe-ref accept` where that is on purpose")
    assert "## Bounds looser than accepted: 1" in summary(run, head_lines(run, comparison), comparison)
    accepted = compare(run, baseline_of(run))
    assert (accepted.bounds, exit_code(run, accepted)) == ((), 0)


def test_a_stricter_or_neutral_number_is_a_note() -> None:
    before = baseline_of(judged_with(make_run(passing(PLAIN)), {SIGMAS: 3.0, "growth.rules.long": 1024.0}))
    run = judged_with(make_run(passing(PLAIN)), {SIGMAS: 2.0, "growth.rules.long": 2048.0}, "88bb")
    comparison = compare(run, before)
    assert exit_code(run, comparison) == 0
    assert comparison.notes == (f"bound stricter: {SIGMAS} 3 -> 2", "bound changed: growth.rules.long 1024 -> 2048")


def test_without_numbers_the_digest_has_to_do() -> None:
    """Records that are older than their numbers; and files that changed in words alone."""
    old = baseline_of(make_run(passing(PLAIN)))
    run = judged_with(make_run(passing(PLAIN)), {SIGMAS: 6.0}, "88bb")
    assert compare(run, old).notes == (
        "tolerances 77aa -> 88bb: ratios stand against different bounds, so drift may be the bound's",)
    same = baseline_of(judged_with(make_run(passing(PLAIN)), {SIGMAS: 6.0}))
    assert compare(run, same).notes == (
        "tolerances 77aa -> 88bb: no number changed, but a reason or a contract",)


def test_what_is_looser_comes_first_and_what_is_absent_is_said() -> None:
    changes = bound_changes({"a": 1.0, SIGMAS: 3.0, "checks.output.filters.ranks": 1.0}, {"b": 2.0, SIGMAS: 2.0})
    assert [(change.words, change.looser) for change in changes] == [
        ("checks.output.filters.ranks 1 -> absent", True), (f"{SIGMAS} 3 -> 2", False), ("a 1 -> absent", None),
        ("b absent -> 2", None)]


def test_a_path_of_a_foreign_record_stays_text() -> None:
    hostile = "<script>|`x`\n# @all"
    before = baseline_of(judged_with(make_run(passing(PLAIN)), {SIGMAS: 3.0, hostile: 1.0}))
    run = judged_with(make_run(passing(PLAIN)), {SIGMAS: 6.0})
    comparison = compare(run, before)
    text = summary(run, head_lines(run, comparison), comparison)
    assert "bound changed: &lt;script&gt;\\|\\`x\\` \\# &#64;all 1 -&gt; absent" in text
    assert "<script" not in text.partition("```\n")[2]


def test_effects_count_what_can_be_compared() -> None:
    before = baseline_of(make_run(passing(PLAIN, 0.0, "inf"), failing(TP2), passing(TP4, 0.5, 0.5)))
    run = judged_with(make_run(passing(PLAIN, 0.0, 0.5), passing(TP2), passing(TP4, 0.501, 0.6)), {SIGMAS: 6.0})
    found = compare(run, msgspec.structs.replace(before, tolerances={SIGMAS: 3.0})).effect
    assert found == Effect(compared=2, fell=0, rose=1, median=1.0)
    assert found.words == "none of 2 ratios fell"
    assert not math.isnan(found.median)


# --- hardware ---------------------------------------------------------------------------------


def test_another_hardware_class_is_refused_with_both_and_what_to_do() -> None:
    """Long sums are then judged by another model, so that ratios mean something else."""
    baseline = baseline_of(make_run(passing(PLAIN), hardware="sm90", device="NVIDIA H100"))
    run = make_run(passing(PLAIN), hardware="cuda", hardware_reason="no fingerprint", device="NVIDIA H100")
    with pytest.raises(UsageValueError, match=r"hardware class 'cuda' of run r1 cannot be compared with 'sm90' of the "
                                              r"baseline; .*'no fingerprint', then accept it"):
        compare(run, baseline)
    # Records that do not say are older; the device class above them was compared.
    assert compare(make_run(passing(PLAIN), device="NVIDIA H100"), baseline).notes == ()


# --- lost cases -------------------------------------------------------------------------------


def test_a_lost_lane_is_one_sentence() -> None:
    everything = [passing(case) for case in (*DRAWS, *TP8)]
    before = baseline_of(judged_with(make_run(*everything), {}, lane="cpu+gpu1"))
    run = judged_with(make_run(*everything[:6]), {}, lane="cpu")
    comparison = compare(run, before)
    verdict, first = said(run, comparison)
    assert "coverage -6 (lane gpu1 lost) +0" in verdict
    assert first == ("first nothing failed, but lane gpu1 lost: 6 cases of the baseline did not run (gone: not among "
                     "the chosen cases)")
    assert exit_code(run, comparison) == 1


def test_a_value_that_is_gone_explains_its_cases() -> None:
    before = baseline_of(make_run(*(passing(case) for case in (*DRAWS, *TP8, TP2))))
    run = make_run(*(passing(case) for case in DRAWS[1:]), *(idle(case, "not_run", "deadline") for case in TP8))
    comparison = compare(run, before)
    assert [(loss.name, loss.number) for loss in comparison.losses] == [("all 6 with tp 8", 6), ("", 2)]
    verdict, first = said(run, comparison)
    assert "coverage -8 (all 6 with tp 8) +0" in verdict
    assert first == ("first nothing failed, but 8 cases of the baseline did not run: all 6 with tp 8 (not_run: "
                     f"deadline), 2 cases, such as {DRAWS[0]} (gone: not among the chosen cases)")
    text = summary(run, head_lines(run, comparison), comparison)
    assert f"| all 6 with tp 8 | 6 | `{TP8[0]}` | not\\_run: deadline |" in text


def test_two_values_that_are_gone_together_explain_their_cases() -> None:
    """Neither fp32 nor tp 8 is gone, but both at once."""
    fp32 = [case.replace("bf16", "fp32") for case in DRAWS + TP8]
    everything = DRAWS + TP8 + fp32
    kept = [case for case in everything if not (case in fp32 and case.endswith("tp8"))]
    found = compare(make_run(*map(passing, kept)), baseline_of(make_run(*map(passing, everything)))).losses
    assert [loss.name for loss in found] == ["all 6 with dtype fp32 and tp 8"]


def test_ranks_that_are_gone_are_named_though_no_id_has_them() -> None:
    processes = [msgspec.structs.replace(passing(case), ranks="gloo") for case in (DRAWS[0], TP8[0])]
    before = baseline_of(make_run(*processes, *map(passing, DRAWS[1:] + TP8[1:])))
    comparison = compare(make_run(*map(passing, DRAWS[1:] + TP8[1:])), before)
    assert [loss.name for loss in comparison.losses] == ["all 2 with ranks gloo"]


def test_a_run_in_which_nothing_ran_has_lost_all() -> None:
    before = baseline_of(make_run(*map(passing, DRAWS)))
    run = make_run(*(idle(case, "not_run", "no CUDA device") for case in DRAWS))
    assert [loss.words for loss in compare(run, before).losses] == ["all 6 (not_run: no CUDA device)"]


def test_a_run_outside_of_lanes_has_lost_no_lane() -> None:
    before = baseline_of(judged_with(make_run(passing(PLAIN), passing(TP2), passing(TP4)), {}, lane="cpu"))
    assert [loss.name for loss in compare(make_run(passing(PLAIN), passing(TP2)), before).losses] == [""]


# --- drift and faults -------------------------------------------------------------------------


def test_drift_is_gathered_by_stage_with_what_its_cases_share() -> None:
    before = baseline_of(make_run(*map(passing, DRAWS + TP8)))
    run = make_run(*map(passing, DRAWS), *(passing(case, act=0.5 + number / 100) for number, case in enumerate(TP8)))
    comparison = compare(run, before)
    assert [(group.stage, group.number, group.traits) for group in comparison.drift_groups] == [
        ("act", 6, "all with tp 8 (6 of the 6 such that ran)")]
    verdict, first = said(run, comparison)
    assert verdict.startswith("PASS  ")
    assert first == ("first nothing failed; drift of 6: 6 in act, all with tp 8 (6 of the 6 such that ran); largest: "
                     f"act of {TP8[-1]} 0.25 -> 0.55 of its bound")
    # One alone needs no gathering.
    run = make_run(*map(passing, DRAWS + TP8[1:]), passing(TP8[0], act=0.5))
    alone = f"first nothing failed; drift: act of {TP8[0]} 0.25 -> 0.5 of its bound"
    assert said(run, compare(run, before))[1] == alone


def test_the_fault_that_explains_failures_is_named_first() -> None:
    """Faults that differ in the sizes of their cases are one."""
    def explained(case: str, columns: int, share: float) -> DiagnosisLine:
        return DiagnosisLine(fault=f"F13 last {columns} columns of K left out", share=share, next_share=0.1)
    larger = PLAIN.replace("H96", "H128")
    lines = [msgspec.structs.replace(failing(case), diagnosis=explained(case, columns, share))
             for case, columns, share in ((PLAIN, 32, 0.998), (larger, 64, 0.97))]
    first = head_lines(make_run(*lines, failing(TP2), passing(TP4)))[3]
    assert ("; 2 of 3 look like `F13 last 32 columns of K left out` (explains 97 %); smallest case: 41x its bound"
            in first)
    first = head_lines(make_run(lines[0], passing(TP4)))[3]
    assert "; looks like `F13 last 32 columns of K left out` (explains 100 %); 41x its bound" in first
    assert "like" not in head_lines(make_run(failing(PLAIN)))[3]
