"""The command line in this process: the entry point itself, without the seconds in which a new process loads torch."""

import signal
import sys

import pytest

from moe_ref.cli.main import main


def command(*arguments: str) -> int:
    """The exit code of `moe-ref ARGUMENTS`; what it prints goes where this process prints."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moe-ref", *arguments])
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
    assert isinstance(ended.value.code, int)
    return ended.value.code
