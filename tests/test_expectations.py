"""Protects expectations: an entry excuses the failure that it names until its last day, and nothing else."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.expectations.load import Expectations, load_expectations
from moe_ref.expectations.schema import KnownFailure
from moe_ref.expectations.stale import stale_entries
from moe_ref.records.schema import StageResult
from moe_ref.tiers.tiers import tier
from moe_ref.verify.expected import excused, speaks_for_all
from moe_ref.verify.judge import Judgement

CASE, TODAY = "v1-T5.H16.I24.E4.K2-fp32", date(2026, 12, 1)
WRITTEN = """\
schema: 1
implementation: mypkg.layer
entries:
  - cases: "v1-T5.*-fp32*"
    verdict: mismatch
    stage: act
    reason: halves
    link: 12
    expires: 2026-12-01
    owner: numerics
  - cases: v1-T5.H16.I24.E4.K2-fp32
    verdict: crash
    contains: out of memory
    reason: a workspace of every expert
    link: https://tracker.example/13
    expires: 2026-12-01
"""


# --- the file -----------------------------------------------------------------------------------


def write(folder: Path, *changes: tuple[str, str], text: str = WRITTEN) -> Path:
    """The file with the first of each old text replaced, in a folder."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "expectations.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, implementation: str = "mypkg.layer", today: date = TODAY) -> str:
    """What the error says."""
    with pytest.raises(UsageValueError) as caught:
        load_expectations(path, implementation, today)
    return str(caught.value)


def test_a_file_is_read(tmp_path: Path) -> None:
    """A verdict that is left out is a mismatch; the digest is that of the content, comments included."""
    path = write(tmp_path)
    read = load_expectations(path, "mypkg.layer", TODAY)
    first, second = read.entries
    assert (first.verdict, first.stage, first.link, first.expires, first.owner) == (
        Verdict.MISMATCH, Stage.ACT, 12, TODAY, "numerics")
    assert (second.verdict, second.stage, second.contains, second.owner) == (
        Verdict.CRASH, None, "out of memory", None)
    path = write(tmp_path, ("    verdict: mismatch\n", ""))
    again = load_expectations(path, "mypkg.layer", TODAY)
    assert again.entries == read.entries
    assert again.digest != read.digest


def test_what_an_entry_says_in_a_record(tmp_path: Path) -> None:
    first, second = load_expectations(write(tmp_path), "mypkg.layer", TODAY).entries
    assert first.words == "issue 12, mismatch at act expected until 2026-12-01: halves (numerics)"
    assert second.words == ("https://tracker.example/13, crash expected until 2026-12-01: a workspace of every expert")


@pytest.mark.parametrize(("old", "new", "line", "words"), [
    ("schema: 1\n", "schema: 2\n", 1, "schema: Invalid enum value 2"),
    ("schema: 1\n", "", 1, "the file: schema is missing"),
    ("implementation: mypkg.layer\n", "", 1, "the file: implementation is missing"),
    ("schema: 1\n", "schema: 1\nwaivers: []\n", 2, "waivers: unknown key, but should be one of schema, implementation"),
    ("    link: 12\n", "    link: 12\n    issue: 12\n", 9, "entries[0].issue: unknown key, but should be one of cases"),
    ("    link: 12\n", "    link: 12\n    link: 13\n", 9, "entries[0].link: duplicate key, first on line 8"),
    ('  - cases: "v1-T5.*-fp32*"\n    verdict', "  - verdict", 4, "entries[0]: cases is missing"),
    ("    reason: halves\n", "", 4, "entries[0]: reason is missing"),
    ("    link: 12\n", "", 4, "entries[0]: link is missing"),
    ("    expires: 2026-12-01\n", "", 4, "entries[0]: expires is missing"),
    ("    stage: act\n", "", 4, "entries[0]: stage is missing, but a mismatch should name the stage where it starts"),
    ("    contains: out of memory\n", "    stage: act\n", 11,
     "entries[1]: stage is given, but a crash starts in none; contains tells it from others"),
    ("    stage: act\n", "    stage: act\n    contains: act\n", 4,
     "entries[0]: contains is given, but a mismatch is told by its stage"),
    ("stage: act", "stage: acts", 6, "entries[0].stage: Invalid enum value 'acts'"),
    ("verdict: crash", "verdict: harness_error", 12, "entries[1].verdict: Invalid enum value 'harness_error'"),
    ('cases: "v1-T5.*-fp32*"', 'cases: ""', 4, "entries[0].cases: Expected `str` of length >= 1"),
    ("cases: v1-T5.H16.I24.E4.K2-fp32", "cases: v1-T5.H16.I24.E4.K2-tp2", 11, "entries[1]: case id 'v1-T5"),
    ("cases: v1-T5.H16.I24.E4.K2-fp32", "cases: v1-T5.H16.I24.E4.K2-fp32-tp1", 11, "entries[1]: "),
    ("reason: halves", 'reason: ""', 7, "entries[0].reason: Expected `str` of length >= 1"),
    ("reason: halves", "reason: ' '", 4, "entries[0]: reason is ' ', but should say why the cases fail"),
    ("reason: halves", "reason: '...'", 4, "entries[0]: reason is '...', but should say why the cases fail"),
    ("reason: halves", "reason: 7", 7, "entries[0].reason: Expected `str`, got `int`"),
    ("owner: numerics", "owner: [numerics]", 10, "entries[0].owner: Expected `str | null`"),
    ("link: 12", "link: soon", 8, "entries[0].link: Expected `str` matching regex"),
    ("link: 12", "link: 0", 8, "entries[0].link: Expected `int` >= 1"),
    ("2026-12-01", "2026-02-30", 9, "entries[0].expires: '2026-02-30' has no value"),
    ("2026-12-01", "never", 9, "entries[0].expires: Invalid RFC3339 encoded date"),
    ("entries:\n", "entries: none\nothers:\n", 3, "entries: Expected `array`, got `str`"),
    ("schema: 1\n", "schema: !!python/object/apply:os.getcwd []\n", 1, "schema: tag"),
])
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    """An excuse without a reason, a link or an end is none; the message has file, line and what is wrong there."""
    path = write(tmp_path, (old, new))
    assert any(one.startswith(f"{path}:{line}: {words}") for one in refusal(path).split("\n")), refusal(path)


