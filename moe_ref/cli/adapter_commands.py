"""`adapters`: implementations that no one here wrote: what is installed, a run of all, the conformance table."""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_ref.adapters.catalogue import ADAPTERS, Adapter
from moe_ref.contract.errors import UsageValueError

if TYPE_CHECKING:
    from moe_ref.tiers.tiers import PlannedCase

LEFT_OUT = "left_out.json"


@click.group("adapters")
def adapters_command() -> None:
    """Implementations of other projects, behind the contract's API."""


@adapters_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def list_command(as_json: bool) -> int:
    """Every adapter: what it needs, what of that is installed, where it runs."""
    if as_json:
        click.echo(json.dumps([{"name": one.name, "what": one.what, "kernels": one.kernels, "lineage": one.lineage,
                                "devices": list(one.devices), "needs": [library.versions for library in one.libraries],
                                "found": {library.distribution: library.found() for library in one.libraries},
                                "lacking": one.lacking()} for one in ADAPTERS], indent=1))
        return 0
    for one in ADAPTERS:
        found = ", ".join(f"{library.distribution} {library.found()}" for library in one.libraries)
        click.echo(f"{one.name:24} {'+'.join(one.devices):9} {one.lacking() or found}")
    ready = sum(one.lacking() is None for one in ADAPTERS)
    click.echo(f"{ready} of {len(ADAPTERS)} adapters have what they need")
    return 0


@adapters_command.command("run")
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="A folder below it for each adapter; started again it goes on.")
@click.option("--only", multiple=True, help="An adapter; may be given several times.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--lanes", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), show_default=True,
              help="Processes that run cases side by side.")
@click.option("--case", "case_ids", multiple=True, help="A case of the tier; may be given several times.")
@click.option("--deadline", type=float, default=math.inf,
              help="Seconds after which no further case is started, those of all adapters together.")
@click.option("--minimum", type=click.IntRange(0), default=1, show_default=True,
              help="Adapters that must run at least.")
def run_command(record: Path, only: tuple[str, ...], device: str, lanes: int, case_ids: tuple[str, ...],
                deadline: float, minimum: int) -> int:
    """Judge every adapter that has what it needs on the tier conformance; the others are counted, with the reason."""
    from moe_ref.cli.verify_commands import run_and_tell
    from moe_ref.verify.run.environment import default_device
    from moe_ref.verify.run.run import Plan
    chosen, device = _chosen(only), default_device() if device == "auto" else device
    left_out, codes, end = {}, {}, time.monotonic() + deadline
    shared = Plan(implementation="", cases=_cases(case_ids), tier="conformance", minimum_executed=1, device=device,
                  lanes=lanes, resume=True, lane=os.environ.get("MOE_LANE", ""))
    for one in chosen:
        reason = one.lacking() or ("" if device in one.devices else f"runs on {'+'.join(one.devices)} only")
        if reason:
            left_out[one.name] = reason
            continue
        codes[one.name] = run_and_tell(replace(shared, implementation=one.name, record=record / one.name,
                                               deadline=max(0.0, end - time.monotonic())))
    record.mkdir(parents=True, exist_ok=True)
    (record / LEFT_OUT).write_text(json.dumps(left_out, indent=1) + "\n")
    for name, reason in left_out.items():
        click.echo(f"not run: {name}: {reason}")
    failed = [name for name, code in codes.items() if code]
    click.echo(f"{'FAIL' if failed else 'PASS'}  {len(codes)} of {len(chosen)} adapters ran, {len(left_out)} not; "
               f"{len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    if len(codes) < minimum:
        click.echo(f"FEWER than the {minimum} adapters required ran")
        return 4
    return max(codes.values(), default=0)


def _chosen(only: tuple[str, ...]) -> list[Adapter]:
    known = {one.name: one for one in ADAPTERS}
    if unknown := [name for name in only if name not in known]:
        raise UsageValueError(f"unknown adapter {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[name] for name in only] if only else list(ADAPTERS)


def _cases(case_ids: tuple[str, ...]) -> "list[PlannedCase]":
    from moe_ref.tiers.tiers import tier
    known = {one.case_id: one for one in tier("conformance").cases}
    if unknown := [name for name in case_ids if name not in known]:
        raise UsageValueError(f"{', '.join(unknown)}: not in the tier conformance; `moe-ref verify` takes any case")
    return [known[name] for name in case_ids] if case_ids else list(known.values())


@adapters_command.command("table")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "document_file", type=click.Path(path_type=Path, dir_okay=False),
              help="Write the table as data, as ci/baselines/conformance.json.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the page, as docs/conformance.md.")
def table_command(folder: Path, document_file: Path | None, out: Path | None) -> int:
    """The conformance table of what `adapters run --record FOLDER` recorded; printed unless --out is given."""
    import msgspec

    from moe_ref.records.store import FILE_NAME, read_run
    from moe_ref.report.conformance import conformance
    from moe_ref.report.conformance_page import conformance_page
    paths = [folder / one.name / FILE_NAME for one in ADAPTERS]
    runs = [read_run(path) for path in paths if path.exists()]
    left_out = folder / LEFT_OUT
    lacking = msgspec.json.decode(left_out.read_bytes(), type=dict[str, str]) if left_out.exists() else {}
    document = conformance(runs, lacking)
    if document_file:
        document_file.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    page = conformance_page(document)
    if out:
        out.write_text(page)
    else:
        click.echo(page, nl=False)
    return 0
