"""The accepted resources of every combination, one line each, per Triton version; and what got worse since."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton

from moe_fast.compile.resources import Resources
from moe_ref.contract.errors import UsageValueError

MORE_REGISTERS = 1.10
"""How far registers may grow before it counts as worse: ptxas moves by a few with every change of a kernel."""

BASELINES = Path("ci/baselines")
"""Where accepted tables are, from the root of a checkout."""

_COLUMNS = ("registers", "spill_bytes", "shared_bytes", "matrix")

Table = dict[str, Resources]
"""By the key of the combination."""


@dataclass(frozen=True)
class Comparison:
    """What is worse, a sentence each; what is in one table alone; and how many combinations are in both."""

    worse: list[str]
    missing: list[str]
    new: list[str]
    num_compared: int


def triton_series() -> str:
    """major.minor of the installed Triton, which a table is for."""
    return ".".join(triton.__version__.split(".")[:2])


def write_table(path: Path, table: Mapping[str, Resources]) -> None:
    """One line per combination, sorted by key, so that a diff shows what changed."""
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps([getattr(table[key], name) for name in _COLUMNS])}"
                      for key in sorted(table))
    head = json.dumps({"triton": triton_series(), "columns": _COLUMNS})[1:-1]
    path.write_text(f"{{{head}, \"combinations\": {{\n{rows}\n}}}}\n")


def read_table(path: Path) -> Table | None:
    """None where there is no table, or one of another Triton. Raises UsageValueError for a file that is no table."""
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        if tuple(document["columns"]) != _COLUMNS:
            raise ValueError(f"columns {document['columns']}")
        table = {key: Resources(*row[:-1], matrix=tuple(row[-1])) for key, row in document["combinations"].items()}
        series = document["triton"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageValueError(f"{path}: {type(error).__name__}: {error}, but should be a table that `moe-ref compile "
                              "--accept` wrote") from error
    return table if series == triton_series() else None


def compare(accepted: Mapping[str, Resources], found: Mapping[str, Resources]) -> Comparison:
    """Worse: registers up by more than a tenth, a first spill, more shared memory, a matrix instruction lost.

    What does not compile is a fault of its own and not compared.
    """
    worse = []
    both = [key for key in found if key in accepted and not found[key].error]
    for key in both:
        old, now = accepted[key], found[key]
        reasons = []
        if now.registers > MORE_REGISTERS * old.registers:
            reasons.append(f"{now.registers} registers, accepted were {old.registers}")
        if now.spill_bytes and not old.spill_bytes:
            reasons.append(f"{now.spill_bytes} bytes spilled per thread, accepted were none")
        if now.shared_bytes > old.shared_bytes:
            reasons.append(f"{now.shared_bytes} bytes of shared memory, accepted were {old.shared_bytes}")
        if lost := sorted(set(_kinds(old)) - set(_kinds(now))):
            reasons.append(f"no {', '.join(lost)} any more, now {', '.join(_kinds(now)) or 'no matrix instruction'}")
        worse += [f"{key}: {reason}" for reason in reasons]
    return Comparison(worse, sorted(accepted.keys() - found.keys()), sorted(found.keys() - accepted.keys()), len(both))


def _kinds(resources: Resources) -> list[str]:
    """HGMMA and the like: its shape may change with the tile, its kind may not."""
    return sorted({name.partition(".")[0] for name in resources.matrix})
