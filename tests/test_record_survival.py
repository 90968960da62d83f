"""No line that was acknowledged is ever lost: kills at any moment, a full disk, a second run, a meddling subject."""

import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import FILE_NAME, RecordWriter, read_run
from tests.command_line import command
from tests.record_writer import write_on
from tests.subjects.misbehaving import TOKENS
from tests.test_records import RUN, case_line

KILLS = 100


@contextmanager
def _killed_later(folder: Path, first: int) -> Iterator[tuple[int, list[int]]]:
    """A process that writes, until it is killed at the end of the block; then the numbers that it told are there."""
    # From a server: a process of many threads is not to be forked.
    context, numbers = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload([write_on.__module__])
    heard, told = context.Pipe(duplex=False)
    process = context.Process(target=write_on, args=(folder, first, told), daemon=True)
    process.start()
    told.close()
    assert heard.recv() == -1
    try:
        yield process.pid or 0, numbers
    finally:
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                numbers.append(heard.recv())


def test_a_hundred_kills_lose_no_acknowledged_line(tmp_path: Path) -> None:
    """At most the line in progress is torn, and the next writer cuts it off."""
    generator, path, first = random.Random(20), tmp_path / FILE_NAME, 0
    for _ in range(KILLS):
        with _killed_later(tmp_path, first) as (_, told):
            time.sleep(generator.uniform(0.0, 0.01))
        written = path.read_bytes().count(b"\n") - 1
        assert list(read_run(path).cases) == [f"v1-{number}" for number in range(written)]
        assert told == list(range(first, first + len(told)))
        assert 0 <= written - first - len(told) <= 1, "one line may be whole and not yet told"
        first = written
        if first > 40:  # short files keep the reading short
            path.unlink()
            first = 0


def test_a_torn_line_of_any_length_is_cut_off(tmp_path: Path) -> None:
    """A kill can leave any part of a line, also a part of a character; what was whole stays byte for byte."""
    with RecordWriter(tmp_path) as writer:
        writer.append(RUN)
    whole = (tmp_path / FILE_NAME).read_bytes()
    line = msgspec.json.encode(case_line("v1-a", message="ü" * 10))
    for length in range(1, len(line), 7):
        (tmp_path / FILE_NAME).write_bytes(whole + line[:length])
        with RecordWriter(tmp_path) as writer:
            writer.append(case_line("v1-b"))
        assert (tmp_path / FILE_NAME).read_bytes() == whole + msgspec.json.encode(case_line("v1-b")) + b"\n"


