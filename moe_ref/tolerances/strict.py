"""A YAML file of this project, read strictly: what is wrong in it is an error that names file and line."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from ruamel.yaml import YAML, MappingNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from moe_ref.contract.errors import UsageValueError
from moe_ref.tolerances.nodes import Fault, structure_faults, type_faults

Kind = TypeVar("Kind", bound=msgspec.Struct)


def read_strictly(path: Path, kind: type[Kind], faults_of: Callable[[MappingNode, Kind], list[Fault]],
                  ) -> tuple[Kind, bytes]:
    """The file as `kind`, and its bytes; faults_of: what else is wrong. Raises UsageValueError with all that is."""
    try:
        content = path.read_bytes()
        reader = YAML(typ="safe", pure=True)
        root = reader.compose(content)
        # Keys given twice have no value, so nothing is read where there are some.
        _raise(path, structure_faults(root))
        value = reader.constructor.construct_document(root)
        _raise(path, type_faults(root, value, kind))
        file = msgspec.convert(value, kind)
        _raise(path, faults_of(root, file))
        return file, content
    except (OSError, RecursionError) as error:
        raise UsageValueError(f"{path}: {error}") from error
    except YAMLError as error:
        mark = error.problem_mark or error.context_mark if isinstance(error, MarkedYAMLError) else None
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UsageValueError(f"{where}: {' '.join(str(error).split())}") from error


def _raise(path: Path, faults: list[Fault]) -> None:
    if faults:
        in_order = sorted(faults, key=lambda one: one.line)
        raise UsageValueError("\n".join(f"{path}:{one.line}: {one.text}" for one in in_order))
