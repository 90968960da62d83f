"""The score: a mutant is a patched copy, and what became of it is told apart: caught, missed, equivalent, not judged.

The catalogues here are small ones about the plain torch layer, one entry each, so that every outcome is known.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.score import SCORE_FILE, read_score
from moe_ref.report.score import complaints, totals
from moe_ref.score import trial
from moe_ref.score.criteria import refused
from moe_ref.score.load import load_catalogue
from moe_ref.score.messages import CaseToTry, Done, Job
from moe_ref.score.run import alike
from moe_ref.score.schema import Patch
from moe_ref.score.seed import package_root, seed
from tests.command_line import command
from tests.subjects.mistaken_scales import ScaleOfNextBlock
from tests.subjects.quantised import QuantisedMoE

CASE, WITHOUT = "v1-T33.H96.I160.E8.K2-bf16-norm-tp2", "v1-T33.H96.I160.E8.K2-bf16-norm"
SUBJECT = "tests.subjects.right:round_each_stage"
REDUCE = "        return call.groups.tp.all_reduce(merged_TH) if call.size > 1 else merged_TH"


def mutant(entry: str, new: str, old: str = REDUCE, **others: object) -> dict[str, object]:
    """A mutant of the plain layer's all-reduce."""
    return {"id": f"{entry}.seeded", "form": "twin", "subject": SUBJECT, "what": "a patch of the all-reduce",
            "patches": [{"file": "tests/subjects/base.py", "old": old, "new": new}],
            "carried_by": [CASE], "owner": ["mismatch reduced"], "silent_on": WITHOUT, **others}


def entry(name: str, **others: object) -> dict[str, object]:
    """An entry with all that must be said."""
    return {"id": name, "name": "made-up", "does": "something", "effect": "something", "trigger": "tp >= 2",
            "status": "made up", "sources": [], **others}


def write(folder: Path, entries: list[dict[str, object]], right: Sequence[dict[str, object]] = ()) -> Path:
    """A catalogue of class X; JSON is YAML."""
    folder.mkdir(exist_ok=True)
    (folder / "x.yaml").write_text(json.dumps({"letter": "X", "title": "made up", "entries": entries}))
    (folder / "right.yaml").write_text(json.dumps({"variants": list(right)}))
    return folder


SKIPPED = REDUCE.replace("call.groups.tp.all_reduce(merged_TH) if call.size > 1 else merged_TH", "merged_TH")
ENTRIES = [
    entry("X01", mutants=[mutant("X01", SKIPPED)]),
    # A patch that changes nothing survives: the score must say so, not call it caught.
    entry("X02", mutants=[mutant("X02", REDUCE + "  # harmless")]),
    entry("X03", mutants=[mutant("X03", REDUCE + "  # harmless", equivalent="a comment")]),
    # Deaths and hangs are verdicts, and the mutants after them are judged all the same.
    entry("X04", mutants=[mutant("X04", "        import os\n        return os._exit(3) if call.size > 1 else merged_TH",
                                 owner=["crash"])]),
    entry("X05", mutants=[mutant("X05", "        while call.size > 1:\n            pass\n        return merged_TH",
                                 owner=["hang"])]),
    entry("X06", unseeded="nothing to seed"),
    # Caught, but the check that was expected to is another one.
    entry("X07", mutants=[mutant("X07", SKIPPED, owner=["mismatch act"])]),
    # Active on the case that should not show it.
    entry("X08", mutants=[mutant("X08", "        return -merged_TH")]),
    entry("X09", mutants=[mutant("X09", SKIPPED, runs_on="gpu")]),
    # The right layer itself fails to import with this patch: not caught, but broken.
    entry("X10", mutants=[mutant("X10", "        return (")]),
]
RIGHT = [{"id": "right.plain", "subject": SUBJECT, "what": "the plain layer"},
         {"id": "right.not-so", "subject": SUBJECT, "what": "no all-reduce",
          "patches": [{"file": "tests/subjects/base.py", "old": REDUCE, "new": SKIPPED}]}]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory):
    """The record of one run of the small catalogue, and the exit code of the command."""
    folder = tmp_path_factory.mktemp("score")
    catalogue = write(folder / "catalogue", ENTRIES, RIGHT)
    with pytest.MonkeyPatch.context() as patch:
        # Two of the pinned cases say as much of the mechanism as all.
        pinned = [CaseToTry(CASE, "local"), CaseToTry(WITHOUT, "local")]
        patch.setattr("moe_ref.score.run.right_cases", lambda *_: pinned)
        code = command("score", "--catalogue", str(catalogue), "--record", str(folder), "--seconds", "10")
    run = read_score(folder / SCORE_FILE)
    assert run is not None
    return run, code, folder


