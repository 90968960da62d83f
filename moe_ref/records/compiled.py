"""A run of `moe-ref compile` as typed JSON lines: a `compile` line, a `combination` line per compiled kernel, an `end`
line. Imports no torch.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from moe_ref.records.runs import last_run
from moe_ref.records.schema import SCHEMA, Count, EndLine


class CompileLine(msgspec.Struct, frozen=True, kw_only=True, tag="compile", tag_field="type"):
    """First line: whose kernels are compiled, for which architectures, and what they are compared with.

    scope: gate (the gate's own cases), cases (those of `cases`), models or tiles. triton: the series, as 3.7.
    num_combinations: how many lines follow in a run that is not cut short. table: file of the accepted table, "" where
    there is none of this series. missing: keys that are accepted, but are no longer launched.
    """

    schema: int = SCHEMA
    run: str
    started: str
    implementation: str
    architectures: list[str]
    scope: str
    cases: list[str] = []
    num_combinations: Count
    triton: str
    table: str = ""
    missing: list[str] = []
    environment: dict[str, str]


class CombinationLine(msgspec.Struct, frozen=True, kw_only=True, tag="combination", tag_field="type"):
    """One compiled kernel: its key in the accepted table, what it takes, and what is wrong with that.

    registers and spill_bytes: per thread, shared_bytes: per block. dots: operand types of its matrix products; matrix:
    the matrix instructions found. error: why it did not compile, "" where it did. faults: what is wrong whatever was
    accepted; worse: than what was accepted; in words. is_accepted: whether the table has it.
    """

    schema: int = SCHEMA
    run: str
    key: str
    architecture: str
    kernel: str
    registers: Count
    spill_bytes: Count
    shared_bytes: Count
    dots: list[str] = []
    matrix: list[str] = []
    error: str = ""
    seconds: float = 0.0
    faults: list[str] = []
    worse: list[str] = []
    is_accepted: bool = False


CompiledRecordLine = CompileLine | CombinationLine | EndLine


@dataclass
class CompiledRun:
    """All lines of one run; combinations by key."""

    header: CompileLine
    combinations: dict[str, CombinationLine] = field(default_factory=dict)
    end: EndLine | None = None


def read_compiled(path: Path) -> CompiledRun:
    """The last run in a record file or in the folder that holds it; raises UsageValueError with file and line."""
    header, lines = last_run(path, CompileLine, CompiledRecordLine, "compile")
    run = CompiledRun(header)
    for line in lines:
        add_line(run, line)
    return run


def add_line(run: CompiledRun, line: CompiledRecordLine) -> None:
    """Put a line where it belongs."""
    if isinstance(line, CombinationLine):
        run.combinations[line.key] = line
    elif isinstance(line, EndLine):
        run.end = line
