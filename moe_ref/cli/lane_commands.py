"""`lanes`: what continuous integration runs, on which event, and the files of CI systems that say so."""

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import click

from moe_ref.cli.lane_options import event_options, happening_of
from moe_ref.contract.errors import UsageValueError
from moe_ref.lanes.load import LANES, load_lanes
from moe_ref.lanes.schema import Lane
from moe_ref.lanes.select import Choice, select

_FILE = click.option("--lanes", "path", type=click.Path(path_type=Path, dir_okay=False), default=LANES,
                     show_default=True, help="The file of lanes.")
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


@click.group("lanes")
def lanes_command() -> None:
    """Lanes of continuous integration: ci/lanes.yaml."""


@lanes_command.command("list")
@_FILE
@_JSON
def list_command(path: Path, as_json: bool) -> int:
    """Every lane: where, on what event, for how long, how much at least, and why."""
    import msgspec

    file = load_lanes(path)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(file), indent=1))
        return 0
    for name, lane in file.lanes.items():
        click.echo(f"{name:15} {_device(lane):14} {lane.minutes:4} min  {lane.counts.minimum:6} {lane.counts.what:13}"
                   f"{', '.join(lane.triggers):33} {lane.purpose}")
    return 0


def _device(lane: Lane) -> str:
    if not lane.device.gpus:
        return "cpu"
    return f"{lane.device.gpus} GPU" + f" {lane.device.architecture}" * (lane.device.architecture != "any")


@lanes_command.command("select")
@_FILE
@event_options
@_JSON
def select_command(path: Path, workflow: str | None, as_json: bool, **event_words: Any) -> int:
    """Which lanes an event runs, and why the others are left out.

    --json: {lanes: [names], matrix: {include: [{lane, gpus, minutes, runners}]}, left_out: {name: reason}}.
    """
    file = load_lanes(path)
    choices = select(file, happening_of(file, event_words), workflow)
    if as_json:
        click.echo(json.dumps(_document(choices)))
        return 0
    for one in choices:
        click.echo(f"run       {one.name}: {one.lane.purpose}" if one.runs else f"left out  {one.name}: {one.reason}")
    click.echo(f"{sum(one.runs for one in choices)} of {len(choices)} lanes run")
    return 0


def _document(choices: tuple[Choice, ...]) -> dict[str, object]:
    chosen = [one for one in choices if one.runs]
    return {"lanes": [one.name for one in chosen],
            "matrix": {"include": [{"lane": one.name, "gpus": one.lane.device.gpus, "minutes": one.lane.minutes,
                                    "runners": list(one.lane.runners)} for one in chosen]},
            "left_out": {one.name: one.reason for one in choices if not one.runs}}


@lanes_command.command("run")
@click.argument("name", metavar="LANE")
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="Folder for lane.json, the lane's records and its report.")
@_FILE
@_JSON
def run_command(name: str, record: Path, path: Path, as_json: bool) -> int:
    """Run the command of LANE within its minutes, count what it executed, make its report, write lane.json.

    Exit codes: those of the command; 4 also where its device is not here (NOT RUN), it executed fewer than its
    minimum, or its minutes were over.
    """
    import msgspec

    from moe_ref.lanes.run import run_lane, words_of

    file = load_lanes(path)
    if name not in file.lanes:
        raise UsageValueError(f"lane {name!r}, but {path} has {', '.join(file.lanes)}")
    _interrupt_on_terminate()
    done = run_lane(name, file.lanes[name], record, lambda text: click.echo(text, err=as_json))
    click.echo(msgspec.json.encode(done).decode() if as_json else words_of(done))
    return done.exit_code


def _interrupt_on_terminate() -> None:
    """CI systems end a job with SIGTERM: lane.json is to be written all the same."""
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@lanes_command.command("check")
@_FILE
def check_command(path: Path) -> int:
    """Whether the generated files are those that the lanes give; exit code 1 with a line per file that is not."""
    from moe_ref.lanes.generate import generated, stale

    wrong = stale(generated(load_lanes(path), path))
    for text in wrong:
        click.echo(f"{text}; `moe-ref lanes write` makes it")
    return 1 if wrong else 0


@lanes_command.command("write")
@_FILE
def write_command(path: Path) -> int:
    """Write the generated files: workflows of GitHub Actions, the pipeline of Buildkite."""
    from moe_ref.lanes.generate import generated

    for target, text in generated(load_lanes(path), path).items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        click.echo(f"wrote {target}")
    return 0
