"""`moe-ref report` and `moe-ref accept`: pages from records, and making a run the baseline."""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_ref.cli.lane_options import chosen_lanes, lane_options

if TYPE_CHECKING:
    from moe_ref.report.accept import Acceptance


def _require_extra(*modules: str) -> None:
    """Say which extra is missing before any record is read."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise click.ClickException(f"reports need {module}, which cannot be imported ({error}); "
                                       "install moe-ref[reports]") from error


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path),
              help="Baseline file, folder of baselines (ci/baselines), or another run.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder for the pages; default: report/ in the first RUN's folder.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of the head lines.")
@click.option("--history", type=click.Path(path_type=Path, dir_okay=False), help="Database of `moe-ref history add`.")
@lane_options
@click.pass_context
def report_command(context: click.Context, runs: tuple[Path, ...], baseline: Path | None, out: Path | None,
                   as_json: bool, history: Path | None, **lane_words: Any) -> None:
    """Summarise all records in and below RUN: summary.md, index.html, junit.xml, report.json.

    Runs of one implementation on one device are merged; of several, each has a folder. Exit codes: 0 all as
    expected; 1 failures, coverage of the baseline lost, or bounds looser than accepted; 2 wrong use; 3 harness errors
    or refused records only; 4 cut short, fewer cases executed than the tier's minimum, or a lane that did not run.
    """
    _require_extra("jinja2", "matplotlib")
    from moe_ref.records.gather import gather
    from moe_ref.report.document import json_text
    from moe_ref.report.evidence import build_evidence
    from moe_ref.report.history import read_past
    from moe_ref.report.lane_report import render_lanes
    from moe_ref.report.render import render_all, worst_exit_code

    folder = runs[0] if runs[0].is_dir() else runs[0].parent
    out = out or folder / "report"
    lanes = chosen_lanes(lane_words, runs)
    past = read_past(history) if history else None
    _tell("reading")
    gathered = gather(runs)
    if lanes and not gathered.runs:
        reports = {"lanes": render_lanes(lanes, out)}
    else:
        _tell(f"merging {len(gathered.runs)} run(s) with {sum(len(run.cases) for run in gathered.runs)} cases")
        reports = render_all(build_evidence(gathered, lanes, past), out, baseline, _tell)
    documents = {name: report.document for name, report in reports.items()}
    if as_json:
        click.echo(json_text(documents if len(documents) > 1 else next(iter(documents.values()))), nl=False)
    else:
        click.echo("\n\n".join("\n".join(report.head) for report in reports.values()))
    _tell(f"wrote {', '.join(str(file) for report in reports.values() for file in report.files)}")
    context.exit(worst_exit_code(reports.values()))


def _tell(words: str) -> None:
    """A step, on standard error."""
    click.echo(words, err=True)


@click.command("accept")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path, dir_okay=False),
              help="File to write; default: ci/baselines/<implementation>-<device>.json, and bench-... of a benchmark.")
@click.option("--dry-run", is_flag=True, help="Say what would change and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document: {path, changed, written, words, diff}.")
def accept_command(runs: tuple[Path, ...], baseline: Path | None, dry_run: bool, as_json: bool) -> None:
    """Make RUN the baseline: say what changes, then show the diff of the file; commit it after review.

    RUN: records of `verify`, several of which are merged as shards, or of one `bench`.
    """
    acceptance = _acceptance(runs, baseline)
    changed = bool(acceptance.diff)
    written = changed and not dry_run
    if written:
        acceptance.write()
    if as_json:
        click.echo(json.dumps({"path": str(acceptance.path), "changed": changed, "written": written,
                               "words": acceptance.words, "diff": acceptance.diff}, indent=1))
        return
    told = "written; review the diff and commit it" if written else "would change" if changed else "unchanged"
    click.echo("\n".join(acceptance.words) + f"\n\n{acceptance.diff}{acceptance.path}: {told}")


def _acceptance(runs: tuple[Path, ...], baseline: Path | None) -> "Acceptance":
    from moe_ref.contract.errors import UsageValueError
    from moe_ref.records.bench import read_bench
    from moe_ref.records.runs import is_bench
    from moe_ref.records.store import read_run
    from moe_ref.report.accept import accept_bench, accept_run
    from moe_ref.report.baseline import baseline_path
    from moe_ref.report.shards import merge_runs
    from moe_ref.report.speed_baseline import speed_path

    benches = [path for path in runs if is_bench(path)]
    if benches and len(runs) > 1:
        raise UsageValueError(f"{benches[0]} is a benchmark, given with {len(runs) - 1} other records; accept it alone")
    if benches:
        bench = read_bench(benches[0])
        return accept_bench(bench, baseline or speed_path(bench))
    run = merge_runs([read_run(path) for path in runs])
    return accept_run(run, baseline or baseline_path(run))
