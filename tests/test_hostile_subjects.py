"""Implementations that break what is around them cost their own verdict only: the case after each of them passes."""

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Ranks, Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import read_run
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.child.changed import precedes
from moe_ref.verify.run.run import Plan, run_plan
from tests.subjects.hostile import AT_THE_END, RIGHT_TOKENS, TOKENS

LOCAL, GLOO = Ranks.LOCAL, Ranks.GLOO
IMPLEMENTATION = "tests.subjects.hostile:hostile"
End = tuple[str, Ranks]

NO_PLAIN = "but should be a real dense tensor"
CHANGED = "which must not change"
UNREADABLE = "may not be imported or read by an implementation under test"
NO_ANSWER = "child wrote what is no answer into the pipe of the harness"

# Implementation and ranks: verdict; words in the message, or after "left " what the record says was left behind.
ENDS: dict[End, tuple[Verdict, str]] = {
    ("edits_x", LOCAL): (Verdict.STRUCT, f"changed its inputs x_TH, {CHANGED}"),
    ("edits_x", GLOO): (Verdict.STRUCT, f"changed its inputs x_TH, {CHANGED}"),
    ("edits_and_restores_x", LOCAL): (Verdict.STRUCT, f"changed its inputs x_TH (for a time), {CHANGED}"),
    ("edits_weights", LOCAL): (Verdict.STRUCT, f"changed its inputs w2_EHI, {CHANGED}"),
    ("edits_residual", LOCAL): (Verdict.STRUCT, f"changed its inputs residual_TH, {CHANGED}"),
    ("edits_logits", LOCAL): (Verdict.STRUCT, f"changed its inputs logits_TE, {CHANGED}"),
    ("edits_routing", LOCAL): (Verdict.STRUCT, f"changed its inputs weights_TK, {CHANGED}"),
    ("writes_before_x", LOCAL): (Verdict.STRUCT, "x_TH (memory beside it)"),
    ("writes_behind_x", LOCAL): (Verdict.STRUCT, "x_TH (memory beside it)"),
    ("writes_behind_x", GLOO): (Verdict.STRUCT, "x_TH (memory beside it)"),
    ("reads_behind_x", LOCAL): (Verdict.MISMATCH, "reduced: infinitely over bound"),
    ("returns_x", LOCAL): (Verdict.MISMATCH, "reduced: "),
    ("returns_a_view_of_x", LOCAL): (Verdict.MISMATCH, "reduced: "),
    ("returns_a_view_of_weights", LOCAL): (Verdict.MISMATCH, "reduced: "),
    ("returns_one_buffer", LOCAL): (Verdict.PASS, ""),
    ("returns_one_buffer", GLOO): (Verdict.PASS, ""),
    ("returns_sparse", LOCAL): (Verdict.STRUCT, NO_PLAIN),
    ("returns_complex", LOCAL): (Verdict.STRUCT, NO_PLAIN),
    ("returns_nested", LOCAL): (Verdict.STRUCT, NO_PLAIN),
    ("returns_quantised", LOCAL): (Verdict.STRUCT, NO_PLAIN),
    ("returns_a_subclass", LOCAL): (Verdict.STRUCT, "output: OwnTensor, but should be a torch.Tensor"),
    ("returns_with_gradient", LOCAL): (Verdict.PASS, ""),
    ("leaves_a_row_unwritten", LOCAL): (Verdict.MISMATCH, "1 of {tokens} tokens"),
    ("keeps_by_shape", LOCAL): (Verdict.MISMATCH, "reduced: "),
    ("keeps_by_address", LOCAL): (Verdict.MISMATCH, "reduced: "),
    ("keeps_by_address", GLOO): (Verdict.MISMATCH, "reduced: "),
    ("right_once", LOCAL): (Verdict.MISMATCH, "different bits"),
    ("wrong_once", LOCAL): (Verdict.MISMATCH, "different bits"),
    ("differs_between_ranks", LOCAL): (Verdict.MISMATCH, "reduced: "),
    ("searches_for_truth", LOCAL): (Verdict.MISMATCH, "got 0.0"),
    ("shows_a_huge_tensor", LOCAL): (Verdict.STRUCT, "act: 1099511627776 elements"),
    ("shows_other_names", LOCAL): (Verdict.STRUCT, "but should hold stages only"),
    ("shows_no_tensor", LOCAL): (Verdict.STRUCT, "act: list, but should be a torch.Tensor"),
    ("shows_nan_ids", LOCAL): (Verdict.STRUCT, "ids: dtype torch.float32, but should be an integer type"),
    ("shows_negative_ids", LOCAL): (Verdict.MISMATCH, "ids: "),
    ("shows_huge_ids", LOCAL): (Verdict.MISMATCH, "ids: "),
    ("shows_bool_ids", LOCAL): (Verdict.STRUCT, "ids: dtype torch.bool, but should be an integer type"),
    ("shows_less_than_declared", LOCAL): (Verdict.STRUCT, "does not show act, but should, as declared"),
    ("shows_undeclared_format", LOCAL): (Verdict.STRUCT, "act: dtype torch.float64, but should be torch.bfloat16"),
    ("replaces_functions", LOCAL): (Verdict.PASS, "left torch.equal"),
    ("replaces_functions", GLOO): (Verdict.PASS, "left torch.equal"),
    ("changes_defaults", LOCAL): (Verdict.PASS, "left the default dtype"),
    ("changes_defaults", GLOO): (Verdict.PASS, "left the default dtype"),
    ("replaces_the_guard", LOCAL): (Verdict.STRUCT, "replaced moe_ref.verify.child.guard.fingerprint, but the harness"),
    ("replaces_the_guard", GLOO): (Verdict.STRUCT, "replaced moe_ref.verify.child.guard.fingerprint, but the harness"),
    ("replaces_the_trace", LOCAL): (Verdict.STRUCT, "replaced Trace.record, but the harness"),
    ("imports_past_the_finders", LOCAL): (Verdict.CRASH, f"moe_ref.oracle {UNREADABLE}"),
    ("imports_past_the_finders", GLOO): (Verdict.CRASH, f"moe_ref.oracle {UNREADABLE}"),
    ("reads_the_judge", LOCAL): (Verdict.CRASH, f"moe_ref.verify.judge {UNREADABLE}"),
    ("closes_streams", LOCAL): (Verdict.PASS, "left the standard streams"),
    ("closes_streams", GLOO): (Verdict.PASS, "left the standard streams"),
    ("writes_garbage_frames", LOCAL): (Verdict.CRASH, NO_ANSWER),
    ("forges_an_answer", LOCAL): (Verdict.CRASH, f"{NO_ANSWER}: it answers another request"),
    ("closes_pipes", LOCAL): (Verdict.CRASH, "child"),
    ("reads_requests", LOCAL): (Verdict.PASS, ""),
    ("starts_threads", LOCAL): (Verdict.PASS, ""),
    ("leaves_a_process", LOCAL): (Verdict.PASS, ""),
    ("leaves_a_program", LOCAL): (Verdict.PASS, ""),
    ("leaves_a_process_and_dies", LOCAL): (Verdict.CRASH, "child was killed by SIGKILL"),
    ("comes_back_twice", LOCAL): (Verdict.PASS, ""),
    ("comes_back_twice", GLOO): (Verdict.PASS, ""),
    ("prints_without_end", LOCAL): (Verdict.PASS, ""),
    ("hangs_at_its_end", LOCAL): (Verdict.PASS, ""),
    ("spoils_the_record", LOCAL): (Verdict.PASS, ""),
    ("recurses", LOCAL): (Verdict.CRASH, "RecursionError: maximum recursion depth exceeded"),
    ("raises_what_cannot_be_said", LOCAL): (Verdict.CRASH, "_Silent: no message: its __str__ raised ValueError"),
    ("raises_what_cannot_be_said", GLOO): (Verdict.CRASH, "_Silent: no message: its __str__ raised ValueError"),
    ("raises_a_long_message", LOCAL): (Verdict.CRASH, "ValueError: long long long"),
    ("raises_what_cannot_be_written", LOCAL): (Verdict.CRASH, "ValueError: half a pair ?"),
    ("raises_interrupt", LOCAL): (Verdict.CRASH, "KeyboardInterrupt"),
    ("raises_group", LOCAL): (Verdict.CRASH, "BaseExceptionGroup: two"),
    ("aborts", LOCAL): (Verdict.CRASH, "child was killed by SIGABRT"),
    ("aborts", GLOO): (Verdict.CRASH, "rank 1 was killed by SIGABRT; ranks [0, 2] wait in all_reduce"),
    ("takes_a_nameless_signal", LOCAL): (Verdict.CRASH, "child was killed by signal"),
    ("ignores_signals_and_sleeps", LOCAL): (Verdict.HANG, "no stack could be dumped"),
    ("locks_the_interpreter", LOCAL): (Verdict.HANG, "in _sleep_with_the_interpreter_locked"),
    ("stops_itself", LOCAL): (Verdict.HANG, "its process is stopped, as by SIGSTOP"),
    ("stops_itself", GLOO): (Verdict.HANG, "rank 1 of 3 did not answer"),
}
WORDS = {"edits_residual": "-res", "edits_logits": "-zipf", "edits_routing": "-exact"}
"""Of the case: what else a call is handed."""

