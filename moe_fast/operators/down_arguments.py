"""What moe_fast::merged_down and its gradients take, and the grouped down products in it."""

from dataclasses import dataclass, fields

import torch

from moe_fast.operators.arguments import OPERANDS
from moe_fast.operators.checks import check_dtypes, check_shapes, check_words
from moe_fast.operators.rows import every_token
from moe_ref.contract.errors import raise_faults


@dataclass(frozen=True)
class GroupedDown:
    """Rows of the activation in (token, slot) order, a group for each expert."""

    act_RI: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    hosted_E: torch.Tensor
    w2_EHI: torch.Tensor
    w2_bias_EH: torch.Tensor | None


@dataclass(frozen=True)
class MergedDownArguments:
    """The arguments of moe_fast::merged_down, in its order."""

    act_RI: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    hosted_E: torch.Tensor
    w2_EHI: torch.Tensor
    shared_act_TI: torch.Tensor | None
    shared_w2_HI: torch.Tensor | None
    shared_gate_T1: torch.Tensor | None
    w2_bias_EH: torch.Tensor | None = None
    shared_w2_bias_H: torch.Tensor | None = None
    output_bias_H: torch.Tensor | None = None
    mean: bool = False
    operands: str = "exact"

    def values(self) -> tuple:
        """In their order, as they are."""
        return tuple(getattr(self, name) for name in NAMES)

    def routed(self) -> GroupedDown:
        """The routed experts."""
        return GroupedDown(self.act_RI, self.ids_TK, self.weights_TK, self.hosted_E, self.w2_EHI, self.w2_bias_EH)

    def shared(self) -> GroupedDown | None:
        """The shared expert, a layer of one expert that every token visits; None without one."""
        if self.shared_act_TI is None or self.shared_w2_HI is None:
            return None
        bias_H = self.shared_w2_bias_H
        return GroupedDown(self.shared_act_TI, *every_token(self.shared_act_TI, self.shared_gate_T1),
                           self.shared_w2_HI[None], None if bias_H is None else bias_H[None])

    def check(self, operator: str, grad_TH: torch.Tensor | None = None) -> None:
        """Raise UsageValueError / UsageTypeError unless the arguments, and the gradient if given, fit together."""
        check_words(operator, {"operands": self.operands}, OPERANDS)
        shared = {"shared_act_TI": self.shared_act_TI, "shared_w2_HI": self.shared_w2_HI}
        beside = {"shared_gate_T1": self.shared_gate_T1, "shared_w2_bias_H": self.shared_w2_bias_H}
        given = [one is not None for one in (*shared.values(), *beside.values())]
        if given[0] != given[1] or (any(given) and not given[0]):
            raise_faults(operator, ["shared_act_TI, shared_w2_HI and what goes with them are given in part, but a "
                                    "shared expert needs the first two"])
        if self.mean and not given[0]:
            raise_faults(operator, ["mean=True, but without a shared expert there is nothing to take the mean with"])
        ids = {"ids_TK": self.ids_TK}
        routed = ids | {"weights_TK": self.weights_TK, "act_RI": self.act_RI, "hosted_E": self.hosted_E,
                        "w2_EHI": self.w2_EHI}
        biases = {"w2_bias_EH": self.w2_bias_EH, "output_bias_H": self.output_bias_H}
        check_shapes(operator, routed | biases | {"grad_TH": grad_TH},
                     {"R": self.ids_TK.numel()} if self.ids_TK.dim() == 2 else {})
        check_shapes(operator, ids | shared | beside, {"H": self.w2_EHI.shape[1], "1": 1})
        kinds = {"w2_EHI": self.w2_EHI, "shared_w2_bias_H": self.shared_w2_bias_H, "grad_TH": grad_TH}
        check_dtypes(operator, kinds | shared | biases, (self.act_RI.dtype,))
        check_dtypes(operator, {"weights_TK": self.weights_TK, "shared_gate_T1": self.shared_gate_T1}, (torch.float32,))
        check_dtypes(operator, ids, (torch.int32, torch.int64))
        check_dtypes(operator, {"hosted_E": self.hosted_E}, (torch.int64,))


NAMES = tuple(field.name for field in fields(MergedDownArguments))