def test_an_expired_entry_is_an_error(tmp_path: Path) -> None:
    """It counts on its last day; the day after it each that expired is named with what to do."""
    path = write(tmp_path, ("2026-12-01", "2027-01-31"))
    assert len(load_expectations(path, "mypkg.layer", TODAY).entries) == 2
    assert refusal(path, today=date(2026, 12, 2)) == (
        f"{path}:11: entries[1]: v1-T5.H16.I24.E4.K2-fp32 expired on 2026-12-01, and it is 2026-12-02; "
        "remove the entry, or look again and give a later day")


def test_another_implementation_has_another_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert refusal(path, "moe_fast") == (
        f"{path}:2: implementation: mypkg.layer, but moe_fast is verified; "
        "each implementation should have a file of its own")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """As wrong use, not as a traceback."""
    assert "nowhere.yaml" in refusal(tmp_path / "nowhere.yaml")


# --- what an entry covers and excuses -----------------------------------------------------------


ACT = KnownFailure(cases="v1-T5.*-fp32*", stage=Stage.ACT, reason="halves", link=12, expires=TODAY)
CRASH = KnownFailure(cases="*", verdict="crash", contains="of memory", reason="large", link=13, expires=TODAY)
MISMATCH = Judgement(Verdict.MISMATCH, "act: 3x over bound", Stage.ACT)


@pytest.mark.parametrize(("case_id", "covered"), [
    (CASE, True), (CASE + "-tp2", True), ("v1-T55.H16.I24.E4.K2-fp32", False), ("v1-T5.H16.I24.E4.K2-bf16", False),
])
def test_cases_are_covered_by_pattern(case_id: str, covered: bool) -> None:
    assert ACT.covers(case_id) is covered
    assert Expectations((CRASH, ACT)).covering(case_id) == ((CRASH, ACT) if covered else (CRASH,))


def test_brackets_mean_themselves() -> None:
    """fnmatch would take them for a choice of letters."""
    assert not for_act("v1-T[5].*").covers(CASE)
    assert for_act("v1-T?.*").covers(CASE)


def for_act(cases: str) -> KnownFailure:
    """The first entry for other cases."""
    return KnownFailure(cases=cases, stage=Stage.ACT, reason="halves", link=12, expires=TODAY)


def result(stage: Stage, ratio: float) -> StageResult:
    """The numbers of one stage."""
    return StageResult(stage=stage, ratio=ratio, num_checked=1, num_bad=int(ratio > 1))


@pytest.mark.parametrize(("stages", "verdict"), [
    ((result(Stage.ACT, 3.0), result(Stage.DOWN, 0.5)), Verdict.KNOWN_FAILURE),
    # The output and gradients fail with what comes before them.
    ((result(Stage.ACT, 3.0), result(Stage.OUTPUT, 3.0), result(Stage.GRAD_X, 3.0)), Verdict.KNOWN_FAILURE),
    # down is judged from the subject's own activations: a failure there is another one.
    ((result(Stage.ACT, 3.0), result(Stage.DOWN, 1.1)), Verdict.MISMATCH),
], ids=["act alone", "what follows", "a second failure"])
def test_only_what_is_expected_is_excused(stages: tuple[StageResult, ...], verdict: Verdict) -> None:
    """A second failure behind a known one stays red."""
    assert excused(MISMATCH, (ACT,), stages).verdict is verdict


def test_two_entries_excuse_two_stages() -> None:
    """Each of which fails on its own; the first in data order is what the record names."""
    down = KnownFailure(cases="*", stage=Stage.DOWN, reason="another", link=14, expires=TODAY)
    found = excused(MISMATCH, (down, ACT), (result(Stage.ACT, 3.0), result(Stage.DOWN, 1.1)))
    assert found.verdict is Verdict.KNOWN_FAILURE
    assert found.reason == f"{ACT.words}\nact: 3x over bound"


