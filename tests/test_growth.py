"""Protects classes of error growth, their bands and baselines, and `moe-ref diverge` from command to picture."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner, Result

from moe_ref.cli.main import cli
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.bands import band_faults, find_band
from moe_ref.diverge.grouped import NotRun, torch_loop
from moe_ref.diverge.growth import GrowthClass, exponent, growth
from moe_ref.diverge.measure import Point
from moe_ref.records.growth import read_growth
from moe_ref.records.store import FILE_NAME, read_run
from moe_ref.report.growth_plot import plot_growth

SHORT = ("--k", "64,256,1024,2048", "--m", "16", "--n", "16", "--experts", "2")


@cache
def study() -> ModuleType:
    """The script as a module."""
    path = Path(__file__).resolve().parents[1] / "ci" / "growth_study.py"
    spec = importlib.util.spec_from_file_location("growth_study", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["growth_study"] = module
    spec.loader.exec_module(module)
    return module


def names() -> list[tuple[str, Format, GrowthClass]]:
    """Every accumulator of the study with its data's format and what it is."""
    return [(name, dtype, kind) for kind, pairs in study().ACCUMULATORS.items() for name, dtype in pairs]


@pytest.mark.sampled(every=2, each="name")
@pytest.mark.parametrize(("name", "dtype", "kind"), names())
@pytest.mark.parametrize("seed", [1000, 1001])
def test_every_accumulator_is_told_by_its_errors(name: str, dtype: Format, kind: GrowthClass, seed: int) -> None:
    """Two seeds that the study of 200 does not use; the class comes from outputs alone."""
    assert study().law(name, dtype, seed).growth_class is kind


def points(level: float, slope: float, share: float = 0.0, resolved: bool = True, spread: float = 1.0) -> list[Point]:
    """A curve of that many bits at K = 1024 and that exponent; spread: root of summed squares over value."""
    one_bit = {terms: terms**0.5 for terms in (64, 256, 1024, 4096, 16384)}
    errors = {terms: 32 * 2.0**-level * (terms / 1024) ** slope for terms in one_bit}
    return [Point(terms=terms, relative=errors[terms], bits=math.log2(one_bit[terms] / errors[terms]),
                  resolved=resolved, ratio=0.1, z=1.0, share=share, flips=0, flips_expected=0.0, one_bit=one_bit[terms],
                  predicted=errors[terms], spread=spread) for terms in one_bit]


def test_exponents_are_least_squares() -> None:
    """Of a power law the exponent is the power; one point has none."""
    assert exponent(points(24, 0.37)) == pytest.approx(0.37)
    assert math.isnan(exponent(points(24, 1)[:1]))


@pytest.mark.parametrize(("symmetric", "positive", "kind"), [
    (points(24, 0.5), points(24, 0.5), GrowthClass.NEAREST),
    (points(26, 0.16), points(26, 0.4), GrowthClass.NEAREST),
    (points(23, 1.0, -0.9), points(22, 1.1, -1.0), GrowthClass.TRUNCATING),
    (points(14, 0.6, -0.2), points(14, 1.1, -1.0), GrowthClass.TRUNCATING),
    (points(15, 0.0), points(17, -0.5, spread=0.5), GrowthClass.INPUT_LIMITED),
    (points(14, 0.0, -0.9), points(14, 0.0, -1.0), GrowthClass.INPUT_LIMITED),
    (points(13, 0.5), points(13, 0.5, spread=0.1), GrowthClass.LOW_PRECISION),
    (points(14, 0.0), points(14, 0.0, spread=0.1), GrowthClass.LOW_PRECISION),
    (points(20, 0.5), points(20, 0.5, spread=0.1), GrowthClass.UNCLEAR)])
def test_exponents_alone_do_not_decide(symmetric: list[Point], positive: list[Point], kind: GrowthClass) -> None:
    """Equal exponents belong to several classes; level, signs and positive data decide."""
    assert growth(symmetric, positive).growth_class is kind


def test_what_is_missing_is_said() -> None:
    """Without positive data, short sums or visible errors nothing is claimed."""
    assert "both symmetric and positive data" in growth(points(15, 0.0), []).evidence
    assert "needs lengths up to 256" in growth(points(15, 0.0)[2:], points(17, -0.5)[2:]).evidence
    hidden = growth(points(20, 0.5, resolved=False), points(20, 0.5, resolved=False))
    assert hidden.growth_class is GrowthClass.UNCLEAR
    assert "at least 19.9 effective bits" in hidden.evidence or "at least 20.0 effective bits" in hidden.evidence
    assert math.isnan(hidden.bits[0])


def test_two_lengths_have_no_law() -> None:
    """Operands cut to tf32 at two lengths look like narrow sums; a third tells."""
    cut, few = points(15, 0.0), slice(0, 4, 3)
    law = growth(cut[few], points(15, 0.0, share=-0.9)[few])
    assert law.growth_class is GrowthClass.UNCLEAR
    assert law.evidence.startswith("needs 3 lengths")


def test_leaving_a_band_is_a_fault() -> None:
    """In exponent or in level; what could not be seen is no fault."""
    band = find_band("moe_fast:tf32", Format.FP32, "sm90")
    assert band is not None
    assert find_band("moe_fast:tf32", Format.BF16, "sm90") is None
    inside = growth(points(15, 0.0), points(17, -0.5))
    assert band_faults(replace(inside, bits=(14.0, 16.0)), band) == []
    assert "grows as K^0.50" in band_faults(replace(inside, bits=(14.0, 16.0), exponent=0.5), band)[0]
    assert "24.0 to 24.2 effective bits" in band_faults(replace(inside, bits=(24.0, 24.2)), band)[0]
    assert band_faults(replace(inside, bits=(math.nan, math.nan), exponent=math.nan), band) == []


