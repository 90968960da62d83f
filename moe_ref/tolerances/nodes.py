"""What is wrong in a YAML document under a schema, each fault with its line."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_NO_SUCH_KEYS = ("atol", "rtol", "absolute", "relative")
_NO_SUCH_KEY = "tolerances.yaml has no atol or rtol, under whatever name"
_KINDS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")
_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in _KINDS)
_LONGEST = 1000
"""Characters of a value; longer numbers are not even read by Python."""


@dataclass(frozen=True)
class Fault:
    """A line, counted from 1, and what is wrong there."""

    line: int
    text: str


def structure_faults(root: Node | None) -> list[Fault]:
    """What is ambiguous or has no value: keys given twice or that are no text, aliases, merged mappings, other tags."""
    if root is None:
        return [Fault(1, "the file is empty")]
    return list(_structure(root, "", set(), YAML(typ="safe", pure=True).constructor))


def _structure(node: Node, where: str, visited: set[int], constructor: SafeConstructor) -> Iterator[Fault]:
    if id(node) in visited:
        yield Fault(_line(node), f"{where}: an alias, but every number should stand where it counts")
        return
    visited.add(id(node))
    if node.tag not in _TAGS:
        yield Fault(_line(node), f"{where}: tag {node.tag}, but should be none")
    if isinstance(node, ScalarNode):
        yield from _scalar(node, where, constructor)
    if isinstance(node, SequenceNode):
        for index, one in enumerate(node.value):
            yield from _structure(one, f"{where}[{index}]", visited, constructor)
    if isinstance(node, MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, ScalarNode) else "?"
            inside = f"{where}.{name}" if where else name
            if key.tag != "tag:yaml.org,2002:str":
                yield Fault(_line(key), f"{inside}: a key should be text")
            if name in first:
                yield Fault(_line(key), f"{inside}: duplicate key, first on line {first[name]}")
            first.setdefault(name, _line(key))
            yield from _structure(value, inside, visited, constructor)


def _scalar(node: ScalarNode, where: str, constructor: SafeConstructor) -> Iterator[Fault]:
    if len(node.value) > _LONGEST:
        yield Fault(_line(node), f"{where}: {len(node.value)} characters, but should be at most {_LONGEST}")
        return
    try:
        constructor.construct_object(node)
    except (ValueError, YAMLError) as error:
        yield Fault(_line(node), f"{where}: {node.value!r} has no value: {str(error).partition(chr(10))[0]}")


def type_faults(node: Node, value: Any, kind: Any, where: str = "") -> list[Fault]:
    """Unknown and missing keys, and values of another type or out of range; `value` is what `node` says."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = type_faults(node, value, arguments[0], where)
        return inner or _own_faults(node, value, kind, where)
    if _is_mapping(kind):
        return _struct_faults(node, value, kind, where)
    if arguments and all(_is_mapping(one) for one in arguments) and origin is not dict and origin is not tuple:
        return _tagged_faults(node, value, arguments, where)
    if origin is dict and isinstance(node, MappingNode):
        faults = []
        for (key, inner), one in zip(node.value, value.values(), strict=True):
            named = f"{where}.{key.value}"
            if key.value in _NO_SUCH_KEYS and not named.startswith("published."):
                faults.append(Fault(_line(key), f"{named}: {_NO_SUCH_KEY}"))
            faults += _own_faults(key, key.value, arguments[0], named) or type_faults(inner, one, arguments[1], named)
        return faults
    if origin is tuple and arguments[1:] == (Ellipsis,) and isinstance(node, SequenceNode):
        return [fault for index, (inner, one) in enumerate(zip(node.value, value, strict=True))
                for fault in type_faults(inner, one, arguments[0], f"{where}[{index}]")]
    return _own_faults(node, value, kind, where)


def _is_mapping(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct) and not kind.__struct_config__.array_like


def _struct_faults(node: Node, value: Any, kind: type[msgspec.Struct], where: str) -> list[Fault]:
    if not isinstance(node, MappingNode):
        return [Fault(_line(node), f"{where or 'the file'}: should be a mapping")]
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    faults, left = [], dict(fields)
    tag = kind.__struct_config__.tag_field
    for (key, inner), one in zip(node.value, value.values(), strict=True):
        named = f"{where}.{key.value}" if where else key.value
        if key.value in fields:
            faults += type_faults(inner, one, left.pop(key.value).type, named)
        elif key.value in _NO_SUCH_KEYS:
            faults.append(Fault(_line(key), f"{named}: {_NO_SUCH_KEY}"))
        elif key.value != tag:
            faults.append(Fault(_line(key), f"{named}: unknown key, but should be one of {', '.join(fields)}"))
    faults += [Fault(_line(node), f"{where or 'the file'}: {name} is missing") for name, field in left.items()
               if field.required]
    # What the parts do not show: a structure may check them against each other.
    return faults or _own_faults(node, value, kind, where)


def _tagged_faults(node: Node, value: Any, kinds: tuple[Any, ...], where: str) -> list[Fault]:
    by_tag = {kind.__struct_config__.tag: kind for kind in kinds}
    field = kinds[0].__struct_config__.tag_field
    if not isinstance(node, MappingNode):
        return [Fault(_line(node), f"{where}: should be a mapping")]
    if value.get(field) not in by_tag:
        return [Fault(_line(node), f"{where}: {field} is {value.get(field)!r}, but should be one of "
                                   f"{', '.join(map(str, by_tag))}")]
    return _struct_faults(node, value, by_tag[value[field]], where)


def _own_faults(node: Node, value: Any, kind: Any, where: str) -> list[Fault]:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return [Fault(_line(node), f"{where}: {error}")]
    return []


def _line(node: Node) -> int:
    return node.start_mark.line + 1