TWICE = ("keeps_by_shape", "keeps_by_address")
"""Right, unless a case of the same shape came before."""

COUNTED = ("right_once", "wrong_once", *AT_THE_END)
"""The call with other inputs, which comes first in half of all cases, must not be the first or second of its shape."""

HANGS = [end for end, (verdict, _) in ENDS.items() if verdict is Verdict.HANG]


def _case(tokens: int, seed: int, ranks: Ranks, words: str = "") -> PlannedCase:
    text = f"v1-T{tokens}.H32.I48.E4.K2-bf16-norm{words}-s{seed}-tp3"
    return PlannedCase(case=parse_case(text), purpose="hostile", ranks=ranks)


def _planned(ends: list[End]) -> dict[str, list[PlannedCase]]:
    """By name of behaviour and ranks: its cases, the last of which counts, and then one that should pass."""
    planned, seeds = {}, count(1)
    for name, ranks in ends:
        cases: list[PlannedCase] = []
        while len(cases) < 1 + (name in TWICE):
            case = _case(TOKENS[name], next(seeds), ranks, WORDS.get(name, ""))
            if name not in COUNTED or precedes(case.case_id, 2) == 1:
                cases.append(case)
        planned[f"{name} {ranks}"] = [*cases, _case(RIGHT_TOKENS, next(seeds), ranks)]
    return planned


