"""Records to files: summary.md, index.html, junit.xml and report.json, and what the command line prints of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.store import FILE_NAME, Run, read_run
from moe_ref.report.baseline import Baseline, baseline_of, baseline_path, device_class
from moe_ref.report.baseline_file import read_baseline
from moe_ref.report.compare import Comparison, compare
from moe_ref.report.document import document, json_text
from moe_ref.report.evidence import Evidence, unique_names
from moe_ref.report.head import FAILED, HARNESS_ERROR, PASS, TOO_FEW, exit_code, head_lines
from moe_ref.report.junit import junit
from moe_ref.report.lanes import lane_document, with_lanes
from moe_ref.report.markdown import block
from moe_ref.report.others import with_others
from moe_ref.report.page import page
from moe_ref.report.speed import compare_speeds
from moe_ref.report.summary import summary


@dataclass(frozen=True)
class Report:
    """The five head lines, the exit code (see head.exit_code), the data of report.json, the files written."""

    head: tuple[str, ...]
    exit_code: int
    document: dict[str, object]
    files: tuple[Path, ...]


def render(run_path: Path, out: Path, baseline: Path | None = None) -> Report:
    """Report the run in a record file or its folder into `out`; see `render_evidence`."""
    return render_evidence(Evidence(read_run(run_path)), out, baseline)


def render_all(evidences: Sequence[Evidence], out: Path, baseline: Path | None = None,
               tell: Callable[[str], None] = lambda words: None) -> dict[str, Report]:
    """One report into `out`; several into folders of it, by their names, with the head lines of all in summary.md.

    Of several, a baseline that is one file or run is that of those which it names. See `render_evidence`.
    """
    if len(evidences) == 1:
        return {evidences[0].name: render_evidence(evidences[0], out, baseline, tell)}
    reports = {}
    for name, evidence in zip(unique_names(evidences), evidences, strict=True):
        accepted = find_baseline(evidence.run, baseline) if baseline else None
        own = baseline if accepted is None or _is_of(accepted, evidence.run) else None
        reports[name] = render_evidence(evidence, out / name, own, tell)
    if baseline and not baseline.is_dir() and not any(report.document["comparison"] for report in reports.values()):
        raise UsageValueError(f"{baseline}: is the baseline of none of {', '.join(reports)}")
    _write(out / "summary.md", (f"## [{name}]({name}/index.html)\n\n{block(chr(10).join(report.head))}\n\n"
                                for name, report in reports.items()))
    return reports


def worst_exit_code(reports: Iterable[Report]) -> int:
    """Of all reports: failures before harness errors and refused records before too few executed."""
    codes = {report.exit_code for report in reports}
    return next((code for code in (FAILED, HARNESS_ERROR, TOO_FEW) if code in codes), PASS)


def _is_of(baseline: Baseline, run: Run) -> bool:
    return (baseline.implementation, baseline.device) == (run.header.implementation.name, device_class(run.header))


def render_evidence(evidence: Evidence, out: Path, baseline: Path | None = None,
                    tell: Callable[[str], None] = lambda words: None) -> Report:
    """Write summary.md, index.html, junit.xml and report.json into `out`, which is made if need be.

    tell: gets a word before each step. Raises UsageValueError where the baseline cannot be read, or not be compared.
    """
    run = evidence.run
    tell("comparing")
    accepted = find_baseline(run, baseline) if baseline else None
    comparison = _with_speed(compare(run, accepted), evidence, baseline) if accepted and baseline else None
    missing = baseline_path(run, baseline).name if baseline and not accepted else ""
    head, code = head_lines(run, comparison, accepted, missing), exit_code(run, comparison)
    head, code = with_lanes(*with_others(head, code, evidence), evidence.lanes)
    data = document(run, head, code, comparison) | {"lanes": lane_document(evidence.lanes)}
    texts: dict[str, Callable[[], Iterable[str]]] = {
        "summary.md": lambda: [summary(run, head, comparison, evidence.lanes)],
        "index.html": lambda: [page(evidence, head, comparison)],
        "junit.xml": lambda: junit(run, comparison),
        "report.json": lambda: [json_text(data)]}
    for name, pieces in texts.items():
        tell(f"writing {name}")
        _write(out / name, pieces())
    return Report(head, code, data, tuple(out / name for name in texts))


def _write(path: Path, pieces: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(pieces)


def _with_speed(comparison: Comparison, evidence: Evidence, baseline: Path) -> Comparison:
    """The comparison with that of benchmarks, whose accepted speeds lie in a folder of baselines."""
    if not baseline.is_dir() or (baseline / FILE_NAME).exists():
        return comparison
    speed, notes = compare_speeds(evidence.bench, baseline)
    return replace(comparison, speed=speed, notes=comparison.notes + notes)


def find_baseline(run: Run, path: Path) -> Baseline | None:
    """A baseline file; the file for this implementation and device in a folder; or another run's records.

    None where a folder holds baselines, but nothing was accepted for this implementation and device yet.
    """
    if path.is_dir():
        if (path / FILE_NAME).exists():
            return baseline_of(read_run(path))
        folder, path = path, baseline_path(run, path)
        if not path.is_file() and any(map(_is_baseline, folder.glob("*.json"))):
            return None
    return read_baseline(path)


def _is_baseline(path: Path) -> bool:
    try:
        read_baseline(path)
    except UsageValueError:
        return False
    return True
