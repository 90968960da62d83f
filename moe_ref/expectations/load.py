"""An expectations file, read strictly: what is wrong in it, expired or another implementation's is refused."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from ruamel.yaml import MappingNode

from moe_ref.expectations.schema import ExpectationsFile, KnownFailure
from moe_ref.tolerances.nodes import Fault
from moe_ref.tolerances.strict import read_strictly


@dataclass(frozen=True)
class Expectations:
    """The entries of a file, and the digest that a record names it by."""

    entries: tuple[KnownFailure, ...] = ()
    digest: str = ""

    def covering(self, case_id: str) -> tuple[KnownFailure, ...]:
        """The entries that a case is covered by."""
        return tuple(one for one in self.entries if one.covers(case_id))


def load_expectations(path: Path, implementation: str, today: date | None = None) -> Expectations:
    """Read and check the file; raises UsageValueError that names file and line of all that is wrong in it.

    implementation: the name that is verified. today: entries that expired before it are wrong; None: it is what the
    clock says, in UTC.
    """
    day = today or datetime.now(UTC).date()

    def faults(root: MappingNode, file: ExpectationsFile) -> list[Fault]:
        nodes = {key.value: node for key, node in root.value}
        found = [Fault(node.start_mark.line + 1, f"entries[{index}]: {entry.cases} expired on {entry.expires}, and it "
                       f"is {day}; remove the entry, or look again and give a later day")
                 for index, (node, entry) in enumerate(zip(nodes["entries"].value, file.entries, strict=True))
                 if entry.expires < day]
        if file.implementation != implementation:
            found.append(Fault(nodes["implementation"].start_mark.line + 1, f"implementation: {file.implementation}, "
                               f"but {implementation} is verified; each implementation should have a file of its own"))
        return found

    file, content = read_strictly(path, ExpectationsFile, faults)
    return Expectations(file.entries, hashlib.sha256(content).hexdigest()[:16])
