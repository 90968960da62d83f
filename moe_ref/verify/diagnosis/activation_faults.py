"""Layers with one fault each between the two products of an expert."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Stage
from moe_ref.verify.diagnosis.known import Known
from moe_ref.verify.diagnosis.layer import Layer

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")


class AnotherMLP(Layer):
    """Experts that compute something else than they were asked for: variants are what they do."""

    first = Stage.ACT
    local = "expert"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return cls.of(known.case.problem.spec.experts)

    @classmethod
    def of(cls, mlp: MLP) -> Iterable[Any]:
        """The forms of the fault in this MLP."""
        raise NotImplementedError

    def mlp(self, mlp: MLP) -> MLP:
        return replace(mlp, **self.variant)


class OtherActivation(AnotherMLP):
    words = "D08 {0[activation]} for the activation that was asked for"

    @classmethod
    def of(cls, mlp: MLP) -> Iterable[Any]:
        if mlp.sigmoid_scale != 1.0 or mlp.gate_softcap:
            return [{"activation": one, "sigmoid_scale": 1.0, "gate_softcap": 0.0} for one in ACTIVATIONS[1:]]
        return [{"activation": one} for one in ACTIVATIONS if one != mlp.activation
                and {one, mlp.activation} != {"gelu", "gelu_tanh"}]


class OtherGelu(AnotherMLP):
    words = "K05 {0[activation]} for the other form of gelu"

    @classmethod
    def of(cls, mlp: MLP) -> Iterable[Any]:
        others = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}
        return [{"activation": others[mlp.activation]}] if mlp.activation in others else []


class ClampDropped(AnotherMLP):
    words = "D09 limit of gate and up left out"

    @classmethod
    def of(cls, mlp: MLP) -> Iterable[Any]:
        return [{"limit": None, "limit_at": "before"}] if mlp.limit is not None else []


class ClampAtTheOtherPlace(AnotherMLP):
    words = "limit {0[limit_at]} the activation"

    @classmethod
    def of(cls, mlp: MLP) -> Iterable[Any]:
        return [{"limit_at": "after" if mlp.limit_at == "before" else "before"}] if mlp.limit is not None else []


class SigmoidScaleDropped(AnotherMLP):
    words = "D09 scale inside the sigmoid left out"

    @classmethod
    def of(cls, mlp: MLP) -> Iterable[Any]:
        return [{"sigmoid_scale": 1.0}] if mlp.sigmoid_scale != 1.0 else []


class OffsetDropped(AnotherMLP):
    words = "D09 offset of up left out"

    @classmethod
    def of(cls, mlp: MLP) -> Iterable[Any]:
        return [{"up_offset": 0.0}] if mlp.up_offset else []


class SoftcapsDropped(AnotherMLP):
    words = "soft caps of gate and up left out"

    @classmethod
    def of(cls, mlp: MLP) -> Iterable[Any]:
        return [{"gate_softcap": 0.0, "up_softcap": 0.0}] if mlp.gate_softcap or mlp.up_softcap else []


ACTIVATION_FAULTS: tuple[type[Layer], ...] = (
    OtherActivation, OtherGelu, ClampDropped, ClampAtTheOtherPlace, SigmoidScaleDropped, OffsetDropped,
    SoftcapsDropped)
