"""ci/lanes.yaml, read strictly: what is unknown, missing, given twice or out of range is an error with its line."""

from pathlib import Path

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from moe_ref.contract.errors import UsageValueError
from moe_ref.lanes.schema import LanesFile
from moe_ref.tolerances.nodes import Fault, structure_faults, type_faults

LANES = Path("ci/lanes.yaml")


def load_lanes(path: Path = LANES) -> LanesFile:
    """Read and check the file; raises UsageValueError that names file and line of all that is wrong in it."""
    try:
        return _checked(path, path.read_bytes())
    except (OSError, RecursionError) as error:
        raise UsageValueError(f"{path}: {error}") from error
    except YAMLError as error:
        mark = error.problem_mark or error.context_mark if isinstance(error, MarkedYAMLError) else None
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UsageValueError(f"{where}: {' '.join(str(error).split())}") from error


def _checked(path: Path, content: bytes) -> LanesFile:
    reader = YAML(typ="safe", pure=True)
    root = reader.compose(content)
    # Keys given twice have no value, so nothing is read where there are some.
    _raise(path, structure_faults(root))
    value = reader.constructor.construct_document(root)
    _raise(path, type_faults(root, value, LanesFile))
    file = msgspec.convert(value, LanesFile)
    lanes = next(node for key, node in root.value if key.value == "lanes")
    lines = {f"lanes.{key.value}": key.start_mark.line + 1 for key, _ in lanes.value}
    lines |= {key.value: key.start_mark.line + 1 for key, _ in root.value}
    _raise(path, [Fault(lines[text.partition(":")[0]], text) for text in file.faults()])
    return file


def _raise(path: Path, faults: list[Fault]) -> None:
    if faults:
        in_order = sorted(faults, key=lambda one: one.line)
        raise UsageValueError("\n".join(f"{path}:{one.line}: {one.text}" for one in in_order))