def diverge(*arguments: str) -> Result:
    """`moe-ref diverge` in this process."""
    return CliRunner().invoke(cli, ["diverge", *arguments], standalone_mode=False)


def scaled(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """A wrong product."""
    return torch_loop(x_RK, w_ENK, ends_E) * 1.01


def absent(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """A product that this place has not."""
    raise NotRun("no such kernel here")


def broken(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """A product that breaks."""
    raise RuntimeError("illegal memory access")


def test_a_run_from_command_to_record_to_picture(tmp_path: Path) -> None:
    """Two subjects: tables and verdict on the terminal, the same document from the record alone, a picture of it."""
    run = diverge("moe_fast:tf32", "torch:loop", *SHORT, "--record", str(tmp_path), "--json")
    assert run.return_value == 0, run.output
    document = json.loads(run.stdout)
    assert set(document) == {"run", "subjects", "differences", "end"}
    predicted, measured = document["subjects"]
    assert (predicted["status"], measured["status"]) == ("PREDICTED", "MEASURED")
    assert predicted["growth_class"] == "input_limited"
    assert [point["terms"] for point in measured["curves"]["positive"]] == [64, 256, 1024, 2048]
    assert document["differences"][0]["answer"] == "no"
    again = diverge("--read", str(tmp_path), "--json")
    assert json.loads(again.stdout) == document
    shown = diverge("--read", str(tmp_path), "--plot", str(tmp_path / "curves.svg"))
    assert "moe_fast:tf32 (PREDICTED) and torch:loop differ by" in " ".join(shown.stdout.split())
    assert "PREDICTED" in (tmp_path / "curves.svg").read_text()
    plot_growth(read_growth(tmp_path), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot_growth(read_growth(tmp_path), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == (tmp_path / "curves.svg").read_text()


def test_faults_end_with_code_1() -> None:
    """A wrong product is named, whatever its curve; a broken one too; one that is not there is NOT RUN."""
    subjects = [f"{__name__}:{name}" for name in ("scaled", "broken", "absent")]
    run = diverge(*subjects, "--k", "64,256", "--m", "16", "--n", "16", "--json")
    assert run.return_value == 1
    wrong, crashed, missing = json.loads(run.stdout)["subjects"]
    assert any("the result is scaled by 1.01" in fault for fault in wrong["faults"])
    assert (crashed["status"], crashed["faults"]) == ("NOT RUN", ["RuntimeError: illegal memory access"])
    assert (missing["status"], missing["reason"], missing["faults"]) == ("NOT RUN", "no such kernel here", [])
    assert diverge(f"{__name__}:absent", "--k", "64", "--m", "4", "--n", "4").return_value == 4


def test_an_accepted_curve_is_held(tmp_path: Path) -> None:
    """The same command drifts nowhere; a changed baseline is reported; other lengths are not compared."""
    path, options = tmp_path / "growth.json", ("torch:loop", *SHORT, "--dtype", "fp32")
    assert diverge(*options, "--baseline", str(path), "--accept").return_value == 0
    assert diverge(*options, "--baseline", str(path)).return_value == 0
    changed = json.loads(path.read_text())
    changed["curves"]["torch:loop, fp32, cpu"]["bits"] = [14.0, 15.0]
    path.write_text(json.dumps(changed))
    run = diverge(*options, "--baseline", str(path), "--json")
    assert run.return_value == 1
    assert "drift: least effective bits" in json.loads(run.stdout)["subjects"][0]["faults"][0]
    assert diverge("torch:loop", "--k", "64,1024", "--m", "8", "--n", "8", "--baseline", str(path)).return_value == 0


@pytest.mark.parametrize(("question", "subject", "start"), [
    ("tf32", "moe_fast:tf32", "Does moe_fast:tf32 multiply tf32 operands? Yes"),
    ("low-precision", "model:pairwise-fp16:bf16", "Does model:pairwise-fp16:bf16 accumulate in less than fp32? Yes"),
    ("low-precision", "torch:loop", "Does torch:loop accumulate in less than fp32? No: at least"),
    ("bug", "torch:loop", "Does torch:loop compute something else than the product at K = 2048? No")])
def test_questions_have_answers(question: str, subject: str, start: str) -> None:
    """One command, one answer."""
    assert diverge(subject, *SHORT, "--ask", question).stdout.startswith(start)


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "no subject"), (("torch:loop", "--data", "odd"), "data 'odd'"),
    (("torch:loop", "--hardware", "cpu"), "hardware"),
    (("torch:loop", "--k", "64", "--tp", "65"), "tp=65"), (("torch:loop", "--k", "8:4"), "lengths"),
    (("torch:loop", "--baseline", "nowhere.json"), "no such file"), (("--read", "nowhere"), "no such record file")])
def test_wrong_use(arguments: tuple[str, ...], words: str) -> None:
    """Each says what was given and what should be."""
    error = diverge(*arguments).exception
    assert isinstance(error, UsageValueError)
    assert words in str(error)


def test_records_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """Neither reader takes the other's lines for its own."""
    assert diverge("torch:loop", "--k", "64", "--m", "4", "--n", "4", "--record", str(tmp_path)).return_value == 0
    with pytest.raises(UsageValueError, match="diverge"):
        read_run(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"type": "run"}\n')
    with pytest.raises(UsageValueError, match="is it a record of `moe-ref diverge`"):
        read_growth(tmp_path)