def _run(ends: list[End], record: Path, time_limit: float) -> dict[End, list[CaseLine]]:
    """Lines of the cases of each behaviour, from a run that was put on record."""
    planned = _planned(ends)
    cases = [case for one in planned.values() for case in one]
    run_plan(Plan(implementation=IMPLEMENTATION, cases=cases, tier="", minimum_executed=1, lanes=1, record=record,
                  time_limit=time_limit))
    run = read_run(record)
    assert run.end is not None
    assert list(run.header.cases) == [one.case_id for one in cases]
    return {end: [run.cases[case.case_id] for case in one] for end, one in zip(ends, planned.values(), strict=True)}


def _hang(folder: Path) -> dict[End, list[CaseLine]]:
    """Each in a run of its own, side by side, since all that they do is wait for the limit."""
    load_tolerances()  # msgspec must not learn a type from two threads at once
    with ThreadPoolExecutor(len(HANGS)) as threads:
        found = threads.map(lambda end: _run([end], folder / f"{end[0]}-{end[1]}", 8.0), HANGS)
        return {end: lines for one in found for end, lines in one.items()}


GLOO_TOO = pytest.mark.nightly("the same behaviours on virtual ranks run by default")
RUNS = {"local": [end for end in ENDS if end not in HANGS and end[1] is LOCAL],
        "gloo": [end for end in ENDS if end not in HANGS and end[1] is GLOO]}


@pytest.mark.parametrize("kind", ["local", pytest.param("gloo", marks=GLOO_TOO), "hangs"])
def test_hostile_subjects_get_their_verdicts_and_the_cases_after_them_pass(
        kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In runs whose records are whole, one for all that need no limit of their own; nothing started outlives them."""
    monkeypatch.setenv(MARKER, str(tmp_path))
    wrong = []
    for (name, ranks), lines in (_hang(tmp_path) if kind == "hangs" else _run(RUNS[kind], tmp_path, 120.0)).items():
        (verdict, words), (*_, line, after) = ENDS[name, ranks], lines
        where = line.guard.get("left behind", "") if words.startswith("left ") else line.message
        if (line.verdict != verdict or words.removeprefix("left ").replace("{tokens}", str(TOKENS[name])) not in where
                or len(line.message) > 3000):
            wrong.append(f"{name}, {ranks}: should be {verdict}, {words!r}, but is {line.message}")
        if after.verdict != Verdict.PASS:
            wrong.append(f"after {name}, {ranks}: {after.message}")
    assert wrong == []
    assert [folder.name for folder in Path("/proc").glob("[0-9]*") if _is_marked(folder, tmp_path)] == []


def test_a_right_layer_has_its_own_ways() -> None:
    """What it replaces when it is loaded, or for a while, is nothing left behind, and is there whenever it looks."""
    cases = [_case(RIGHT_TOKENS, seed, LOCAL if seed < 3 else GLOO) for seed in range(1, 5)]
    plan = Plan(implementation="tests.subjects.own_ways:own_ways", cases=cases, tier="", minimum_executed=1, lanes=1)
    for line in run_plan(plan).lines:
        assert (line.verdict, line.guard.get("left behind")) == (Verdict.PASS, None), line.message


MARKER = "MOE_REF_TEST_HOSTILE"


def _is_marked(folder: Path, mark: Path) -> bool:
    """Whether a process was started by that run, or by one that was."""
    try:
        return f"{MARKER}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
