"""Runs the steps of the GPU lane, each in its own processes and its share of the time; called again it goes on.

usage: python -m ci.gpu_lane FOLDER [--rehearse] [--steps NAME,NAME], or ci/gpu
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO

import click
import msgspec
import torch
from rich.console import Console
from rich.table import Table

from ci.gpu_evidence import pack
from ci.gpu_steps import STEPS, TOTAL_SECONDS, Command, Place, Step, nccl_words
from moe_ref.records.store import RecordWriter, whole_lines
from moe_ref.verify.child.rank_process import end_with

ROOT = Path(__file__).resolve().parents[1]
STEPS_FILE, LOGS, SUMMARY = "steps.jsonl", "logs", "summary.txt"
TIMED_OUT, INCOMPLETE, HARNESS = 124, 4, 3
VERDICTS = {0: "PASS", 1: "FAIL", 2: "WRONG USE", HARNESS: "HARNESS ERROR", INCOMPLETE: "INCOMPLETE",
            TIMED_OUT: "TIMED OUT"}
DONE = (0, 1)
"""Exit codes of what would only give the same again."""
GRACE_SECONDS = 5.0
_SHOWN_LINES, _WIDTH, _COMMAND = 12, 150, "$ "


class StepLine(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a step in one call. digest: of sources, versions and device; said: the last line of its log."""

    step: str
    started: str
    seconds: float
    digest: str
    exit_code: int | None = None
    not_run: str = ""
    said: str = ""

    @property
    def verdict(self) -> str:
        return "NOT RUN" if self.exit_code is None else VERDICTS.get(self.exit_code, "CRASHED")

    def lane_code(self, required: bool) -> int:
        """What it makes of the lane: a step that was killed is incomplete, one that died an error of the harness."""
        if self.exit_code is None:
            return INCOMPLETE if required else 0
        return INCOMPLETE if self.exit_code == TIMED_OUT else self.exit_code if self.exit_code in VERDICTS else HARNESS


def read_steps(folder: Path) -> dict[str, StepLine]:
    """The last line of every step."""
    path = folder / STEPS_FILE
    lines = whole_lines(path).splitlines() if path.exists() else []
    return {line.step: line for line in (msgspec.json.decode(text, type=StepLine) for text in lines)}


def digest_of(place: Place) -> str:
    """Over everything that a result follows from."""
    hasher = hashlib.sha256()
    device = torch.cuda.get_device_name(0) if place.num_devices else "cpu"
    hasher.update(" ".join([sys.version, version("torch"), version("triton"), device, str(place.num_devices)]).encode())
    folders = ("moe_ref", "moe_fast", "ci", "tests/subjects", "tests/catalogue")
    files = [path for folder in folders for suffix in ("py", "yaml") for path in (ROOT / folder).rglob(f"*.{suffix}")]
    for path in sorted([*files, ROOT / "tolerances.yaml"]):
        hasher.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return hasher.hexdigest()[:16]


def run_lane(steps: Sequence[Step], place: Place, total: float = TOTAL_SECONDS,
             digest: str | None = None) -> list[StepLine]:
    """One line for each step: of this call, or of an earlier one that left nothing to do. None stops the others."""
    began, digest, has_run = time.monotonic(), digest or digest_of(place), False
    place.folder.mkdir(parents=True, exist_ok=True)
    before, lines = read_steps(place.folder), list[StepLine]()
    missing = {step.name: _guarded(step, place) for step in steps}
    shares = {step.name: step.seconds * total / TOTAL_SECONDS for step in steps
              if not missing[step.name] and (step.last or not _is_done(before.get(step.name), digest))}
    with RecordWriter(place.folder, STEPS_FILE) as writer:
        for number, step in enumerate(steps):
            earlier = before.get(step.name)
            if earlier and _is_done(earlier, digest) and not (step.last and has_run):
                click.echo(f"== {step.name}: {earlier.verdict} on {earlier.started}, nothing to do")
                lines.append(earlier)
                continue
            kept = sum(shares.get(later.name, 0.0) for later in steps[number + 1:])
            seconds, why = total - (time.monotonic() - began) - kept, missing[step.name]
            if not why and seconds < step.least:
                why = f"{max(0.0, seconds):.0f} s were left for it, and it wants {step.least:.0f}; call again"
            if why:
                line = StepLine(step=step.name, started=_now(), seconds=0.0, digest=digest, not_run=why)
            else:
                line, has_run = _run_step(step, place, seconds, earlier, digest), True
            click.echo(f"== {step.name}: {line.verdict} after {line.seconds:.0f} s  {line.not_run or line.said}")
            writer.append(line)
            lines.append(line)
    return lines


def _guarded(step: Step, place: Place) -> str:
    try:
        return step.missing(place)
    except Exception as error:
        return f"cannot tell whether it can run: {type(error).__name__}: {error}"