@pytest.mark.parametrize(("name", "outcome", "said", "owned", "silent"), [
    ("X01", "caught", "mismatch reduced", True, True), ("X02", "missed", "", False, True),
    ("X03", "equivalent", "", False, None), ("X04", "caught", "crash", True, True),
    ("X05", "caught", "hang", True, True), ("X07", "caught", "mismatch reduced", False, True),
    ("X08", "caught", "mismatch reduced", True, False), ("X09", "not_runnable", "", False, None),
    ("X10", "broken", "", False, None)])
def test_every_outcome_is_told_apart(scored, name: str, outcome: str, said: str, owned: bool,
                                     silent: bool | None) -> None:
    found = scored[0].mutants[f"{name}.seeded"]
    assert (found.outcome, found.said, found.owned, found.silent) == (outcome, said, owned, silent), found


def test_a_wrong_layer_that_is_called_right_is_accused_and_the_right_one_is_not(scored) -> None:
    right = scored[0].right
    assert right["right.plain"].red == []
    assert (right["right.plain"].passed, right["right.plain"].executed) == (2, 2)
    assert [text.partition(":")[0] for text in right["right.not-so"].red] == [CASE]


def test_the_exit_code_and_the_complaints_name_all_that_is_wrong(scored) -> None:
    run, code, _ = scored
    assert code == 3  # X10 could not be judged
    words = "\n".join(complaints(run))
    for text in ("missed X02.seeded", "broken X10.seeded", "not by its owner X07.seeded", "not silent X08.seeded",
                 "accused right.not-so"):
        assert text in words
    assert "X01" not in words
    found = totals(run)
    assert (found["caught"], found["missed"], found["broken"], found["accused"]) == (5, 1, 1, 1)


def test_other_criteria_see_the_same_mutant_on_data_of_their_scale(scored) -> None:
    """A missing all-reduce is far off at any scale but where an absolute tolerance is larger than the output."""
    refused = scored[0].mutants["X01.seeded"].refused
    assert refused["deepgemm"]
    assert refused["triton_kernels"]
    assert not refused["sglang"]  # outputs of 1e-4 beside 1e-2 absolute
    assert scored[0].mutants["X04.seeded"].refused == {}  # a crash is no verdict of a criterion


def test_a_fault_of_that_comparison_is_no_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge's own crash would else be one of the subject's, which catches every mutant."""
    def lost(subject: object, case_id: str) -> dict[str, bool]:
        raise RuntimeError("lost")

    monkeypatch.setattr(trial, "refused", lost)
    sent: list[object] = []
    case = CaseToTry("v1-T1.H64.I96.E4.K2-fp32-norm", "local")
    trial.try_cases(Job(subject="tests.subjects.right:black_box", folder="", cases=[case], stop=False, criteria=1),
                    sent.append)
    assert sent == [Done(failed=f"criteria of other projects, {case.case}: RuntimeError: lost")]


@pytest.mark.parametrize("scheme", ["gptq32", "mxfp4", "nvfp4"])
def test_other_criteria_see_encoded_experts(scheme: str) -> None:
    """At their scale the codes stay as they are, and a wrong scale's address is seen by the tighter of them."""
    case = f"v1-T17.H160.I136.E6.K3-bf16-{scheme}-norm"
    right, wrong = (refused(SimpleNamespace(moe=one.moe, CAPABILITIES=one.CAPABILITIES), case)
                    for one in (QuantisedMoE(), ScaleOfNextBlock()))
    assert not right["triton_kernels"]
    assert wrong["triton_kernels"]


def test_nothing_is_said_of_rows_in_8_bits() -> None:
    one = QuantisedMoE()
    assert refused(SimpleNamespace(moe=one.moe, CAPABILITIES=one.CAPABILITIES),
                   "v1-T17.H160.I136.E6.K3-bf16-fp8row-norm") == {}


