"""The end of what a child prints: held in memory, never on a disk that it could fill."""

import os
import threading
from collections import deque

KEPT_BYTES = 100_000
_READ_BYTES, _END_SECONDS = 1 << 16, 1.0


class LogTail:
    """Whatever is written to `write_end` is read by a thread, and the last KEPT_BYTES of it are kept."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        self._parts: deque[bytes] = deque()
        self._thread = threading.Thread(target=self._read, name="log of a child", daemon=True)

    def started(self) -> None:
        """The child has its own copy of the end it writes to."""
        os.close(self.write_end)
        self._thread.start()

    def _read(self) -> None:
        size = 0
        while part := os.read(self._read_end, _READ_BYTES):
            self._parts.append(part)
            size += len(part)
            while size - len(self._parts[0]) >= KEPT_BYTES:
                size -= len(self._parts.popleft())
        os.close(self._read_end)

    def text(self, ended: bool = False) -> str:
        """What is there; of a child that has ended, everything that it wrote."""
        if ended:
            # Not for ever: a process that the child has left behind may hold its end.
            self._thread.join(_END_SECONDS)
        return b"".join(self._parts.copy())[-KEPT_BYTES:].decode(errors="replace")