def _is_done(line: StepLine | None, digest: str) -> bool:
    return line is not None and line.digest == digest and line.exit_code in DONE


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _run_step(step: Step, place: Place, seconds: float, earlier: StepLine | None, digest: str) -> StepLine:
    began, started = time.monotonic(), _now()
    folder, log = place.folder / step.name, place.folder / LOGS / f"{step.name}.log"
    if folder.exists() and not (step.goes_on and earlier and earlier.digest == digest):
        shutil.rmtree(folder)
    for made in (folder, log.parent):
        made.mkdir(parents=True, exist_ok=True)
    click.echo(f"== {step.name}: {step.what}, at most {seconds:.0f} s")
    codes = []
    with log.open("ab") as stream:
        start = stream.tell()
        try:
            for command in step.commands(place, seconds):
                left = seconds - (time.monotonic() - began)
                codes.append(_run(command, place, folder, stream, left) if left > 0 else TIMED_OUT)
        except Exception as error:
            stream.write(f"{type(error).__name__}: {error}\n".encode())
            codes.append(HARNESS)
    shown = _last_lines(log, start)
    code = next((one for one in codes if one not in VERDICTS), max(codes, default=0))
    if code:
        click.echo("\n".join(f"   | {line}" for line in shown))
    return StepLine(step=step.name, started=started, seconds=round(time.monotonic() - began, 1), digest=digest,
                    exit_code=code, said=shown[-1].strip() if shown else _written(folder))


def _written(folder: Path) -> str:
    """For a step that says nothing."""
    return f"wrote {', '.join(sorted(file.name for file in folder.iterdir()))}" if any(folder.iterdir()) else ""


def _last_lines(log: Path, start: int) -> list[str]:
    with log.open("rb") as stream:
        stream.seek(start)
        text = stream.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip() and not line.startswith(_COMMAND)][-_SHOWN_LINES:]


def _run(command: Command, place: Place, folder: Path, log: IO[bytes], seconds: float) -> int:
    """The exit code, or 124 where it was ended; what it has started ends with it, and it with this process."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "MOE_LANE": os.environ.get("MOE_LANE") or place.lane, "PYTHONUNBUFFERED": "1"} | command.environment
    # Its kernels would be interpreted, and on a GPU that is nothing.
    environment.pop("TRITON_INTERPRET", None)
    log.write(f"{_COMMAND}{' '.join([*command.under, 'python', *command.arguments])}\n".encode())
    log.flush()
    with (folder / command.stdout).open("wb") if command.stdout else os.fdopen(os.dup(log.fileno()), "ab") as output:
        process = subprocess.Popen([*command.under, sys.executable, *command.arguments], cwd=ROOT, env=environment,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=log, start_new_session=True,
                                   preexec_fn=partial(end_with, os.getpid()))
        try:
            return process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            # The verbs take it for an interrupt and leave their records whole.
            _signal(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            return TIMED_OUT
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def table_of(steps: Iterable[Step], lines: Iterable[StepLine]) -> Table:
    """A row for each step."""
    what = {step.name: step.what for step in steps}
    table = Table(title="GPU lane", title_justify="left")
    for name in ("step", "verdict", "seconds", "what", "said"):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for line in lines:
        table.add_row(line.step, line.verdict, f"{line.seconds:.0f}", what[line.step], line.not_run or line.said)
    return table


def _remarks(place: Place, lines: Iterable[StepLine]) -> list[str]:
    """What to know before the table is believed."""
    found = {line.step: line for line in lines}
    setup, said = found.get("setup"), list[str]()
    if setup and setup.exit_code not in (0, None):
        said.append(f"SET-UP FAILED: {setup.said}. Read {LOGS}/setup.log first: what follows may have the same cause.")
    if "nccl" in found and place.num_devices:
        said.append(f"nccl: {nccl_words(place.num_devices)}.")
    return said


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--rehearse", is_flag=True, help="The same steps in tiny form on a CPU.")
@click.option("--steps", "names", help=f"Only these, with commas: {','.join(step.name for step in STEPS)}.")
@click.option("--seconds", type=click.FloatRange(1), default=TOTAL_SECONDS, show_default=True, help="For all steps.")
def main(folder: Path, rehearse: bool, names: str | None, seconds: float) -> None:
    """Fill FOLDER with records, logs, pages and evidence.tar.gz, which holds all of them.

    Exit code: the worst of the steps'; 4 where a required step was not run.
    """
    if not rehearse and not torch.cuda.is_available():
        raise click.ClickException("no CUDA device here; --rehearse runs the same steps in tiny form on a CPU")
    wanted = names.split(",") if names else [step.name for step in STEPS]
    if unknown := [name for name in wanted if name not in {step.name for step in STEPS}]:
        raise click.ClickException(f"--steps {','.join(unknown)}: no such step")
    steps, cores = [step for step in STEPS if step.name in wanted], os.cpu_count() or 1
    place = Place(folder.resolve(), 0 if rehearse else torch.cuda.device_count(),
                  min(2, cores) if rehearse else max(1, min(12, cores - 2)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        lines = run_lane(steps, place, seconds)
    except KeyboardInterrupt:
        click.echo(f"interrupted; what was done is kept, another call goes on\n{pack(place.folder)}")
        sys.exit(130)
    remarks = _remarks(place, lines)
    with (place.folder / SUMMARY).open("w") as file:
        for console in (Console(width=_WIDTH), Console(width=_WIDTH, file=file)):
            console.print(table_of(steps, lines))
            console.print(*remarks, sep="\n", markup=False, highlight=False)
    click.echo(pack(place.folder))
    sys.exit(max(line.lane_code(step.required) for step, line in zip(steps, lines, strict=True)))


if __name__ == "__main__":
    main()
