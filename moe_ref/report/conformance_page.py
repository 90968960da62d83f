"""The conformance table as a Markdown document. Imports no torch."""

from collections.abc import Sequence

from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, Direction, Dtype, Verdict
from moe_ref.report.conformance import SAID, Cell, Conformance, Implementation, rows
from moe_ref.report.markdown import cell as text_cell
from moe_ref.report.markdown import code
from moe_ref.report.words import format_ratio
from moe_ref.tiers.conformance import FAMILIES, PROBES, ConformanceCase

_WORDS = {Verdict.MISMATCH: "WRONG", Verdict.KNOWN_FAILURE: "known", Verdict.CRASH: "CRASH", Verdict.HANG: "HANG",
          Verdict.STRUCT: "STRUCT", Verdict.NONDETERMINISTIC: "VARIES", Verdict.UNEXPECTED_PASS: "PASSES AGAIN",
          Verdict.UNSUPPORTED: "", Verdict.NOT_RUN: "not run", Verdict.HARNESS_ERROR: "our error"}

_HEAD = """# Conformance of other people's implementations

Made by `moe-ref adapters table` from records; do not edit. How each is called: [adapters.md](adapters.md). What a
verdict rests on: [verdict.md](verdict.md). Random data, small layers whose sizes fit every block format, and published
widths; a pass says that the implementation computes the layer within the roundings that its adapter declares, in the
cases named here, on this machine.

- a number: passed; error / allowed of the output, backward the largest of output and gradients, and after it effective
  bits, log2 of the root mean square of the truth over that of the error, of the output or the worst gradient
- WRONG, CRASH, STRUCT, HANG, VARIES: failed; known: failed as its expectations file says. Each is explained below its
  table, with the command that shows it again
- empty: the implementation does not offer it, or its adapter does not declare it
"""


def conformance_page(document: Conformance) -> str:
    """The whole document."""
    ran = [one for one in document.implementations if one.executed]
    parts = [_HEAD, _summary(document, ran), _overview(ran), _left_out(document)]
    parts += [_details(one) for one in ran]
    return "\n".join(parts).rstrip("\n") + "\n"


def _summary(document: Conformance, ran: Sequence[Implementation]) -> str:
    lineages = {one.lineage for one in ran}
    own = {one.lineage for one in ran if one.kernels == "own"}
    cells = [cell for one in ran for cell in one.executed]
    passed = sum(cell.verdict is Verdict.PASS for cell in cells)
    where = ", ".join(f"{name} {value}" for name, value in document.environment.items())
    return (f"{document.date}: {len(ran)} implementations of {len(lineages)} lineages, {len(own)} of them with kernels "
            f"of their own; {len(cells)} cases ran, {passed} pass, {len(cells) - passed} do not. {where}.\n")


def _overview(ran: Sequence[Implementation]) -> str:
    names = [family.name for family in FAMILIES]
    kinds = {"experts over ranks": "experts over ranks", "probe": "probes", "model": "widths"}
    if any(rows(one.cells, "encoded") for one in ran):
        kinds["encoded"] = "encoded"
    columns = [*names, *kinds.values()]
    lines = ["## By family", "", "Cases that pass, of those that ran: every dtype, tp 1 and 2, both directions; "
             "experts over ranks: ep 2.", "", f"| implementation | packages | {' | '.join(columns)} | same bits |",
             "|" + " --- |" * (len(columns) + 3)]
    for one in ran:
        by_row = {row: [cell for _, cell in cells] for row, cells in rows(one.cells, "family")}
        groups = [by_row.get(name, []) for name in names]
        groups += [[cell for _, cells in rows(one.cells, kind) for _, cell in cells] for kind in kinds]
        same = [cell.same_bits for cell in one.executed if cell.same_bits is not None]
        lines.append(f"| {code(one.name)} | {text_cell(', '.join(one.packages))} | "
                     f"{' | '.join(_share(cells) for cells in groups)} | {sum(same)} of {len(same)} |")
    return "\n".join(lines) + "\n"


