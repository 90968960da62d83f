"""tolerances.yaml, read strictly: what is unknown, missing, given twice or out of range is an error with its line."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ruamel.yaml import MappingNode

from moe_ref.tolerances.nodes import Fault
from moe_ref.tolerances.schema import TolerancesFile
from moe_ref.tolerances.strict import read_strictly


@dataclass(frozen=True)
class Tolerances:
    """The file's content and the digest that a record names it by."""

    file: TolerancesFile
    digest: str


def default_path() -> Path:
    """tolerances.yaml beside the packages in a checkout, inside moe_ref in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "tolerances.yaml"
    return installed if installed.exists() else package.parent / "tolerances.yaml"


@cache
def load_tolerances(path: Path | None = None) -> Tolerances:
    """Read and check the file; raises UsageValueError that names file and line of all that is wrong in it."""
    def faults(root: MappingNode, file: TolerancesFile) -> list[Fault]:
        lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
        return [Fault(lines[section], text) for section, texts in file.faults().items() for text in texts]

    file, content = read_strictly(path or default_path(), TolerancesFile, faults)
    return Tolerances(file, hashlib.sha256(content).hexdigest()[:16])