def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the length of files stands for it: the line in progress is taken back, those before it stay."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RecordWriter(tmp_path) as writer:
        writer.append(RUN)
        writer.append(case_line("v1-a"))
        held = (tmp_path / FILE_NAME).read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(held) + 100, before[1]))
        try:
            with pytest.raises(UsageValueError, match=r"cannot be written: .*; the 2 lines that it held stay whole"):
                writer.append(case_line("v1-b", message="x" * 1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (tmp_path / FILE_NAME).read_bytes() == held
        writer.append(case_line("v1-c"))
    assert list(read_run(tmp_path).cases) == ["v1-a", "v1-c"]


@pytest.mark.parametrize("meddle", [Path.unlink, lambda path: os.truncate(path, 10),
                                    lambda path: path.write_bytes(b"nonsense"),
                                    lambda path: path.rename(path.with_name("elsewhere"))],
                         ids=["removed", "cut", "overwritten", "moved"])
def test_a_record_that_somebody_meddled_with_is_written_anew(tmp_path: Path, meddle: object) -> None:
    """A subject has the same rights as the run that judges it."""
    with RecordWriter(tmp_path) as writer:
        writer.append(RUN)
        writer.append(case_line("v1-a"))
        meddle(tmp_path / FILE_NAME)
        writer.append(case_line("v1-b"))
        with pytest.raises(UsageValueError, match="is writing to it"):
            RecordWriter(tmp_path)
        writer.append(case_line("v1-c"))
    assert list(read_run(tmp_path).cases) == ["v1-a", "v1-b", "v1-c"]


def test_a_record_has_one_writer(tmp_path: Path) -> None:
    """The second hears who the first is; when that has ended, however it did, the next may write."""
    with (_killed_later(tmp_path, 0) as (process, _),
          pytest.raises(UsageValueError, match=rf"process {process}, run r1, is writing to it; wait for its end")):
        RecordWriter(tmp_path)
    RecordWriter(tmp_path).close()


RIGHT = "tests.subjects.right:round_each_stage"
CASES = [f"v1-T5.H32.I48.E4.K2-bf16-norm-s{seed}-tp3" for seed in range(1, 11)]
"""So many that a run which is killed after the first is not at its end, however late the kill is."""


def _verify(folder: Path, *options: str) -> list[str]:
    cases = [part for case in CASES for part in ("--case", case)]
    return ["verify", RIGHT, *cases, "--record", str(folder), "--lanes", "1", *options]


def _executed(path: Path) -> list[str]:
    return [msgspec.json.decode(line, type=CaseLine).case for line in path.read_bytes().splitlines()
            if b'"type":"case"' in line]


def _kill_after(folder: Path, lines: int, seconds: float) -> None:
    """Start a run and kill it some time after its record has that many lines."""
    run = subprocess.Popen([sys.executable, "-m", "moe_ref", *_verify(folder)], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    path, until = folder / FILE_NAME, time.monotonic() + 120
    while lines and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    time.sleep(seconds)
    run.kill()
    run.wait()


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("lines", "seconds"), [(2, 0.1), (0, 1.0), (1, 0.0), (3, 0.15), (1, 0.15)])
def test_a_killed_run_goes_on_where_it_was(lines: int, seconds: float, tmp_path: Path,
                                           capfd: pytest.CaptureFixture[str]) -> None:
    """Exactly the missing cases are executed, none twice, and the record ends whole; killed before it had one, too."""
    _kill_after(tmp_path, lines, seconds)
    path = tmp_path / FILE_NAME
    before = _executed(path) if path.exists() else []
    assert len(before) < len(CASES) or b'"type":"end"' not in path.read_bytes()
    assert command(*_verify(tmp_path, "--resume", "--json")) == 0
    answer = json.loads(capfd.readouterr().out)
    executed = _executed(path)
    assert executed[:len(before)] == before
    assert Counter(executed) == Counter(CASES)
    assert answer["end"]["executed"] == len(CASES)
    run = read_run(path)
    assert run.end is not None
    assert path.read_bytes().endswith(b"\n")


MARKER = "MOE_REF_TEST_KILLED"


def _is_marked(folder: Path, mark: Path) -> bool:
    try:
        return f"{MARKER}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def test_no_child_outlives_a_killed_run(tmp_path: Path) -> None:
    """Also one that hangs: it never looks whether anybody still wants its answer."""
    sleeps = f"v1-T{TOKENS['sleeps']}.H32.I48.E4.K2-bf16-norm"
    run = subprocess.Popen([sys.executable, "-m", "moe_ref", "verify", "tests.subjects.misbehaving:by_tokens", "--case",
                            sleeps, "--record", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env={**os.environ, MARKER: str(tmp_path)})
    until = time.monotonic() + 120
    while not (tmp_path / FILE_NAME).exists() or not (tmp_path / FILE_NAME).read_bytes():
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(1.0)  # the header is there, so the child has its request
    run.kill()
    run.wait()
    until = time.monotonic() + 10
    while any(_is_marked(folder, tmp_path) for folder in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also with --resume, which would do again what the first is about to do; the record stays the first's."""
    with RecordWriter(tmp_path) as writer:
        writer.append(RUN)
        held = (tmp_path / FILE_NAME).read_bytes()
        for options in ((), ("--resume",)):
            assert command(*_verify(tmp_path, *options)) == 2
            assert f"process {os.getpid()}, run r1, is writing to it" in capfd.readouterr().err
        assert (tmp_path / FILE_NAME).read_bytes() == held