def _share(cells: Sequence[Cell]) -> str:
    executed = [cell for cell in cells if cell.verdict in EXECUTED_VERDICTS]
    passed = sum(cell.verdict is Verdict.PASS for cell in executed)
    if not executed:
        return ""
    return f"{passed}/{len(executed)}" if passed == len(executed) else f"**{passed}/{len(executed)}**"


def _left_out(document: Conformance) -> str:
    left = [one for one in document.implementations if not one.executed]
    lines = ["## Not run here", "", f"{len(left)} of {len(document.implementations)} adapters.", "",
             "| implementation | what | why |", "| --- | --- | --- |"]
    lines += [f"| {code(one.name)} | {text_cell(one.what)} | {text_cell(one.lacking or 'no case is supported')} |"
              for one in left]
    return "\n".join(lines) + "\n" if left else ""


_COLUMNS = [(direction, dtype, tp) for direction in Direction for dtype in Dtype for tp in (1, 2)
            if (direction, dtype) != (Direction.BACKWARD, Dtype.FP16)]


def _details(one: Implementation) -> str:
    lines = [f"## {one.name}", "", f"{one.what}. {', '.join(one.packages)}.", ""]
    spread = [column for column in _COLUMNS if column[1] is not Dtype.FP16 and column[2] == 1]
    tables = (("family", _COLUMNS), ("experts over ranks", spread),
              ("probe", [(Direction.FORWARD, dtype, 1) for dtype in (Dtype.FP32, Dtype.BF16)]),
              ("model", [(Direction.FORWARD, dtype, tp) for dtype in (Dtype.BF16, Dtype.FP16) for tp in (1, 2)]),
              ("encoded", [(Direction.FORWARD, Dtype.BF16, tp) for tp in (1, 2)]))
    for kind, columns in tables:
        found = [(row, cells) for row, cells in rows(one.cells, kind)
                 if any(cell.verdict in EXECUTED_VERDICTS for _, cell in cells)]
        if found:
            lines += [f"| {kind} | {' | '.join(_column(*column) for column in columns)} |",
                      "|" + " --- |" * (len(columns) + 1)]
            lines += [f"| {row} | {' | '.join(_at(cells, column) for column in columns)} |" for row, cells in found]
            lines.append("")
    lines += _legend(one)
    return "\n".join(lines) + _failures(one)


def _column(direction: Direction, dtype: Dtype, tp: int) -> str:
    return f"{dtype}{' tp 2' if tp == 2 else ''}{' bwd' if direction is Direction.BACKWARD else ''}"


def _at(cells: Sequence[tuple[ConformanceCase, Cell]], column: tuple[Direction, Dtype, int]) -> str:
    for case, cell in cells:
        if (case.direction, case.dtype, case.tp) == column:
            if cell.verdict is not Verdict.PASS:
                return _WORDS[cell.verdict] + (f" {cell.stage}" if cell.stage else "")
            bits = float(cell.bits)
            return format_ratio(cell.ratio) + (f", {bits:.1f}" if 0 < bits < 1e3 else "")
    return ""


def _legend(one: Implementation) -> list[str]:
    shown = {name: purpose for name, _, purpose in PROBES}
    tried = [f"{row}: {shown[row]}" for row, cells in rows(one.cells, "probe")
             if any(cell.verdict in EXECUTED_VERDICTS - {Verdict.PASS} for _, cell in cells)]
    return [f"Probes that fail here: {'; '.join(tried)}.", ""] if tried else []


def _failures(one: Implementation) -> str:
    """Every failure with its reason and replay command; those with the same words once."""
    grouped: dict[str, list[Cell]] = {}
    for cell in one.failed:
        grouped.setdefault(f"{cell.verdict} {cell.stage} {cell.said}", []).append(cell)
    if not grouped:
        return ""
    lines = ["", "| cases | verdict | why | replay |", "| --- | --- | --- | --- |"]
    for cells in grouped.values():
        first = cells[0]
        lines.append(f"| {len(cells)} | {text_cell(first.verdict)} {text_cell(first.stage)} | "
                     f"{text_cell(first.said, SAID)} | {code(first.replay)} |")
    return "\n".join(lines) + "\n"
