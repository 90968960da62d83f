"""Protects the studies: right layers of all kinds pass, faulty ones do not, and neither study can pass on nothing."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from moe_ref.contract.case_id import format_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Dtype, Format, Stage, Verdict
from moe_ref.inputs.build import inverse_root
from moe_ref.numerics.formats import is_representable
from moe_ref.oracle.layer import moe
from moe_ref.report.tables import NamedTable, write_between
from moe_ref.simulated.fault import Fault, Product
from moe_ref.simulated.faults import (
    AccumulatedInBF16,
    AccumulatedInFP16,
    AccumulationTruncated,
    LastBlockDroppedOfOneTile,
    ReducedOnce,
    StoreTruncated,
)
from moe_ref.verify.study.alarms import accusations, judged_draw, spreads
from moe_ref.verify.study.data import StudyData, study_inputs
from moe_ref.verify.study.draws import CONTRACTS, LONG, Draw, draw
from moe_ref.verify.study.expected import expected
from moe_ref.verify.study.journal import DrawLine, Header, appending, read_journal
from moe_ref.verify.study.power import EXACT, OUTPUT_ALONE, SHOWN, Cell, case_of, power_cells, right_cells, torch_loop
from moe_ref.verify.study.variants import variants

DRAWS = range(12)
"""Enough for every check to be measured often; `ci/studies` goes on from them."""
CHEAP = 26
"""A dense layer on one rank."""
MANY = 36
"""A draw of outputs that are nearly equal."""


@cache
def script(name: str) -> ModuleType:
    """A command of ci/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parents[1] / "ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def lines() -> list[DrawLine]:
    """The first draws, judged."""
    return [judged_draw(number) for number in DRAWS]


@pytest.mark.nightly("the lane studies draws more layers")
def test_no_right_layer_is_accused() -> None:
    """Ten layers of every draw, and all but a few of them with enough power to say so."""
    verdicts = [run.verdict for line in lines() for run in line.runs]
    assert len(verdicts) == 10 * len(DRAWS)
    assert accusations(lines()) == []
    assert verdicts.count(Verdict.PASS) >= 0.95 * len(verdicts)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("number", [179, 325, 556, 639, 719])
def test_layers_that_were_once_accused(number: int) -> None:
    """Parallel rows share errors, sums of stored numbers are often ties, outputs may be alike: no mistakes."""
    assert accusations([judged_draw(number)]) == []


@pytest.mark.nightly("the lane studies draws more layers")
def test_every_check_was_measured() -> None:
    """No check passes because nothing came near it: right layers use some of every threshold."""
    found = {one.check: one for one in spreads(lines())}
    for check in ("logits sigmas", "gate_up sigmas", "act sigmas", "down sigmas", "merged sigmas", "reduced sigmas",
                  "output sigmas", "output", "output rms", "output sign", "output slots", "output ranks"):
        assert len(found[check].values) >= 50, check
        assert 0.05 < found[check].largest < 1.0, check
        levels = (*found[check].quantiles, found[check].largest)
        assert all(one <= other for one, other in pairwise(levels)), check


def test_draws_reach_everything() -> None:
    """2,000 draws have every dtype, kind of data, contract, degree and reduction length that the study speaks of."""
    drawn = [draw(number) for number in range(2000)]
    assert {one.case.problem.dtype for one in drawn} == set(Dtype)
    assert {one.data for one in drawn} == set(StudyData)
    assert {one.contract for one in drawn} == set(CONTRACTS)
    assert {one.case.parallel.tp for one in drawn} == set(range(1, 9))
    widths = [{one.case.problem.spec.hidden_size, one.case.problem.spec.intermediate_size} for one in drawn]
    long = [sizes for sizes in widths if max(sizes) >= min(LONG)]
    assert set(LONG) <= set.union(*long)
    assert 0.01 < len(long) / len(drawn) < 0.05
    routers = [one.case.problem.spec.router for one in drawn]
    assert any(router is None for router in routers)
    assert {router.score for router in routers if router} == {"softmax", "sigmoid"}
    assert len({format_case(one.case) for one in drawn}) == 2000


