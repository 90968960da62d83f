"""ci/lanes.yaml, read strictly: what is unknown, missing, given twice or out of range is an error with its line."""

from pathlib import Path

from ruamel.yaml import MappingNode

from moe_ref.lanes.schema import LanesFile
from moe_ref.tolerances.nodes import Fault
from moe_ref.tolerances.strict import read_strictly

LANES = Path("ci/lanes.yaml")


def load_lanes(path: Path = LANES) -> LanesFile:
    """Read and check the file; raises UsageValueError that names file and line of all that is wrong in it."""
    return read_strictly(path, LanesFile, _faults)[0]


def _faults(root: MappingNode, file: LanesFile) -> list[Fault]:
    lanes = next(node for key, node in root.value if key.value == "lanes")
    lines = {f"lanes.{key.value}": key.start_mark.line + 1 for key, _ in lanes.value}
    lines |= {key.value: key.start_mark.line + 1 for key, _ in root.value}
    return [Fault(lines[text.partition(":")[0]], text) for text in file.faults()]