@pytest.mark.parametrize("verdict", [one for one in Verdict if one is not Verdict.MISMATCH])
def test_an_entry_for_a_mismatch_excuses_mismatches_only(verdict: Verdict) -> None:
    """A crash, a hang or a layer of the wrong shape is never what was attributed to rounding."""
    judgement = Judgement(verdict, "another", Stage.ACT)
    assert excused(judgement, (ACT,)) == judgement


def test_a_failure_elsewhere_is_not_excused() -> None:
    """The entry is for act."""
    judgement = replace(MISMATCH, first_stage=Stage.DOWN)
    assert excused(judgement, (ACT,), (result(Stage.DOWN, 3.0),)) == judgement


OTHERS = (Verdict.CRASH, Verdict.STRUCT, Verdict.HANG, Verdict.NONDETERMINISTIC)


@pytest.mark.parametrize("expected", OTHERS)
@pytest.mark.parametrize("found", list(Verdict))
def test_other_verdicts_are_excused_by_their_own_entries(expected: Verdict, found: Verdict) -> None:
    """A harness error and what did not run are nobody's failure."""
    entry = KnownFailure(cases="*", verdict=str(expected), reason="known", link=1, expires=TODAY)  # type: ignore
    judgement = Judgement(found, "words", Stage.REDUCED if found is Verdict.STRUCT else None)
    known = replace(judgement, verdict=Verdict.KNOWN_FAILURE, reason=f"{entry.words}\nwords")
    assert excused(judgement, (entry,)) == (known if found is expected else judgement)


def test_another_crash_is_not_excused() -> None:
    """By what its reason contains, anywhere in it."""
    known, other = (Judgement(Verdict.CRASH, f"RuntimeError: {words} [on rank 0]")
                    for words in ("CUDA out of memory", "index out of range"))
    assert excused(known, (CRASH,)).verdict is Verdict.KNOWN_FAILURE
    assert excused(other, (CRASH,)) == other


PASS, KNOWN = Judgement(Verdict.PASS), replace(MISMATCH, verdict=Verdict.KNOWN_FAILURE)


@pytest.mark.parametrize(("judgements", "index", "verdict"), [
    ([PASS, PASS], 0, Verdict.UNEXPECTED_PASS), ([PASS, KNOWN], 1, Verdict.KNOWN_FAILURE),
    ([KNOWN, MISMATCH], 1, Verdict.MISMATCH), ([PASS, MISMATCH], 1, Verdict.MISMATCH),
    ([Judgement(Verdict.NOT_RUN)] * 2, 0, Verdict.NOT_RUN),
    ([Judgement(Verdict.NONDETERMINISTIC), MISMATCH], 1, Verdict.MISMATCH),
    ([KNOWN, Judgement(Verdict.NONDETERMINISTIC)], 1, Verdict.NONDETERMINISTIC),
], ids=["all pass", "one known", "known, then new", "new", "not run", "other bits, then wrong", "other bits"])
def test_the_worst_run_speaks(judgements: list[Judgement], index: int, verdict: Verdict) -> None:
    """Runs that differ are all judged; only where every one passes is the entry no longer true."""
    spoken, judgement = speaks_for_all(judgements, (ACT,))
    assert (spoken, judgement.verdict) == (index, verdict)


def test_a_pass_without_an_entry_is_a_pass() -> None:
    """Nothing was expected to fail."""
    assert speaks_for_all([PASS], ()) == (0, PASS)


# --- stale entries --------------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "words"), [
    ({CASE: ("known_failure", 2)}, ""), ({CASE: ("unexpected_pass", 2)}, ""), ({CASE: ("crash", 0)}, ""),
    ({CASE: ("unsupported", 0), CASE + "-tp2": ("known_failure", 2)}, ""),
    ({CASE: ("unsupported", 0)}, ": 1 unsupported"),
    ({CASE: ("unsupported", 0), CASE + "-tp2": ("not_run", 2)}, ": 2 not_run or unsupported"),
    # For want of a device or of time; elsewhere it may fail.
    ({CASE: ("not_run", 0)}, ""), ({CASE: ("harness_error", 0)}, ""),
])
def test_an_entry_that_covers_no_case_that_ran_is_stale(found: dict[str, tuple[str, int]], words: str) -> None:
    sentence = (f"stale: entry 1 (cases v1-T5.*-fp32*) covers no case that ran{words.removeprefix('no case')}; "
                "remove it, or mend its cases")
    assert stale_entries([ACT.cases], found) == ([sentence] if words else [])


def test_an_entry_for_another_tier_is_not_stale() -> None:
    """One file serves all tiers; what is in none of them is stale in each."""
    quick = next(one.case_id for one in tier("quick").cases if one.case_id not in
                 {one.case_id for one in tier("smoke").cases})
    assert stale_entries([quick], {CASE: ("pass", 2)}) == []
    [sentence] = stale_entries([quick, "v1-*-tp99*"], {CASE: ("pass", 2)})
    assert sentence == "stale: entry 2 (cases v1-*-tp99*) covers no case that ran; remove it, or mend its cases"