def test_a_run_goes_on_from_its_record(scored) -> None:
    """With one line torn by a kill and another one lost, those two subjects alone are judged again."""
    run, code, folder = scored
    path = folder / SCORE_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    lost = [line for line in lines if b'"X01.seeded"' in line or b'"X02.seeded"' in line]
    kept = [line for line in lines if line not in lost]
    path.write_bytes(b"".join(kept) + lost[0][:40])
    assert command("score", "--catalogue", str(folder / "catalogue"), "--record", str(folder)) == code
    again = path.read_bytes().splitlines(keepends=True)
    assert again[:len(kept)] == kept
    assert len(again) == len(lines)
    found = read_score(path)
    assert found is not None
    assert found.mutants.keys() == run.mutants.keys()


def test_a_record_of_other_sources_is_refused(scored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue = write(tmp_path / "other", ENTRIES[:1])
    (tmp_path / SCORE_FILE).write_bytes((scored[2] / SCORE_FILE).read_bytes())
    assert command("score", "--catalogue", str(catalogue), "--record", str(tmp_path)) == 2
    assert "begin another folder" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "words"), [
    ({"id": "Y01"}, "lies in class X"), ({"mutants": []}, "needs mutants, or a reason why"),
    ({"mutants": [mutant("X01", "", owner=["mismatch nowhere"])]}, "should be a verdict or"),
    ({"mutants": [mutant("X01", "", carried_by=[])]}, "needs carried_by and owner"),
    ({"mutants": [mutant("X01", "", silent_on="")]}, "needs silent_on, or `always`"),
    ({"mutants": [mutant("X02", "")]}, "should begin with X01."),
    ({"colour": "red"}, "unknown field `colour`")])
def test_a_catalogue_is_read_strictly(change: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageValueError, match=words):
        load_catalogue(write(tmp_path, [entry("X01", mutants=[mutant("X01", SKIPPED)]) | change]))


def test_yaml_is_data_only(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("letter: X\ntitle: !!python/object/apply:os.system ['true']\nentries: []\n")
    with pytest.raises(UsageValueError, match=r"x\.yaml"):
        load_catalogue(tmp_path)


@pytest.mark.parametrize(("file", "words"), [
    ("moe_ref/verify/judge.py", "never the judge"), ("../moe_fast/layer.py", "should be package"),
    ("/etc/passwd.py", "should be package"), ("no_such_package/x.py", "is not there"),
    ("moe_fast", "should be package")])
def test_only_what_is_judged_can_be_patched(file: str, words: str) -> None:
    with pytest.raises(UsageValueError, match=words):
        package_root(file)


def test_a_stale_patch_says_so(tmp_path: Path) -> None:
    """Whoever edits a seam learns of the mutants that stand on it."""
    with pytest.raises(UsageValueError, match="0 times, but should be once"):
        seed([Patch(file="moe_fast/layer.py", old="no such line", new="")], tmp_path)


@pytest.mark.nightly("the command of docs/score.md runs by default")
def test_a_seeded_copy_can_be_verified_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that `--seed` prints, from its own folder."""
    catalogue, copy = write(tmp_path / "catalogue", ENTRIES[:1]), tmp_path / "copy"
    assert command("score", "--catalogue", str(catalogue), "--only", "X01*", "--seed", str(copy)) == 0
    assert f"cd {copy} && moe-ref verify {SUBJECT} --case {CASE}" in capsys.readouterr().out
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-m", "moe_ref", "verify", SUBJECT, "--case", CASE], cwd=copy,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 1, done.stderr
    assert "reduced" in done.stdout


def test_what_a_deadline_leaves_is_no_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is begun by the next call on the same record; here of the one mutant that needs a GPU."""
    catalogue = write(tmp_path / "catalogue", [ENTRIES[0], ENTRIES[8]])
    arguments = ["score", "--catalogue", str(catalogue), "--gpu-only", "--record", str(tmp_path), "--lanes", "1"]
    assert command(*arguments, "--deadline", "-1") == 4
    assert "CUT SHORT: 1 subjects not begun" in capsys.readouterr().out
    assert command(*arguments) == 0
    found = read_score(tmp_path / SCORE_FILE)
    assert found is not None
    assert {name: one.outcome for name, one in found.mutants.items()} == {"X09.seeded": "not_runnable"}


def test_on_cuda_process_ranks_have_a_process_that_never_used_it() -> None:
    """What has begun CUDA cannot be forked, and virtual ranks begin it."""
    cases = [CaseToTry("a", "local"), CaseToTry("b", "local"), CaseToTry("c", "gloo"), CaseToTry("d", "local")]
    assert alike(cases, "cpu") == cases
    assert [[one.case for one in alike(cases[start:], "cuda")] for start in (0, 2, 3)] == [["a", "b"], ["c"], ["d"]]
