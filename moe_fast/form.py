"""What an expert computes between its two products, as operators take it (text) and as kernels do (a constant)."""

from dataclasses import dataclass, fields
from functools import cache
from math import isfinite

from moe_ref.contract.errors import raise_faults
from moe_ref.contract.spec import MLP, MoESpec

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")


@dataclass(frozen=True)
class Form:
    """Options of an MLP by the names of moe_ref.contract.spec.MLP, which has the formulas; a kernel reads attributes.

    weight_on_input: the routing weight multiplies what gate and up are made of, instead of the expert's row.
    """

    activation: str = "silu"
    gated: bool = True
    weight_on_input: bool = False
    limit: float | None = None
    limit_at: str = "before"
    sigmoid_scale: float = 1.0
    up_offset: float = 0.0
    gate_softcap: float = 0.0
    up_softcap: float = 0.0

    @property
    def num_projections(self) -> int:
        """G: gate and up, or one."""
        return 2 if self.gated else 1

    @property
    def words(self) -> str:
        """The activation, and every other option that is not the default, as name=value: what parse_form reads."""
        given = {name: getattr(self, name) for name in OPTIONS}
        return " ".join([self.activation, *(f"{name}={value}" for name, value in given.items()
                                            if value != OPTIONS[name])])


OPTIONS = {field.name: field.default for field in fields(Form) if field.name != "activation"}
"""Options and their defaults."""

FLAG = {"True": True, "False": False}
WORDS = {"gated": FLAG, "weight_on_input": FLAG, "limit_at": {"before": "before", "after": "after"}}
"""What options may be that are no numbers."""


def form_of(mlp: MLP, *, weight_on_input: bool = False) -> str:
    """The operators' words for an MLP."""
    options = {name: getattr(mlp, name) for name in OPTIONS if name != "weight_on_input"}
    return Form(mlp.activation, weight_on_input=weight_on_input, **options).words


def routed_form(spec: MoESpec) -> str:
    """form_of the routed experts."""
    return form_of(spec.experts, weight_on_input=spec.weight_on == "input")


@cache
def parse_form(words: str) -> Form:
    """From Form.words; raises UsageValueError for anything else."""
    activation, *options = words.split() or [""]
    given, faults = {}, []
    if activation not in ACTIVATIONS:
        faults.append(f"activation={activation!r}, but should be one of {', '.join(ACTIVATIONS)}")
    for option in options:
        name, _, value = option.partition("=")
        if name not in OPTIONS:
            faults.append(f"{name!r}, but should be one of {', '.join(OPTIONS)}")
        elif value not in (allowed := WORDS.get(name, {})) and (allowed or not _is_number(value)):
            faults.append(f"{name}={value!r}, but should be {' or '.join(allowed) or 'a number'}")
        else:
            given[name] = allowed[value] if allowed else float(value)
    raise_faults(f"form {words!r}", faults)
    return Form(activation, **given)


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False
