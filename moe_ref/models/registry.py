"""Named models: dimensions and mathematics of their MoE layers, read from published/*.yaml. Imports no torch."""

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.spec import MoESpec
from moe_ref.models.entries import About, FamilyEntry, load, read

DEFAULTS_OF = "transformers 5.23.0 models/"
"""How the source of an entry begins that holds the defaults of a configuration class; the class is named in it."""


@dataclass(frozen=True)
class Family:
    """A published implementation, the transformers module of its name, and its numerics."""

    name: str
    numerics: ReleasedNumerics
    note: str = ""

    @property
    def code(self) -> str:
        """Where its mathematics and numerics were read."""
        return f"{DEFAULTS_OF}{self.name}/modeling_{self.name}.py"


@dataclass(frozen=True)
class Model:
    """A published model: its name in case ids, full title, source of the numbers, layer, and what is left out.

    beside_source:  keys that are not the source's; the note says where they come from
    routing:        "injected": the model's router is outside the spec for the `reason` given, and spec.router
                    only stands in for it; inject logits or the routing to compare with the model
    """

    name: str
    family: Family
    title: str
    source: str
    spec: MoESpec
    beside_source: tuple[str, ...] = ()
    routing: Literal["spec", "injected"] = "spec"
    reason: str = ""
    note: str = ""

    @property
    def numerics(self) -> ReleasedNumerics:
        """In which dtype the family's published code computes each step."""
        return self.family.numerics


@cache
def families() -> dict[str, Family]:
    """All families, in file order; raises on unknown keys or duplicates."""
    found = {name: read(f"family {name}", values, FamilyEntry) for name, values in load("families").items()}
    return {name: Family(name, read(f"family {name}: numerics", entry.numerics, ReleasedNumerics), entry.note)
            for name, entry in found.items()}


@cache
def models() -> dict[str, Model]:
    """All named models, in file order; raises on unknown keys, duplicates or invalid dimensions."""
    return {name: _model(name, values) for name, values in load("published").items()}


def _model(name: str, values: dict[str, object]) -> Model:
    keys = {field.name for field in fields(MoESpec)}
    about = read(name, {key: value for key, value in values.items() if key not in keys}, About)
    spec = read(name, {key: value for key, value in values.items() if key in keys}, MoESpec)
    if about.family not in families():
        raise UsageValueError(f"registry: {name}: unknown family {about.family!r}; known: {', '.join(families())}")
    if (about.routing == "injected") != bool(about.reason):
        raise UsageValueError(f"registry: {name}: routing={about.routing!r} and reason={about.reason!r}, but a "
                              "reason should stand beside an injected routing and nowhere else")
    return Model(name, families()[about.family], about.title, about.source, spec, tuple(about.beside_source),
                 about.routing, about.reason, about.note)


def find_model(name: str) -> Model:
    """The model of that name; raises UsageValueError that lists the known names."""
    if name not in models():
        raise UsageValueError(f"unknown model {name!r}; known: {', '.join(models())}")
    return models()[name]


def cut_experts(spec: MoESpec, num_experts: int) -> MoESpec:
    """The same layer with fewer experts; widths and every option of the mathematics stay.

    Expert groups are dropped with the experts. Identity experts are cut in proportion, to at least one, so that
    about as many choices fall on them. A capacity in tokens stays as it is, a factor follows the experts.
    """
    router = spec.router
    if router is None or num_experts > router.num_experts:
        raise UsageValueError(f"experts cut to {num_experts}, but the layer has {spec.num_experts}")
    if num_experts == router.num_experts:
        return spec
    zero_experts = -(-router.num_zero_experts * num_experts // router.num_experts)
    router = replace(router, num_experts=num_experts, top_k=min(router.top_k, num_experts),
                     num_zero_experts=zero_experts, num_groups=1, num_groups_kept=1, group_score="max",
                     group_fill="minus_inf")
    return replace(spec, router=router)
