"""A case without a child process: the same request, reply, measurement and verdict, for a callable that has no name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from moe_ref.verify.child.execute import execute
from moe_ref.verify.child.messages import Request, unpack_runs
from moe_ref.verify.run.case_runner import CannotServe
from moe_ref.verify.run.children import Answer

UNPROTECTED = "this one: nothing ends a hang, survives a crash or keeps the subject from the oracle"
"""What a record says of the process that a case ran in."""


class InProcess:
    """Stands where a pool of children stands; `subject` has `moe` and `CAPABILITIES`. Virtual ranks only."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject

    @contextmanager
    def lease(self, process_ranks: bool) -> Iterator["InProcess"]:
        """Itself; raises CannotServe for process ranks, which a child forks."""
        if process_ranks:
            raise CannotServe("process ranks need a child, and this run is in one process")
        yield self

    def ask(self, request: Request, on_progress: Callable[[str], None] = lambda text: None) -> Answer:
        """What a child answers, with another word on the process."""
        reply, payload = execute(self.subject, request, on_progress)
        guard = reply.guard | {"process": UNPROTECTED}
        return Answer(msgspec.structs.replace(reply, guard=guard), unpack_runs(payload, len(reply.ranks)))

    def close(self) -> None:
        """There is nothing to end."""
