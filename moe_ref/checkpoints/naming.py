"""Names of tensors in released checkpoints, by family: data, read strictly from namings.yaml."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated

import msgspec
from ruamel.yaml import YAML

from moe_ref.contract.errors import UsageValueError, raise_faults
from moe_ref.contract.spec import MLP
from moe_ref.contract.weights import WHOLE_PARAMETERS
from moe_ref.layouts.layout import GateUp, Layout, Order, mlp_axes

Text = Annotated[str, msgspec.Meta(min_length=1)]


class _LayoutEntry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    order: Order
    gate_up: GateUp
    gate_first: bool = True
    stacked: bool = True
    w2_order: Order | None = None
    folded: bool = False

    def layout(self) -> Layout:
        return Layout(**msgspec.structs.asdict(self))


class _Entry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    families: Annotated[list[Text], msgspec.Meta(min_length=1)]
    source: Text
    layer: Text
    experts: _LayoutEntry
    tensors: dict[str, Text]
    shared: _LayoutEntry | None = None
    unit_axes: list[str] = []
    identity_stored: bool = False
    note: str = ""


@dataclass(frozen=True)
class Naming:
    """How some families store a layer: prefix of a layer, layouts, and names by stored or canonical parameter."""

    name: str
    families: tuple[str, ...]
    source: str
    layer: str
    experts: Layout
    shared: Layout
    tensors: Mapping[str, str]
    unit_axes: frozenset[str] = frozenset()
    identity_stored: bool = False
    note: str = ""

    @property
    def modules(self) -> frozenset[str]:
        """First components of all names: the parts of a layer in which every tensor must be known."""
        return frozenset(name.partition(".")[0] for name in self.tensors.values())

    def __post_init__(self) -> None:
        known = {name for gated in (True, False) for name in mlp_axes(self.experts, MLP(gated=gated, bias=True))}
        shared = {f"shared_{name}" for gated in (True, False)
                  for name in mlp_axes(self.shared, MLP(gated=gated, bias=True))}
        faults = [f"{key} is no tensor of its layouts" for key in self.tensors
                  if key not in known | shared | set(WHOLE_PARAMETERS)]
        faults += [f"{key}: {name!r} has an expert number, but holds no single expert"
                   for key, name in self.tensors.items()
                   if "{e}" in name and (self.experts.stacked or key not in known)]
        faults += [f"{key} has a unit axis, but no name" for key in self.unit_axes if key not in self.tensors]
        if "{layer}" not in self.layer or not self.layer.endswith("."):
            faults.append(f"layer={self.layer!r}, but should hold {{layer}} and end with a dot")
        raise_faults(f"naming {self.name}", faults)


@cache
def namings() -> dict[str, Naming]:
    """All namings, in file order; raises on unknown keys, contradictions, or a family that is named twice."""
    text = files("moe_ref.checkpoints").joinpath("namings.yaml").read_text()
    entries = msgspec.convert(YAML(typ="safe", pure=True).load(text), dict[str, _Entry])
    found = {name: _naming(name, entry) for name, entry in entries.items()}
    families = [family for naming in found.values() for family in naming.families]
    raise_faults("namings", [f"family {family} is in two namings"
                             for family in sorted({one for one in families if families.count(one) > 1})])
    return found


def _naming(name: str, entry: _Entry) -> Naming:
    shared = entry.shared or _LayoutEntry(order="out_in", gate_up="separate")
    return Naming(name, tuple(entry.families), entry.source, entry.layer, entry.experts.layout(), shared.layout(),
                  entry.tensors, frozenset(entry.unit_axes), entry.identity_stored, entry.note)


def find_naming(name: str) -> Naming:
    """The naming or the family (model_type) of that name; raises UsageValueError that lists those known."""
    if name in namings():
        return namings()[name]
    for naming in namings().values():
        if name in naming.families:
            return naming
    raise UsageValueError(f"unknown naming or family {name!r}; known: " + "; ".join(
        f"{naming.name} ({', '.join(naming.families)})" for naming in namings().values()))
