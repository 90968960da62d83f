"""Records to files: summary.md, index.html and report.json, and what the command line prints of them."""

import json
from dataclasses import dataclass
from pathlib import Path

from moe_ref.records.store import FILE_NAME, Run, read_run
from moe_ref.report.baseline import Baseline, baseline_of, baseline_path, read_baseline
from moe_ref.report.compare import compare
from moe_ref.report.document import document
from moe_ref.report.head import exit_code, head_lines
from moe_ref.report.page import page
from moe_ref.report.summary import summary


@dataclass(frozen=True)
class Report:
    """The five head lines, the exit code (see head.exit_code), the data of report.json, the files written."""

    head: tuple[str, ...]
    exit_code: int
    document: dict[str, object]
    files: tuple[Path, ...]


def render(run_path: Path, out: Path, baseline: Path | None = None) -> Report:
    """Report the run in a record file or its folder into `out`; see `render_run`."""
    return render_run(read_run(run_path), out, baseline)


def render_run(run: Run, out: Path, baseline: Path | None = None) -> Report:
    """Write summary.md, index.html and report.json into `out`, which is made if need be.

    Raises UsageValueError where records or baseline cannot be read, or cannot be compared.
    """
    accepted = find_baseline(run, baseline) if baseline else None
    comparison = compare(run, accepted) if accepted else None
    head, code = head_lines(run, comparison, accepted), exit_code(run, comparison)
    data = document(run, head, code, comparison)
    texts = {"summary.md": summary(run, head, comparison), "index.html": page(run, head, comparison),
             "report.json": json.dumps(data, indent=1) + "\n"}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return Report(head, code, data, tuple(out / name for name in texts))


def find_baseline(run: Run, path: Path) -> Baseline:
    """A baseline file; the file for this implementation and device in a folder; or another run's records."""
    if path.is_dir():
        if (path / FILE_NAME).exists():
            return baseline_of(read_run(path))
        path = baseline_path(run, path)
    return read_baseline(path)
