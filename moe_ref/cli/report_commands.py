"""`moe-ref report` and `moe-ref accept`: pages from records, and making a run the baseline."""

import importlib
import json
from pathlib import Path

import click


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
@click.pass_context
def report_command(context: click.Context, runs: tuple[Path, ...], baseline: Path | None, out: Path | None,
                   as_json: bool) -> None:
    """Summarise the records in RUN (several are merged as shards): summary.md, index.html, report.json.

    Exit codes: 0 all as expected; 1 failures, or coverage of the baseline lost; 2 wrong use; 3 harness
    errors only; 4 cut short, or fewer cases executed than the tier's minimum.
    """
    _require_extra("jinja2", "matplotlib")
    from moe_ref.records.store import read_run
    from moe_ref.report.render import render_run
    from moe_ref.report.shards import merge_runs

    folder = runs[0] if runs[0].is_dir() else runs[0].parent
    run = merge_runs([read_run(path) for path in runs])
    click.echo(f"read {len(run.cases)} cases of {len(runs)} run(s), writing pages ...", err=True)
    report = render_run(run, out or folder / "report", baseline)
    click.echo(json.dumps(report.document, indent=1) if as_json else "\n".join(report.head))
    click.echo(f"wrote {', '.join(map(str, report.files))}", err=True)
    context.exit(report.exit_code)


@click.command("accept")
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path, dir_okay=False),
              help="File to write; default: ci/baselines/<implementation>-<device>.json.")
@click.option("--json", "as_json", is_flag=True, help="Print {path, changed, diff} as one JSON document.")
def accept_command(run_path: Path, baseline: Path | None, as_json: bool) -> None:
    """Make RUN the baseline and print what changes in the file; commit it after review."""
    from moe_ref.records.store import read_run
    from moe_ref.report.baseline import baseline_path, write_baseline

    run = read_run(run_path)
    path = baseline or baseline_path(run)
    diff = write_baseline(run, path)
    if as_json:
        click.echo(json.dumps({"path": str(path), "changed": bool(diff), "diff": diff}, indent=1))
    else:
        click.echo(diff + f"{path}: " + ("written; review the diff and commit it" if diff else "unchanged"))
