"""What moe_fast::experts and its gradients take, and the grouped MLPs in it."""

from dataclasses import dataclass, fields, replace

import torch

from moe_fast.form import Form, parse_form
from moe_fast.operators.checks import check_dtypes, check_one_device, check_shapes, check_words
from moe_fast.operators.rows import every_token
from moe_ref.contract.errors import raise_faults

OPERANDS = ("exact", "fp8_row")
"""What products of experts multiply: their operands as they are, or rounded as Numerics.products says."""


@dataclass(frozen=True)
class GroupedMLP:
    """Rows of tokens, a group for each expert: hosted_E tells whose weights stand at each place."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    hosted_E: torch.Tensor
    w13_EGIH: torch.Tensor
    w2_EHI: torch.Tensor
    w13_bias_EGI: torch.Tensor | None
    w2_bias_EH: torch.Tensor | None
    form: Form

    @property
    def output_weights_R(self) -> torch.Tensor | None:
        """What multiplies the rows of w2, in (token, slot) order; None where the weight is on the input."""
        return None if self.form.weight_on_input else self.weights_TK.reshape(-1)


@dataclass(frozen=True)
class ExpertsArguments:
    """The arguments of moe_fast::experts, in its order."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    hosted_E: torch.Tensor
    w13_EGIH: torch.Tensor
    w2_EHI: torch.Tensor
    shared_w13_GIH: torch.Tensor | None
    shared_w2_HI: torch.Tensor | None
    shared_gate_T1: torch.Tensor | None
    form: str
    shared_form: str
    w13_bias_EGI: torch.Tensor | None = None
    w2_bias_EH: torch.Tensor | None = None
    shared_w13_bias_GI: torch.Tensor | None = None
    shared_w2_bias_H: torch.Tensor | None = None
    output_bias_H: torch.Tensor | None = None
    mean: bool = False
    operands: str = "exact"

    def values(self) -> tuple:
        """In their order, as they are."""
        return tuple(getattr(self, name) for name in NAMES)

    def tokens(self, start: int, stop: int) -> "ExpertsArguments":
        """The same layer for some of its tokens."""
        of_tokens = ("x_TH", "ids_TK", "weights_TK", "shared_gate_T1")
        given = {name: tensor for name in of_tokens if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: tensor[start:stop] for name, tensor in given.items()})

    def routed(self) -> GroupedMLP:
        """The routed experts."""
        return GroupedMLP(self.x_TH, self.ids_TK, self.weights_TK, self.hosted_E, self.w13_EGIH, self.w2_EHI,
                          self.w13_bias_EGI, self.w2_bias_EH, parse_form(self.form))

    def shared(self) -> GroupedMLP | None:
        """The shared expert, a layer of one expert that every token visits; None without one."""
        if self.shared_w13_GIH is None or self.shared_w2_HI is None:
            return None
        w13_bias_GI, w2_bias_H = self.shared_w13_bias_GI, self.shared_w2_bias_H
        return GroupedMLP(self.x_TH, *every_token(self.x_TH, self.shared_gate_T1), self.shared_w13_GIH[None],
                          self.shared_w2_HI[None], None if w13_bias_GI is None else w13_bias_GI[None],
                          None if w2_bias_H is None else w2_bias_H[None], parse_form(self.shared_form))

    def check(self, operator: str) -> None:
        """Raise UsageValueError / UsageTypeError unless the arguments fit together."""
        form, shared_form = parse_form(self.form), parse_form(self.shared_form)
        check_words(operator, {"operands": self.operands}, OPERANDS)
        tokens = {"x_TH": self.x_TH, "ids_TK": self.ids_TK, "weights_TK": self.weights_TK}
        matrices = {"w13_EGIH": self.w13_EGIH, "w2_EHI": self.w2_EHI}
        biases = {"w13_bias_EGI": self.w13_bias_EGI, "w2_bias_EH": self.w2_bias_EH, "output_bias_H": self.output_bias_H}
        shared = {"shared_w13_GIH": self.shared_w13_GIH, "shared_w2_HI": self.shared_w2_HI}
        shared_biases = {"shared_w13_bias_GI": self.shared_w13_bias_GI, "shared_w2_bias_H": self.shared_w2_bias_H}
        gate, hosted = {"shared_gate_T1": self.shared_gate_T1}, {"hosted_E": self.hosted_E}
        beside = [name for name, one in (shared | gate | shared_biases).items() if one is not None]
        if beside and None in shared.values():
            raise_faults(operator, [f"only {' and '.join(beside)} given, but a shared expert needs "
                                    f"{' and '.join(shared)}"])
        if self.mean and not beside:
            raise_faults(operator, ["mean=True, but without a shared expert there is nothing to take the mean with"])
        if shared_form.weight_on_input:
            raise_faults(operator, [f"shared_form={self.shared_form!r}, but the gate is on the shared expert's output"])
        check_shapes(operator, tokens | hosted | matrices | biases, {"G": form.num_projections})
        check_shapes(operator, tokens | shared | gate | shared_biases, {"G": shared_form.num_projections, "1": 1})
        check_one_device(operator, tokens | hosted | matrices | biases | shared | shared_biases | gate)
        check_dtypes(operator, matrices | shared | biases | shared_biases, (self.x_TH.dtype,))
        check_dtypes(operator, {"weights_TK": self.weights_TK} | gate, (torch.float32,))
        check_dtypes(operator, {"ids_TK": self.ids_TK}, (torch.int32, torch.int64))
        check_dtypes(operator, hosted, (torch.int64,))


NAMES = tuple(field.name for field in fields(ExpertsArguments))
