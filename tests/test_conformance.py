"""Protects the conformance table: made from records alone, every failure with its reason and its replay command."""

import json
from pathlib import Path

import msgspec
import pytest

from moe_ref.adapters.catalogue import ADAPTERS
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Ranks, Verdict
from moe_ref.records.schema import CaseLine, DiagnosisLine, Implementation, StageResult
from moe_ref.report.conformance import Conformance, conformance
from moe_ref.report.conformance_page import conformance_page
from moe_ref.tiers.conformance import FAMILIES, conformance_cases
from moe_ref.tiers.tiers import tier
from tests.command_line import command
from tests.made_records import make_run

ROOT = Path(__file__).resolve().parents[1]
NAME = "torch.grouped_mm"
PASSES, FAILS, CRASHES, REFUSED = (one.case_id for one in conformance_cases()[:4])


def line(case: str, verdict: str, **more: object) -> CaseLine:
    """One case of the adapter, with an output at 0.25 of what is allowed and 7.9 effective bits."""
    stages = [StageResult(stage="act", ratio=1.0, bits=8.2, num_checked=4, num_bad=0),
              StageResult(stage="output", ratio=0.25, bits=7.9, num_checked=4, num_bad=0)]
    return CaseLine(run="r1", case=case, purpose="", implementation=Implementation(name=NAME, version="2"),
                    ranks="local", device="cpu", verdict=verdict, stages=stages, same_bits=True,
                    replay=f"moe-ref replay {case} --impl {NAME}", **more)  # type: ignore[arg-type]


def document() -> Conformance:
    """A passing, a wrong, a crashing and a refused case."""
    diagnosis = DiagnosisLine(fault="gate and up swapped", share=0.99, next_share=0.1)
    run = make_run(line(PASSES, "pass"),
                   line(FAILS, "mismatch", first_stage="act", reason="act: 41x | its bound\nmore", diagnosis=diagnosis),
                   line(CRASHES, "crash", reason="RuntimeError: strides"),
                   line(REFUSED, "unsupported", reason="not declared: dtype fp16"),
                   tier="conformance", packages="torch 2.13.0")
    header = msgspec.structs.replace(run.header, implementation=Implementation(name=NAME, version="2"))
    run = type(run)(header, run.cases, run.end)
    return conformance([run], {"liger": "liger-kernel is not installed"})


def test_cells_say_what_the_records_say() -> None:
    """The ratio is the output's: stages inside are stored, and reach what is allowed whenever they are right."""
    [ran] = [one for one in document().implementations if one.cells]
    by_case = {cell.case: cell for cell in ran.cells}
    assert (by_case[PASSES].ratio, by_case[PASSES].bits, by_case[PASSES].said) == (0.25, 7.9, "")
    assert by_case[FAILS].said == "act: 41x | its bound; gate and up swapped explains 99 %"
    assert by_case[FAILS].replay == f"moe-ref replay {FAILS} --impl {NAME}"
    assert [cell.case for cell in ran.failed] == [FAILS, CRASHES]
    assert ran.packages == ["torch 2.13.0"]


def test_every_failure_is_on_the_page() -> None:
    """With verdict, stage, reason and replay command; what did not run is counted with its reason."""
    page = conformance_page(document())
    assert "2026-11-20: 1 implementations of 1 lineages, 1 of them with kernels of their own; 3 cases ran, 1" in page
    assert f"| `{NAME}` | torch 2.13.0 | **1/3** |" in page
    assert "0.25, 7.9" in page
    assert "WRONG act" in page
    assert f"| `moe-ref replay {CRASHES} --impl {NAME}` |" in page
    assert ("## Not run here" in page) == (len(ADAPTERS) > 1)


def test_encoded_experts_have_a_column_where_any_ran() -> None:
    """A table from before has none; a scheme that an adapter does not declare is an empty cell."""
    assert "| encoded |" not in conformance_page(document())
    first, second = (one.case_id for one in conformance_cases() if one.row == "fp8block")
    run = make_run(line(first, "pass"), line(second, "mismatch", first_stage="down", reason="down: 9 its bound"),
                   tier="conformance", packages="torch 2.13.0")
    run = type(run)(msgspec.structs.replace(run.header, implementation=Implementation(name=NAME, version="2")),
                    run.cases, run.end)
    page = conformance_page(conformance([run], {}))
    assert "| widths | encoded | same bits |" in page
    assert "| encoded | bf16 | bf16 tp 2 |" in page
    assert "| fp8block | 0.25, 7.9 | WRONG down |" in page
    assert "**1/2** |" in page


def test_a_table_of_nothing_is_refused() -> None:
    """An empty page would look like a run."""
    with pytest.raises(UsageValueError, match="no run of an adapter"):
        conformance([], {})


def test_the_tier_has_every_cell_once() -> None:
    """Each family in each dtype, on one rank and on two process ranks, and backward but for fp16."""
    cases = conformance_cases()
    families = [one for one in cases if one.kind == "family"]
    assert len(families) == len(FAMILIES) * 10
    for one in cases:
        case = parse_case(one.case_id)
        assert (case.problem.dtype, case.parallel.tp, case.direction) == (one.dtype, one.tp, one.direction)
    ranks = {one.case_id: one.ranks for one in tier("conformance").cases}
    assert {ranks[one.case_id] for one in cases if one.tp == 2} == {Ranks.GLOO}
    assert {ranks[one.case_id] for one in cases if one.kind == "experts over ranks"} == {Ranks.GLOO}
    assert {ranks[one.case_id] for one in cases if one.tp == 1 and one.kind != "experts over ranks"} == {Ranks.LOCAL}


def test_the_page_in_the_documents_is_that_of_its_data() -> None:
    """docs/conformance.md is made from ci/baselines/conformance.json, and every red cell has a reason."""
    data = (ROOT / "ci/baselines/conformance.json").read_bytes()
    accepted = msgspec.json.decode(data, type=Conformance, strict=True)
    assert (ROOT / "docs/conformance.md").read_text() == conformance_page(accepted)
    for one in accepted.implementations:
        assert one.cells or one.lacking
        assert all(cell.said and cell.replay for cell in one.failed)
        assert all(cell.verdict is Verdict.KNOWN_FAILURE for cell in one.failed), one.name


def test_run_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From an installed library to the page: what is not installed is counted, and a second call goes on."""
    chosen = tier("conformance")
    few = type(chosen)(chosen.name, chosen.cases[:2], 1, 0, 0)
    monkeypatch.setattr("moe_ref.tiers.tiers.tier", lambda name: few)
    absent = next((one.name for one in ADAPTERS if one.lacking() or "cpu" not in one.devices), None)
    names = ["--only", NAME] + (["--only", absent] if absent else [])
    for _ in range(2):
        assert command("adapters", "run", "--record", str(tmp_path / "run"), *names, "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert "2 pass; 2 of 2 executed" in told
    assert absent is None or f"not run: {absent}: " in told
    data, page = tmp_path / "table.json", tmp_path / "table.md"
    assert command("adapters", "table", str(tmp_path / "run"), "--json", str(data), "--out", str(page)) == 0
    assert page.read_text() == conformance_page(msgspec.json.decode(data.read_bytes(), type=Conformance))
    assert command("adapters", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == [one.name for one in ADAPTERS]


def test_an_unknown_adapter_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the names that there are."""
    assert command("adapters", "run", "--record", str(tmp_path), "--only", "ligre") == 2
    assert "unknown adapter ligre; known: " in capsys.readouterr().err
