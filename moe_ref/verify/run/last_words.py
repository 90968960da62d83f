"""What a child's output says about its end, cut down to the lines a person needs."""

import re
import signal

_LINE_LIMIT = 160
_FRAME = re.compile(r'^  File "(?P<path>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_NOT_THE_CAUSE = ("/threading.py", "/local_comm.py", "/verify/child/", "/selectors.py", "<frozen ", "/multiprocessing/",
                  "/concurrent/futures/", "/moe_ref/__main__.py")


def cut_lines(text: str, most: int) -> str:
    """The last `most` non-empty lines, each cut to a readable length."""
    lines = [line if len(line) <= _LINE_LIMIT else line[:_LINE_LIMIT - 3] + "..."
             for line in text.splitlines() if line.strip() and not line.startswith("Extension modules:")]
    return "\n".join(lines[-most:])


def innermost_frames(dump: str) -> list[str]:
    """Of every thread in a faulthandler dump, the innermost frame that is neither ours nor a wait in the library."""
    frames, waiting = [], False
    for line in dump.splitlines():
        if line.endswith("(most recent call first):"):
            waiting = True
        match = _FRAME.match(line)
        if match and waiting and not any(part in match["path"] for part in _NOT_THE_CAUSE):
            waiting = False
            place = f"in {match['function']}, {match['path']}:{match['line']}"
            if place not in frames:
                frames.append(place)
    return frames


def describe_exit(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code == 0:
        return "was ended by the implementation (exit code 0)"
    return f"ended with exit code {code}"
