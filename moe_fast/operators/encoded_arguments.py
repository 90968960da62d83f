"""What the operators over encoded experts compute with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moe_fast.form import Form, parse_form
from moe_fast.operators.checks import check_dtypes, check_one_device, check_shapes
from moe_fast.operators.rows import every_token
from moe_ref.contract.encoded import Encoded, check_encoded
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.schemes import ENCODINGS

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


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


@dataclass(frozen=True)
class EncodedArguments:
    """The arguments of moe_fast::encoded_experts, in its order after the scheme; as ExpertsArguments otherwise.

    Shared matrices have L = (G,) and none, their input scales no axis.
    """

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    hosted_E: torch.Tensor
    w13: Encoded
    w2: Encoded
    form: str
    w13_bias_EGI: torch.Tensor | None = None
    w2_bias_EH: torch.Tensor | None = None
    w13_input_scale_E: torch.Tensor | None = None
    w2_input_scale_E: torch.Tensor | None = None
    shared_w13: Encoded | None = None
    shared_w2: Encoded | None = None
    shared_form: str = "silu"
    shared_gate_T1: torch.Tensor | None = None
    shared_w13_bias_GI: torch.Tensor | None = None
    shared_w2_bias_H: torch.Tensor | None = None
    shared_w13_input_scale: torch.Tensor | None = None
    shared_w2_input_scale: torch.Tensor | None = None
    output_bias_H: torch.Tensor | None = None
    mean: bool = False

    def tokens(self, start: int, stop: int) -> "EncodedArguments":
        """The same layer for some of its tokens."""
        gate_T1 = self.shared_gate_T1
        return replace(self, x_TH=self.x_TH[start:stop], ids_TK=self.ids_TK[start:stop],
                       weights_TK=self.weights_TK[start:stop],
                       shared_gate_T1=None if gate_T1 is None else gate_T1[start:stop])

    def routed(self) -> EncodedMLP:
        """The routed experts."""
        return EncodedMLP(self.x_TH, self.ids_TK, self.weights_TK, self.hosted_E, self.w13, self.w2,
                          parse_form(self.form), self.w13_bias_EGI, self.w2_bias_EH, self.w13_input_scale_E,
                          self.w2_input_scale_E)

    def shared(self) -> EncodedMLP | None:
        """The shared expert, a layer of one expert that every token visits; None without one."""
        if self.shared_w13 is None or self.shared_w2 is None:
            return None
        beside = (self.shared_w13_bias_GI, self.shared_w2_bias_H, self.shared_w13_input_scale,
                  self.shared_w2_input_scale)
        return EncodedMLP(self.x_TH, *every_token(self.x_TH, self.shared_gate_T1), one_expert(self.shared_w13),
                          one_expert(self.shared_w2), parse_form(self.shared_form),
                          *(None if one is None else one[None] for one in beside))

    def check(self, operator: str) -> None:
        """Raise UsageValueError / UsageTypeError unless the arguments fit together."""
        tokens = {"x_TH": self.x_TH, "ids_TK": self.ids_TK, "weights_TK": self.weights_TK}
        check_shared(operator, {"shared_w13": self.shared_w13, "shared_w2": self.shared_w2},
                     (self.shared_gate_T1, self.shared_w13_bias_GI, self.shared_w2_bias_H), self.mean)
        check_shapes(operator, tokens, {})
        mlps = {"": self.routed()} | ({} if (one := self.shared()) is None else {"shared ": one})
        for whose, mlp in mlps.items():
            check_mlp(operator, whose, mlp)
        check_shapes(operator, {"output_bias_H": self.output_bias_H}, {"H": self.x_TH.shape[1]})
        check_dtypes(operator, {"output_bias_H": self.output_bias_H}, (self.x_TH.dtype,))


def check_shared(operator: str, needed: Mapping[str, object], beside: Sequence[object], mean: bool) -> None:
    """Raise unless a shared expert is given as a whole or not at all, and given where a mean is taken with it."""
    given = [one is not None for one in needed.values()]
    if any(given) != all(given) or (not any(given) and any(one is not None for one in beside)):
        raise_faults(operator, [f"a shared expert is given in part, but needs {' and '.join(needed)}"])
    if mean and not any(given):
        raise_faults(operator, ["mean=True, but without a shared expert there is nothing to take the mean with"])


def one_expert(matrix: Encoded) -> Encoded:
    """The matrices of one expert, with an axis of experts before the others."""
    return matrix.mapped(lambda one: one[None])


def check_mlp(operator: str, whose: str, mlp: EncodedMLP) -> None:
    """Raise unless shapes, dtypes and devices of one grouped MLP fit together."""
    intermediate, hidden = mlp.w13.shape[-2], mlp.x_TH.shape[1]
    check_rows(operator, {"x_TH": mlp.x_TH}, mlp.ids_TK, mlp.weights_TK, mlp.hosted_E)
    check_matrices(operator, whose, mlp.w13, (len(mlp.hosted_E), mlp.form.num_projections, intermediate, hidden),
                   mlp.x_TH, {"w13_bias_EGI": mlp.w13_bias_EGI}, mlp.w13_input_scale_E)
    check_matrices(operator, whose, mlp.w2, (len(mlp.hosted_E), hidden, intermediate), mlp.x_TH,
                   {"w2_bias_EH": mlp.w2_bias_EH}, mlp.w2_input_scale_E)


def check_rows(operator: str, rows: dict[str, torch.Tensor], ids_TK: torch.Tensor, weights_TK: torch.Tensor | None,
               hosted_E: torch.Tensor) -> None:
    """Raise unless rows and their routing are of kinds that kernels take, on one device."""
    check_one_device(operator, rows | {"ids_TK": ids_TK, "weights_TK": weights_TK, "hosted_E": hosted_E})
    check_dtypes(operator, rows, FLOATING)
    check_dtypes(operator, {"weights_TK": weights_TK}, (torch.float32,))
    check_dtypes(operator, {"ids_TK": ids_TK}, (torch.int32, torch.int64))
    check_dtypes(operator, {"hosted_E": hosted_E}, (torch.int64,))


def check_matrices(operator: str, whose: str, matrix: Encoded, shape: tuple[int, ...], x_TH: torch.Tensor,
                   bias: dict[str, torch.Tensor | None], input_scale_E: torch.Tensor | None) -> None:
    """Raise unless an encoded matrix, its bias and its input scale fit `shape`, (E, ..., N, K), and the rows."""
    (name, bias_tensor), = bias.items()
    check_encoded(f"{operator}: {whose}{name.partition('_')[0]}", matrix, matrix.scheme, shape)
    sizes: dict[str, int] = dict(zip("EGI" if len(shape) == 4 else "EH", shape[:-1], strict=True))
    check_shapes(operator, {name: bias_tensor, "input_scale_E": input_scale_E}, sizes)
    check_dtypes(operator, bias, (x_TH.dtype,))
    check_dtypes(operator, {"input_scale_E": input_scale_E}, (torch.float32,))
    check_one_device(operator, {"x_TH": x_TH, f"{whose}codes": matrix.codes, name: bias_tensor,
                                "input_scale_E": input_scale_E})
    if (input_scale_E is not None) != ENCODINGS[matrix.scheme].input_scale:
        raise_faults(operator, [f"an input scale is {'not ' * (input_scale_E is None)}given with {name[:3]}, but "
                                f"scheme {matrix.scheme} has {'one' if input_scale_E is None else 'none'}"])
