"""Named models: dimensions and mathematics of their MoE layers, read from registry.yaml. Imports no torch."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import msgspec
from ruamel.yaml import YAML

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert


class _Entry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    title: str
    source: str
    hidden_size: int
    intermediate_size: int
    router: dict[str, str | int | float | bool]
    activation: str = "silu"
    shared: dict[str, str | int] | None = None
    note: str = ""


@dataclass(frozen=True)
class Model:
    """A published model: its name in case ids, full title, source of the numbers, layer, and what is left out."""

    name: str
    title: str
    source: str
    spec: MoESpec
    note: str = ""


@cache
def models() -> dict[str, Model]:
    """All named models, in file order; raises on unknown keys, duplicates or invalid dimensions."""
    text = files("moe_ref.models").joinpath("registry.yaml").read_text()
    entries = msgspec.convert(YAML(typ="safe", pure=True).load(text), dict[str, _Entry])
    return {name: _model(name, entry) for name, entry in entries.items()}


def _model(name: str, entry: _Entry) -> Model:
    mlp = MLP(activation=entry.activation)  # pyrefly: ignore
    shared = SharedExpert(mlp=mlp, **entry.shared) if entry.shared else None  # pyrefly: ignore
    spec = MoESpec(hidden_size=entry.hidden_size, intermediate_size=entry.intermediate_size,
                   router=Router(**entry.router), experts=mlp, shared=shared)  # pyrefly: ignore
    return Model(name, entry.title, entry.source, spec, entry.note)


def find_model(name: str) -> Model:
    """The model of that name; raises UsageValueError that lists the known names."""
    if name not in models():
        raise UsageValueError(f"unknown model {name!r}; known: {', '.join(models())}")
    return models()[name]


def cut_experts(spec: MoESpec, num_experts: int) -> MoESpec:
    """The same layer with fewer experts; expert groups are dropped with them, widths never change."""
    if spec.router is None or num_experts > spec.router.num_experts:
        raise UsageValueError(f"experts cut to {num_experts}, but the layer has {spec.num_experts}")
    router = replace(spec.router, num_experts=num_experts, top_k=min(spec.router.top_k, num_experts),
                     num_groups=1, num_groups_kept=1, group_score="max")
    return replace(spec, router=router)
