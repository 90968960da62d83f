"""Entries of the registry's YAML files, read strictly: no unknown key, no wrong type. Imports no torch."""

from dataclasses import MISSING, fields, is_dataclass
from functools import cache, reduce
from importlib.resources import files
from operator import or_
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import msgspec
from ruamel.yaml import YAML

from moe_ref.contract.errors import UsageValueError

T = TypeVar("T")


class About(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What an entry says beside the fields of MoESpec."""

    family: str
    title: str
    source: str
    beside_source: list[str] = []
    routing: Literal["spec", "injected"] = "spec"
    reason: str = ""
    note: str = ""


class FamilyEntry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What families.yaml says of one family."""

    numerics: dict[str, str | bool] = {}
    note: str = ""


@cache
def strict_form(cls: type) -> type[msgspec.Struct]:
    """A structure with exactly the fields of the dataclass `cls`, at any depth, that refuses unknown keys."""
    hints, form = get_type_hints(cls), []
    for field in fields(cls):
        kind = _strict_kind(hints[field.name])
        needed = field.default is MISSING and field.default_factory is MISSING
        form.append((field.name, kind) if needed else (field.name, kind | msgspec.UnsetType, msgspec.UNSET))
    return msgspec.defstruct(cls.__name__, form, forbid_unknown_fields=True, kw_only=True)


def _strict_kind(kind: Any) -> Any:
    if is_dataclass(kind):
        return strict_form(kind)
    if type(None) in get_args(kind):
        return reduce(or_, (_strict_kind(one) for one in get_args(kind)))
    return kind


def read(where: str, values: object, kind: type[T]) -> T:
    """`values` as a `kind`; raises UsageValueError that names the entry and the key."""
    try:
        if is_dataclass(kind):
            # A dataclass ignores unknown keys, so its strict form looks at them first.
            msgspec.convert(values, strict_form(kind))
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise UsageValueError(f"registry: {where}: {error}") from error


def load(folder: str) -> dict[str, dict[str, object]]:
    """All mappings of the folder's YAML files in order of file names; raises on a name given twice."""
    found: dict[str, dict[str, object]] = {}
    for file in sorted(files("moe_ref.models").joinpath(folder).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            entries = YAML(typ="safe", pure=True).load(file.read_text())
            if twice := found.keys() & entries.keys():
                names = ", ".join(sorted(twice))
                raise UsageValueError(f"registry: {file.name}: {names} stand in another file too")
            found |= entries
    return found
