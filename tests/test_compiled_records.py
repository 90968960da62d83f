"""Records of `moe-ref compile`: what is read is what was written, and tables and words come from it alone."""

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

import moe_fast.compile
from moe_fast.compile.combinations import Combination
from moe_fast.compile.lanes import Observe
from moe_fast.compile.resources import Resources
from moe_fast.compile.table import write_table
from moe_ref.cli.compile_commands import compile_command
from moe_ref.contract.errors import UsageValueError
from moe_ref.records.compiled import read_compiled
from moe_ref.records.store import FILE_NAME
from moe_ref.report.compiled import (
    combination_table,
    compile_document,
    compile_failures,
    compile_words,
    kernel_table,
)
from tests.made_evidence import combination, compiled_run, write_lines

SMALL = "v1-T64.H128.I96.E4.K2-bf16-norm"


def test_a_record_holds_what_the_command_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command's own lines: one better accepted, one fault of its own, one gone from the gate is not this run's."""
    answers = Resources(registers=100, spill_bytes=8, shared_bytes=4096, dots=("bf16",), matrix=("HGMMA.64x32x16",))

    def compile_all(combinations: list[Combination], lanes: int, observe: Observe) -> list[Resources]:
        keys = [one.key for one in combinations]
        write_table(tmp_path / "table.json", {keys[0]: Resources(80, 8, 4096, matrix=("HGMMA.64x32x16",))})
        for one in reversed(combinations):
            observe(one, answers)
        return [answers for _ in combinations]

    monkeypatch.setattr(moe_fast.compile, "compile_all", compile_all)
    table = tmp_path / "table.json"
    write_table(table, {})
    arguments = ["--arch", "sm_90", "--case", SMALL, "--baseline", str(table), "--record", str(tmp_path / "run")]
    first = CliRunner().invoke(compile_command, arguments, standalone_mode=False)
    again = CliRunner().invoke(compile_command, [*arguments, "--json"], standalone_mode=False)
    assert (first.return_value, again.return_value) == (1, 1)
    run = read_compiled(tmp_path / "run")
    assert (run.header.implementation, run.header.scope, run.header.cases) == ("moe_fast", "cases", [SMALL])
    assert (run.header.table, run.header.missing) == (str(table), [])
    assert len(run.combinations) == run.header.num_combinations > 3
    assert [line.worse for line in run.combinations.values() if line.worse] == [["100 registers, accepted were 80"]]
    assert {words for line in run.combinations.values() for words in line.faults} == {
        "8 bytes spilled per thread, but a product should spill none"}
    assert run.end is not None
    assert (run.end.exit_code, run.end.executed) == (1, run.header.num_combinations)
    assert json.loads(again.stdout) == compile_document(run)


def test_regressions_come_first_and_their_kernels_stand_at_the_top() -> None:
    """A table of twenty kernels whose one regression stands in the middle is not read."""
    run = compiled_run(combination("sm_80 a_kernel | | "), combination("sm_80 b_kernel | | ", faults=["spills"]),
                       combination("sm_90 a_kernel | | ", worse=["100 registers, accepted were 80"]),
                       missing=["sm_90 lost_kernel | | "])
    assert compile_failures(run) == ["sm_90 a_kernel | | : 100 registers, accepted were 80",
                                     "sm_90 lost_kernel | | : accepted, but no longer launched",
                                     "sm_80 b_kernel | | : spills"]
    assert [row[:2] for row in kernel_table(run).rows] == [
        ["sm_80", "b_kernel"], ["sm_90", "a_kernel"], ["sm_80", "a_kernel"]]
    assert len(combination_table(run).rows) == 3
    assert compile_words(run)[-1].startswith("FAIL  3 combinations, 3 failures")


def test_a_run_that_was_cut_short_counts_what_is_missing() -> None:
    run = compiled_run(combination("sm_90 a_kernel | | "), planned=3, ended=False)
    assert compile_words(run)[-1] == "cut short: 2 of 3 combinations NOT RUN"


def test_without_a_table_nothing_is_new() -> None:
    """Otherwise every combination of another Triton would be offered to --accept."""
    run = compiled_run(combination("sm_90 a_kernel | | ", is_accepted=False), table="")
    assert compile_words(run)[0] == "no accepted table of Triton 3.7 was read: printed, not compared"
    assert compile_document(run)["new"] == []


def test_what_is_no_record_of_compile_is_refused(tmp_path: Path) -> None:
    run = compiled_run(combination("sm_90 a_kernel | | "))
    folder = write_lines(tmp_path, run.header, *run.combinations.values())
    assert read_compiled(folder).combinations == run.combinations
    write_lines(tmp_path, msgspec.structs.replace(combination("sm_90 b_kernel | | "), run="other"))
    with pytest.raises(UsageValueError, match=rf"{FILE_NAME}:3: a line of run other"):
        read_compiled(folder)
    (folder / FILE_NAME).write_bytes(msgspec.json.encode(run.header) + b"\n" + msgspec.json.encode(
        combination("sm_90 b_kernel | | ")).replace(b"4096", b"9" * 400) + b"\n")
    with pytest.raises(UsageValueError, match=rf"{FILE_NAME}:2: .*shared_bytes"):
        read_compiled(folder)
    (folder / FILE_NAME).write_text('{"type": "run"}\n')
    with pytest.raises(UsageValueError, match=rf"{FILE_NAME}:1: .*is it a record of `moe-ref compile`"):
        read_compiled(folder)
