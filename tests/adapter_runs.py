"""Cases of the tier conformance by an adapter, through the command line: its library is loaded in a child process."""

import json
from pathlib import Path

from tests.command_line import command

LAYER = "v1-T33.H128.I256.E8.K2"
"""A layer of the tier without its dtype and words."""


def verdicts(implementation: str, folder: Path, *cases: str) -> dict[str, str]:
    """Case id -> verdict, on virtual ranks, with the reason after it where there is one."""
    named = [part for case in cases for part in ("--case", case)]
    command("verify", implementation, "--ranks", "local", "--minimum", "1", "--record", str(folder), *named)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    found = {line["case"]: line for line in lines if "verdict" in line and "case" in line}
    return {case: ": ".join(filter(None, (found[case]["verdict"], found[case].get("reason")))) for case in cases}