def test_a_number_is_one_layer() -> None:
    """An accusation names its draw, so the same number must be the same bits on another machine and in another year."""
    assert format_case(draw(5).case) == "v1-T8.H192.I192.E8.K2-bf16-sigmoid-norm-ties-s5"
    assert [draw(number).inputs.digest() for number in (5, CHEAP, MANY)] == DIGESTS


DIGESTS = ["5d569be7ef1693b3", "e505facda58d509c", "134b2ac7076a8827"]
"""Never edited."""


def test_variants_are_ten_different_layers() -> None:
    """Orders that all gave the same bits would be one layer ten times."""
    one = next(one for one in map(draw, range(100)) if one.case.problem.dtype is Dtype.FP32
               and one.case.problem.spec.hidden_size >= 96 and one.case.parallel.tp >= 4)
    ten = variants(one)
    assert len({variant.name for variant in ten}) == 10
    assert {variant.hardware for variant in ten} == {"cpu", "sm80", "sm90"}
    assert any(variant.shown == () for variant in ten)
    outputs = [variant.layer.run(one.case, one.inputs)[0][Stage.REDUCED] for variant in ten]
    different = {output.numpy().tobytes() for output in outputs}
    assert len(different) >= 6


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("data", list(StudyData))
def test_data_are_what_they_are_called(data: StudyData, dtype: Dtype) -> None:
    """And every number is one of the dtype, so that nothing is rounded on the way in."""
    problem = case_of(dtype, 256, 1, 1).problem
    inputs, unit = study_inputs(problem, data), study_inputs(problem, StudyData.UNIT)
    expert = inputs.weights.expert(1)
    router_EH = inputs.weights.router_EH
    assert router_EH is not None
    for tensor in (inputs.x_TH, expert.w13_GIH, expert.w2_HI, router_EH):
        assert is_representable(tensor.double(), Format(dtype.value)).all()
        assert tensor.double().std() > 0
    assert inputs.weights.expert(1) is expert
    facts: dict[StudyData, Callable[[], bool]] = {
        StudyData.UNIT: lambda: torch.equal(inputs.x_TH, unit.x_TH),
        StudyData.SMALL: lambda: all(0.05 < float(one.double().std()) < 0.12
                                     for one in (inputs.x_TH, expert.w13_GIH, expert.w2_HI, router_EH)),
        StudyData.HEAVY: lambda: float(inputs.x_TH.abs().max()) >= 64 * float(inputs.x_TH.double().abs().median()),
        StudyData.POSITIVE: lambda: min(float(one.min()) for one in (inputs.x_TH, *expert[:2])) >= 0,
        StudyData.ALIKE: lambda: (float(inputs.x_TH.double().std()) < 0.06 and float(inputs.x_TH.min()) > 0.8
                                  and min(float(one.min()) for one in expert[:2]) >= 0),
        StudyData.GRADED: lambda: float(inputs.x_TH.double().std(0).max() / inputs.x_TH.double().std(0).min()) > 30}
    assert facts[data]()
    assert data is StudyData.UNIT or not torch.equal(inputs.x_TH, unit.x_TH)
    assert float(unit.weights.expert(0).w2_HI.abs().max()) <= 4 * inverse_root(64)


def test_contracts_are_followed() -> None:
    """A layer judged under another contract than its own would make the study say nothing."""
    base = draw(CHEAP)
    for contract in CONTRACTS:
        one = Draw(CHEAP, base.case, base.data, contract)
        shown = variants(one)[0].layer.run(one.case, one.inputs)[0]
        for stage, stored in one.numerics.storage.items():
            if stage in shown:
                assert is_representable(shown[stage].double(), stored).all()
    assert len({str(replace(base, contract=contract).numerics) for contract in CONTRACTS}) == len(CONTRACTS)


HEADER = Header(sources="0123", tolerances="4567")


