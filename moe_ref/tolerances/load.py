"""tolerances.yaml, read strictly: what is unknown, missing, given twice or out of range is an error with its line."""

import hashlib
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from moe_ref.contract.errors import UsageValueError
from moe_ref.tolerances.nodes import Fault, structure_faults, type_faults
from moe_ref.tolerances.schema import TolerancesFile


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
def load_tolerances(path: Path | None = None, today: date | None = None) -> Tolerances:
    """Read and check the file; raises UsageValueError that names file and line of all that is wrong in it.

    today: waivers that expired before it are wrong too; None: whenever they expire.
    """
    path = path or default_path()
    try:
        content = path.read_bytes()
        file = _checked(path, content, today)
    except (OSError, RecursionError) as error:
        raise UsageValueError(f"{path}: {error}") from error
    except YAMLError as error:
        mark = error.problem_mark or error.context_mark if isinstance(error, MarkedYAMLError) else None
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UsageValueError(f"{where}: {' '.join(str(error).split())}") from error
    return Tolerances(file, hashlib.sha256(content).hexdigest()[:16])


def _checked(path: Path, content: bytes, today: date | None) -> TolerancesFile:
    reader = YAML(typ="safe", pure=True)
    root = reader.compose(content)
    # Keys given twice have no value, so nothing is read where there are some.
    _raise(path, structure_faults(root))
    value = reader.constructor.construct_document(root)
    _raise(path, type_faults(root, value, TolerancesFile))
    file = msgspec.convert(value, TolerancesFile)
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
    faults = [Fault(lines[section], text) for section, texts in file.faults().items() for text in texts]
    waivers = next(node for key, node in root.value if key.value == "waivers")
    faults += [Fault(node.start_mark.line + 1, f"waivers: {one.cases} expired on {one.expiry}, and it is {today}")
               for node, one in zip(waivers.value, file.waivers, strict=True) if today and one.expiry < today]
    _raise(path, faults)
    return file


def _raise(path: Path, faults: list[Fault]) -> None:
    if faults:
        in_order = sorted(faults, key=lambda one: one.line)
        raise UsageValueError("\n".join(f"{path}:{one.line}: {one.text}" for one in in_order))
