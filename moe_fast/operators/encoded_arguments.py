"""What the operators over encoded experts compute with."""

from dataclasses import dataclass

import torch

from moe_fast.form import Form
from moe_ref.contract.encoded import Encoded


@dataclass(frozen=True)
class EncodedMLP:
    """Rows of tokens and the experts that they visit; as GroupedMLP, but for matrices that are encoded.

    x_TH (T, H); ids_TK (T, K); weights_TK (T, K) fp32; hosted_E (E,) int64; w13: L = (E, G); w2: L = (E,); biases in
    x's dtype. Input scales (E,), fp32, where the scheme has them.
    """

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    hosted_E: torch.Tensor
    w13: Encoded
    w2: Encoded
    form: Form
    w13_bias_EGI: torch.Tensor | None = None
    w2_bias_EH: torch.Tensor | None = None
    w13_input_scale_E: torch.Tensor | None = None
    w2_input_scale_E: torch.Tensor | None = None

    @property
    def output_weights_R(self) -> torch.Tensor | None:
        """Weights of the rows of w2, in (token, slot) order; None where they are on the input."""
        return None if self.form.weight_on_input else self.weights_TK.reshape(-1)


@dataclass(frozen=True)
class EncodedGateUp:
    """The first half of an EncodedMLP; weights_TK are given where the form has them on the input."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    hosted_E: torch.Tensor
    w13: Encoded
    form: Form
    weights_TK: torch.Tensor | None = None
    w13_bias_EGI: torch.Tensor | None = None
    w13_input_scale_E: torch.Tensor | None = None


@dataclass(frozen=True)
class EncodedDown:
    """The second half, of rows of act in (token, slot) order, R = T * K; weights_TK multiply its rows."""

    act_RI: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    hosted_E: torch.Tensor
    w2: Encoded
    w2_bias_EH: torch.Tensor | None = None
    w2_input_scale_E: torch.Tensor | None = None
