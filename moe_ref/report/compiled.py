"""A recorded run of `moe-ref compile` as tables, failures in words, and one JSON document."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from moe_ref.records.compiled import CombinationLine, CompiledRun
from moe_ref.report.tables import NamedTable

_NUMBERS = ("registers", "spilled", "shared KiB")


def compile_document(run: CompiledRun) -> dict[str, object]:
    """Keys: run (its first line), triton, failures (in words), compared, new (keys that are not in the table),
    combinations, end.
    """
    lines = ordered(run)
    return {"run": _plain(run.header), "triton": run.header.triton, "failures": compile_failures(run),
            "compared": num_compared(run),
            "new": [line.key for line in lines if run.header.table and not line.is_accepted],
            "combinations": [_plain(line) for line in lines], "end": _plain(run.end)}


def _plain(line: msgspec.Struct | None) -> object:
    return json.loads(msgspec.json.encode(line))


def ordered(run: CompiledRun) -> list[CombinationLine]:
    """By architecture, kernel and key: compilers side by side end in any order."""
    return sorted(run.combinations.values(), key=lambda line: (line.architecture, line.kernel, line.key))


@dataclass(frozen=True)
class Failure:
    """What is wrong with a combination, in words; key: its own, which begins with architecture and kernel."""

    key: str
    reason: str

    @property
    def kernel(self) -> str:
        """Its kernel and architecture in words."""
        architecture, _, rest = self.key.partition(" ")
        return f"{rest.partition(' ')[0]} on {architecture}"


def regressions(run: CompiledRun) -> list[Failure]:
    """Worse than the accepted table, or gone from it."""
    worse = [Failure(line.key, reason) for line in ordered(run) for reason in line.worse]
    return worse + [Failure(key, "accepted, but no longer launched") for key in run.header.missing]


def compile_faults(run: CompiledRun) -> list[Failure]:
    """Wrong whatever was accepted."""
    return [Failure(line.key, reason) for line in ordered(run) for reason in line.faults]


def compile_failures(run: CompiledRun) -> list[str]:
    """All that makes the run fail, a sentence each, regressions first."""
    return [f"{one.key}: {one.reason}" for one in (*regressions(run), *compile_faults(run))]


def num_compared(run: CompiledRun) -> int:
    """Combinations that the table has too; what does not compile is a fault and not compared."""
    return sum(line.is_accepted and not line.error for line in run.combinations.values())


def kernel_table(run: CompiledRun) -> NamedTable:
    """The most that the combinations of each kernel take on each architecture; kernels with failures first."""
    groups: dict[tuple[str, str], list[CombinationLine]] = {}
    for line in ordered(run):
        groups.setdefault((line.architecture, line.kernel), []).append(line)
    rows = []
    for (architecture, kernel), several in sorted(groups.items(), key=lambda item: not _failures(item[1])):
        matrix = sorted({name for line in several for name in line.matrix})
        rows.append([architecture, kernel, str(len(several)), str(max(line.registers for line in several)),
                     str(max(line.spill_bytes for line in several)),
                     f"{max(line.shared_bytes for line in several) / 1024:.1f}", ", ".join(matrix) or "-",
                     str(_failures(several) or "-")])
    return NamedTable("the most that a combination takes", ["architecture", "kernel", "combinations", *_NUMBERS,
                      "matrix", "failures"], rows, right=("combinations", *_NUMBERS, "failures"))


def _failures(lines: Sequence[CombinationLine]) -> int:
    return sum(len(line.faults) + len(line.worse) for line in lines)


def combination_table(run: CompiledRun) -> NamedTable:
    """Every combination."""
    rows = [[line.key, str(line.registers), str(line.spill_bytes), f"{line.shared_bytes / 1024:.1f}",
             ", ".join(line.matrix) or "-"] for line in ordered(run)]
    return NamedTable("what each combination takes", ["combination", *_NUMBERS, "matrix"], rows, right=_NUMBERS)


def compile_words(run: CompiledRun) -> list[str]:
    """Below the tables: what was compared with what, what is left out, and the count of everything."""
    header, found, failures = run.header, len(run.combinations), len(compile_failures(run))
    if header.table:
        new = sum(not line.is_accepted for line in run.combinations.values())
        words = [f"compared with {header.table}: {num_compared(run)} combinations, {new} not in it"
                 + " (--accept takes them in)" * bool(new)]
    else:
        words = [f"no accepted table of Triton {header.triton} was read: printed, not compared"]
    if run.end is None:
        left = header.num_combinations - found
        return [*words, f"cut short: {left} of {header.num_combinations} combinations NOT RUN"]
    seconds = sum(line.seconds for line in run.combinations.values())
    return [*words, f"{'FAIL' if failures else 'PASS'}  {found} combinations, {failures} failures, {seconds:.0f} s of "
                    "compiling"]