def test_a_journal_goes_on_where_it_ended(tmp_path: Path) -> None:
    """A line that a crash cut short is taken off and judged again; those before it are kept."""
    path = tmp_path / "alarms.jsonl"
    some = [DrawLine(draw=number, case="v1", data="unit", contract="registers", runs=[]) for number in range(3)]
    with appending(path, HEADER) as journal:
        for line in some[:2]:
            journal.append(line)
    with path.open("ab") as file:
        file.write(b'{"type":"draw","draw":2,"ca')
    assert read_journal(path, HEADER) == {0: some[0], 1: some[1]}
    with appending(path, HEADER) as journal:
        journal.append(some[2])
    assert read_journal(path, HEADER) == dict(enumerate(some))


def test_a_journal_of_other_sources_is_refused(tmp_path: Path) -> None:
    """Runs of two models in one table would be of neither."""
    path = tmp_path / "alarms.jsonl"
    with appending(path, HEADER):
        pass
    with pytest.raises(UsageValueError, match="made with sources 0123 and tolerances 4567, but these are 89 and 4567"):
        read_journal(path, Header(sources="89", tolerances="4567"))
    path.write_text("something else\n")
    with pytest.raises(UsageValueError, match="should hold a header and lines of draws"):
        read_journal(path, HEADER)


def test_the_command_repeats_a_draw_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --only prints is what the record holds, and a second run judges nothing again."""
    monkeypatch.setattr(script("alarms"), "source_digest", lambda package: "0123")  # an editor may be at work
    main, record, plot = script("alarms").main, tmp_path / "alarms.jsonl", tmp_path / "alarms.svg"
    runner = CliRunner()
    arguments = ["--first", str(CHEAP), "--draws", "1", "--lanes", "1", "--record", str(record), "--plot", str(plot)]
    first = runner.invoke(main, arguments)
    assert first.exit_code == 0, first.output
    assert "10 right layers of 1 draws, 0 accused" in first.stdout
    assert len(re.findall("value|runs", plot.read_text())) >= 2
    content = record.read_bytes()
    again = runner.invoke(main, arguments)
    assert again.stdout == first.stdout
    assert record.read_bytes() == content
    alone = runner.invoke(main, ["--only", str(CHEAP)])
    assert alone.stdout.partition("\n")[2] == first.stdout


def test_an_accusation_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """One red verdict among right layers, and the exit code says so and the draw is named."""
    line = judged_draw(CHEAP)
    accused = DrawLine(draw=CHEAP, case=line.case, data=line.data, contract=line.contract, runs=[
        *line.runs[:9], type(line.runs[9])(variant="ampere", hardware="sm80", verdict=Verdict.MISMATCH, power=3.0,
                                           reason="act: 1.2x over bound", shares=line.runs[9].shares)])
    monkeypatch.setattr(script("alarms"), "judged_draw", lambda number: accused)
    found = CliRunner().invoke(script("alarms").main, ["--only", str(CHEAP)])
    assert found.exit_code == 1
    assert f"ACCUSED draw {CHEAP}, ampere (sm80)" in found.stdout


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("terms", [64, 256])
@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.FP32])
def test_expected_faults_are_caught(dtype: Dtype, terms: int) -> None:
    """A fault of structure, one of precision and a benign one: what the model expects is what the verdict is."""
    faults = (ReducedOnce(), LastBlockDroppedOfOneTile(), AccumulatedInBF16(), StoreTruncated())
    cells = {cell.fault: cell for cell in power_cells(dtype, terms, 1, faults=faults)}
    assert len(cells) == len(faults) - (dtype is Dtype.FP32)  # a store of fp32 is none to fp32
    benign = cells[ReducedOnce.name]
    assert not benign.expected > 1
    assert not any(benign.caught[check] for check in (SHOWN, OUTPUT_ALONE, EXACT))
    for fault in faults[1:]:
        if fault.name in cells:
            cell = cells[fault.name]
            assert cell.expected > 10
            assert cell.caught[SHOWN]
            assert cell.stage == fault.stage
            assert cell.caught[EXACT] == (fault == LastBlockDroppedOfOneTile())
    assert set(benign.caught) >= {"torch_testing", "vllm", "sglang", "triton_kernels"}


@pytest.mark.parametrize("tp", [1, 4])
def test_right_layers_pass_where_others_refuse_them(tp: int) -> None:
    """The known example: bf16 at torch's own tolerances."""
    cells = list(right_cells(Dtype.BF16, 64, tp, 0, StudyData.UNIT))
    assert len(cells) == 3
    assert not any(cell.caught[check] for cell in cells for check in (SHOWN, OUTPUT_ALONE))
    assert all(cell.caught["torch_testing"] for cell in cells)


