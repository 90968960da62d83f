"""What moe_fast::encoded_merged_down takes."""

from dataclasses import dataclass

import torch

from moe_fast.operators.checks import check_dtypes, check_shapes
from moe_fast.operators.encoded_arguments import EncodedDown, check_matrices, check_rows, check_shared, one_expert
from moe_fast.operators.rows import every_token
from moe_ref.contract.encoded import Encoded


@dataclass(frozen=True)
class EncodedDownArguments:
    """The arguments of moe_fast::encoded_merged_down, in its order after the scheme; as MergedDownArguments."""

    act_RI: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    hosted_E: torch.Tensor
    w2: Encoded
    w2_bias_EH: torch.Tensor | None = None
    w2_input_scale_E: torch.Tensor | None = None
    shared_act_TI: torch.Tensor | None = None
    shared_w2: Encoded | None = None
    shared_gate_T1: torch.Tensor | None = None
    shared_w2_bias_H: torch.Tensor | None = None
    shared_w2_input_scale: torch.Tensor | None = None
    output_bias_H: torch.Tensor | None = None
    mean: bool = False

    @property
    def num_columns(self) -> int:
        """H of the result."""
        return self.w2.shape[-2]

    def routed(self) -> EncodedDown:
        """The routed experts."""
        return EncodedDown(self.act_RI, self.ids_TK, self.weights_TK, self.hosted_E, self.w2, self.w2_bias_EH,
                           self.w2_input_scale_E)

    def shared(self) -> EncodedDown | None:
        """The shared expert, a layer of one expert that every token visits; None without one."""
        if self.shared_act_TI is None or self.shared_w2 is None:
            return None
        beside = (self.shared_w2_bias_H, self.shared_w2_input_scale)
        return EncodedDown(self.shared_act_TI, *every_token(self.shared_act_TI, self.shared_gate_T1),
                           one_expert(self.shared_w2), *(None if one is None else one[None] for one in beside))

    def check(self, operator: str) -> None:
        """Raise UsageValueError / UsageTypeError unless the arguments fit together."""
        check_shared(operator, {"shared_act_TI": self.shared_act_TI, "shared_w2": self.shared_w2},
                     (self.shared_gate_T1, self.shared_w2_bias_H), self.mean)
        for whose, rows in self._halves():
            shape = (len(rows.hosted_E), self.num_columns, rows.act_RI.shape[1])
            check_shapes(operator, {"ids_TK": rows.ids_TK, "weights_TK": rows.weights_TK, "act_RI": rows.act_RI},
                         {"R": rows.ids_TK.numel()})
            check_rows(operator, {"act_RI": rows.act_RI}, rows.ids_TK, rows.weights_TK, rows.hosted_E)
            check_matrices(operator, whose, rows.w2, shape, rows.act_RI, {"w2_bias_EH": rows.w2_bias_EH},
                           rows.w2_input_scale_E)
        check_shapes(operator, {"output_bias_H": self.output_bias_H}, {"H": self.num_columns})
        check_dtypes(operator, {"output_bias_H": self.output_bias_H}, (self.act_RI.dtype,))

    def _halves(self) -> list[tuple[str, EncodedDown]]:
        shared = self.shared()
        return [("", self.routed())] + ([] if shared is None else [("shared ", shared)])
