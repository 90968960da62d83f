"""What a child's output says about its end, cut down to the lines a person needs."""

import re
import signal
from pathlib import Path

_LINE_LIMIT = 160
_FRAME = re.compile(r'^  File "(?P<path>[^"]+)", line (?P<line>\d+),? in (?P<function>.+)$')
_NOT_THE_CAUSE = ("/threading.py", "/contract/local_comm.py", "/contract/torch_comm.py", "/contract/comm.py",
                  "/verify/child/", "/selectors.py", "<frozen ", "/multiprocessing/", "/concurrent/futures/",
                  "/contextlib.py", "/torch/distributed/", "/moe_ref/__main__.py")


def cut_lines(text: str, most: int) -> str:
    """The last `most` lines that say something, each cut to a readable length."""
    lines = [line if len(line) <= _LINE_LIMIT else line[:_LINE_LIMIT - 3] + "..."
             for line in text.splitlines() if line.strip(" ^~") and not line.startswith("Extension modules:")]
    return "\n".join(lines[-most:])


def innermost_frames(dump: str) -> list[str]:
    """Of every thread in a faulthandler dump, the innermost frame that is neither ours nor a wait in the library."""
    frames, waiting = [], False
    for line in dump.splitlines():
        if line.endswith("(most recent call first):"):
            waiting = True
        match = _FRAME.match(line)
        if match and waiting and _can_be_cause(match):
            waiting = False
            if _place(match) not in frames:
                frames.append(_place(match))
    return frames


def raising_frame(trace: str) -> str:
    """Of a traceback, the innermost frame that is neither ours nor in the library; "" if there is none."""
    matches = filter(None, map(_FRAME.match, reversed(trace.splitlines())))
    return next((_place(match) for match in matches if _can_be_cause(match)), "")


def _can_be_cause(match: re.Match) -> bool:
    return not any(part in match["path"] for part in _NOT_THE_CAUSE)


def _place(match: re.Match) -> str:
    """The last parts of the path only: as many as tell files apart in a line of limited length."""
    return f"in {match['function']}, {'/'.join(Path(match['path']).parts[-2:])}:{match['line']}"


def describe_exit(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    if code < 0:
        named = -code in {one.value for one in signal.Signals}
        return f"was killed by {signal.Signals(-code).name if named else f'signal {-code}'}"
    if code == 0:
        return "was ended by the implementation (exit code 0)"
    return f"ended with exit code {code}"
