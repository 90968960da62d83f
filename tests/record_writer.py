"""What a process does that only writes a record, until it is killed; apart, since it should load fast."""

from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from moe_ref.records.store import RecordWriter, holds_lines
from tests.test_records import RUN, case_line


def write_on(folder: Path, first: int, told: Connection) -> None:
    """Write lines from number `first` on, and tell each whose append has returned; -1 before the first."""
    with RecordWriter(folder) as writer:
        if not holds_lines(writer.path):
            writer.append(RUN)
        told.send(-1)
        for number in count(first):
            # Of many pages, so that a kill can fall into the middle of one.
            writer.append(case_line(f"v1-{number}", message="x" * 100_000))
            told.send(number)