@pytest.mark.parametrize("fault", [AccumulatedInBF16(), AccumulatedInFP16(), AccumulationTruncated()])
def test_expected_errors_are_as_large_as_real_ones(fault: Fault) -> None:
    """What is drawn for a fault of a sum has the root mean square of the fault itself, and a cut its sign."""
    inputs = study_inputs(case_of(Dtype.FP32, 1024, 1, 2).problem, StudyData.UNIT)
    a_MK, b_KN = inputs.x_TH.double(), inputs.weights.expert(0).w13_GIH[0].double().T
    exact_MN = a_MK @ b_KN
    real, drawn = (one.product(torch.matmul, a_MK, b_KN, Product(Stage.GATE_UP, 0)) - exact_MN
                   for one in (fault, expected(fault)))
    assert expected(fault) != fault
    assert 0.7 < float(drawn.square().mean().sqrt() / real.square().mean().sqrt()) < 1.4
    shrunk_real, shrunk_drawn = (float((one * exact_MN.sign()).mean() / one.abs().mean()) for one in (real, drawn))
    assert abs(shrunk_real - shrunk_drawn) < 0.2


def test_a_contradiction_fails_the_power_study() -> None:
    """A fault that is expected and missed, and a right layer that is accused, are named; what is neither is not."""
    missed = Cell("columns_swapped", Dtype.BF16, 64, 4, StudyData.UNIT, 0, 5.0, {SHOWN: False, EXACT: True}, "pass")
    benign = Cell(ReducedOnce.name, Dtype.BF16, 64, 4, StudyData.UNIT, 0, 1.0, {SHOWN: True}, "reduced")
    hidden = replace(missed, expected=0.5)
    right = replace(missed, fault="right", caught={OUTPUT_ALONE: True, "vllm": True}, expected=0.2)
    wrong = script("power").wrong
    assert wrong([hidden], [replace(right, caught={"vllm": True})]) == []
    assert ["not caught" in text for text in wrong([missed], [])] == [True]
    assert ["accused by all stages" in text for text in wrong([benign], [])] == [True]
    assert ["accused by output alone" in text for text in wrong([], [right])] == [True]


def test_the_reference_of_others_is_a_right_layer() -> None:
    """In fp32 it is the oracle to fp32's accuracy; else criteria would be compared on a mistake."""
    case = case_of(Dtype.FP32, 96, 1, 3)
    inputs = study_inputs(case.problem, StudyData.UNIT)
    routed = variants(Draw(0, case, StudyData.UNIT, "stored_rows"))[0].layer.run(case, inputs)[0]
    want_TH = moe(inputs.x_TH, inputs.weights, case.problem.spec)
    torch.testing.assert_close(torch_loop(inputs, routed).double(), want_TH, rtol=1e-5, atol=1e-5)


def test_tables_go_between_their_marks(tmp_path: Path) -> None:
    """What stands around them stays; a document without the marks is refused."""
    path = tmp_path / "studies.md"
    path.write_text("head\n<!-- power -->\nold\n<!-- end of power -->\ntail\n")
    write_between(path, "power", NamedTable("shares", ("fault", "caught"), [("zeros", "1")]).in_document())
    assert path.read_text().startswith("head\n<!-- power -->\n\nshares:\n\n| fault | caught |\n| --- | --- |\n| zeros")
    assert path.read_text().endswith("\n<!-- end of power -->\ntail\n")
    with pytest.raises(UsageValueError, match="should hold <!-- alarms --> and then"):
        write_between(path, "alarms", "")
