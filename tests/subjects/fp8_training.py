"""Layers that train in 8 bits: both operands of every product of experts are rounded to e4m3 along its sum, forward and
backward, on torch's own float8_e4m3fn; and mistakes of such a layer."""

from dataclasses import dataclass, replace
from threading import local
from typing import Any

import torch

from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights, MoEWeights
from tests.subjects.base import Call
from tests.subjects.gradients import Rounded, RoundedThroughout
from tests.subjects.whole import WholeSpec
from tests.subjects.whole_variants import BlackBox, FP32Throughout, WeightedActivation

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Quantiser:
    """How the operands of products are rounded; a mistake overrides a method. is_backward: for a gradient."""

    comm: Comm | None = None
    power_of_two: bool = False

    def scales(self, values_RK: torch.Tensor, is_backward: bool) -> torch.Tensor:
        """One per row, (R, 1) fp32; 1 for zeros."""
        amax_R1 = self.amax(values_RK, is_backward)
        scale_R1 = amax_R1 / E4M3_MAX
        if self.power_of_two:
            scale_R1 = torch.exp2(torch.ceil(torch.log2(scale_R1)))
        return torch.where(amax_R1 < 2.0**-100, 1.0, scale_R1)

    def amax(self, values_RK: torch.Tensor, is_backward: bool) -> torch.Tensor:
        padded = torch.nn.functional.pad(values_RK, (0, 1))  # a row without columns has a largest number too
        return padded.abs().amax(1, keepdim=True)

    def codes(self, values_RK: torch.Tensor, scale_R1: torch.Tensor, is_backward: bool) -> torch.Tensor:
        """As numbers in fp32."""
        return (values_RK / scale_R1).to(torch.float8_e4m3fn).float()

    def product(self, a_MK: torch.Tensor, w_NK: torch.Tensor, is_backward: bool) -> torch.Tensor:
        """a @ w^T of rounded operands, (M, N) fp32."""
        scale_M1, scale_N1 = self.scales(a_MK, is_backward), self.scales(w_NK, is_backward)
        sums_MN = self.codes(a_MK, scale_M1, is_backward) @ self.codes(w_NK, scale_N1, is_backward).T
        return sums_MN * scale_M1 * scale_N1.T

    def forward(self, x_RK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
        return self.product(x_RK, w_NK, False)

    def of_rows(self, grad_RN: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
        """Gradient of the rows: both rounded along N, the weight anew."""
        return self.product(grad_RN, w_NK.T.contiguous(), True)

    def of_weight(self, grad_RN: torch.Tensor, x_RK: torch.Tensor) -> torch.Tensor:
        """Gradient of the weight: both rounded along the rows."""
        return self.product(grad_RN.T.contiguous(), x_RK.T.contiguous(), True)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RK: torch.Tensor, w_NK: torch.Tensor, quantiser: Quantiser) -> torch.Tensor:
        ctx.save_for_backward(x_RK, w_NK)
        ctx.quantiser = quantiser
        return quantiser.forward(x_RK, w_NK)

    @staticmethod
    def backward(ctx, grad_RN: torch.Tensor):  # type: ignore[override]
        x_RK, w_NK = ctx.saved_tensors
        return ctx.quantiser.of_rows(grad_RN, w_NK), ctx.quantiser.of_weight(grad_RN, x_RK), None


_rank = local()
"""What a rank, which is a thread, communicates through."""


class Products(WholeSpec):
    """WholeSpec with its products of experts in 8 bits. separately: gate and up are products of their own."""

    quantiser: type[Quantiser] = Quantiser
    power_of_two = False
    separately = False

    def __init__(self) -> None:
        super().__init__()
        given = self.CAPABILITIES
        numerics = {dtype: replace(one, products="fp8_row_e8m0" if self.power_of_two else "fp8_row",
                                   gradient_rows="each" if self.separately else "both")
                    for dtype, one in given.numerics.items()}
        # Of shared experts that the router weights each is a row of its own.
        features = tuple(one for one in given.features if one is not Feature.SHARED_ROUTER_GATE)
        self.CAPABILITIES = replace(given, numerics=numerics, features=features)

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, **options: Any) -> torch.Tensor:
        _rank.comm = (groups or Groups()).tp
        return super().moe(x_TH, weights, spec, parallel, groups, **options)

    def times(self, rows_RK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
        return _Product.apply(rows_RK, w_NK.float(), self.quantiser(_rank.comm, self.power_of_two))

    def project(self, x_RH: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        if self.separately:
            gate_up = torch.stack([self.times(x_RH, w_IH) for w_IH in expert.w13_GIH], 1)
        else:
            gate_up = self.times(x_RH, expert.w13_GIH.flatten(0, 1)).unflatten(1, expert.w13_GIH.shape[:2])
        return gate_up if expert.w13_bias_GI is None else gate_up + expert.w13_bias_GI.float()

    def projected_back(self, call: Call, act_RI: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        down_RH = self.times(act_RI, expert.w2_HI)
        return down_RH if expert.w2_bias_H is None else down_RH + self.down_bias(call, expert.w2_bias_H.float())


class Fp8Training(Rounded, Products):
    """Rows in the dtype of the model, sums and the gradients between products in fp32."""

class Separately(Fp8Training):
    """Gate and up are two products, as torchtitan has them."""

    separately = True


class PowersOfTwo(Separately):
    """As torchao rounds: scales up to a power of two."""

    power_of_two = True


class Throughout(RoundedThroughout, Products):
    """Every elementwise step is rounded, gate and up are stored, rows are weighted when they are merged."""


class Last(Rounded, FP32Throughout, Products):
    """fp32 rows and partial sums."""


class Hidden(Rounded, BlackBox, Products):
    """Shows nothing but its output and its gradients."""


class OnActivation(Rounded, WeightedActivation, Products):
    """The routing weight joins the activation: what the second product rounds holds it."""

    def expert_rows(self, call: Call, gate_up_RGI: torch.Tensor, expert: ExpertWeights,
                    weight_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if call.spec.weight_on == "input":
            return WholeSpec.expert_rows(self, call, gate_up_RGI, expert, weight_R1)
        act_RI = call.round(Stage.ACT, self.activated(gate_up_RGI, call.spec.experts)).float()
        act_RI = call.round(Stage.ACT, act_RI * weight_R1).float()
        down_RH = self.times(act_RI, expert.w2_HI)
        if expert.w2_bias_H is not None:
            down_RH = down_RH + self.down_bias(call, expert.w2_bias_H.float()) * weight_R1
        return act_RI, down_RH


# Mistakes, of quantisers.


class TensorScale(Quantiser):
    """One scale for a whole operand of a gradient's product."""

    def amax(self, values_RK: torch.Tensor, is_backward: bool) -> torch.Tensor:
        amax_R1 = super().amax(values_RK, is_backward)
        return amax_R1.max().expand_as(amax_R1) if is_backward and amax_R1.numel() else amax_R1


class WrongAxis(Quantiser):
    """Operands of a weight's gradient are rounded under scales of their rows, not along the sum over rows."""

    def of_weight(self, grad_RN: torch.Tensor, x_RK: torch.Tensor) -> torch.Tensor:
        grad_RN, x_RK = (self.codes(one, self.scales(one, True), True) * self.scales(one, True)
                         for one in (grad_RN, x_RK))
        return grad_RN.T @ x_RK


class WeightNotRoundedAnew(Quantiser):
    """The gradient of the rows multiplies the codes of the forward pass."""

    def of_rows(self, grad_RN: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
        scale_R1, scale_N1 = self.scales(grad_RN, True), self.scales(w_NK, False)
        rounded_NK = self.codes(w_NK, scale_N1, False) * scale_N1
        return self.codes(grad_RN, scale_R1, True) * scale_R1 @ rounded_NK


class NeighbouringScale(Quantiser):
    """Sums of a gradient's product are read with the scale of the row before."""

    def product(self, a_MK: torch.Tensor, w_NK: torch.Tensor, is_backward: bool) -> torch.Tensor:
        product_MN, scale_N1 = super().product(a_MK, w_NK, is_backward), self.scales(w_NK, is_backward)
        return product_MN / scale_N1.T * scale_N1.T.roll(1, 1) if is_backward else product_MN


class GradientInBf16(Quantiser):
    """The gradient is rounded to bf16 alone."""

    def of_rows(self, grad_RN: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
        scale_K1 = self.scales(w_NK.T, True)
        return grad_RN.bfloat16().float() @ (self.codes(w_NK.T, scale_K1, True) * scale_K1).T

    def of_weight(self, grad_RN: torch.Tensor, x_RK: torch.Tensor) -> torch.Tensor:
        scale_K1 = self.scales(x_RK.T, True)
        return grad_RN.bfloat16().float().T @ (self.codes(x_RK.T, scale_K1, True) * scale_K1).T


class WeightGradientInBf16(Quantiser):
    """The gradient of the weight multiplies operands in bf16."""

    def of_weight(self, grad_RN: torch.Tensor, x_RK: torch.Tensor) -> torch.Tensor:
        return grad_RN.bfloat16().float().T @ x_RK.bfloat16().float()


class E5m2Gradient(Quantiser):
    """Gradients become e5m2, whose largest number is 57344."""

    def product(self, a_MK: torch.Tensor, w_NK: torch.Tensor, is_backward: bool) -> torch.Tensor:
        if not is_backward:
            return super().product(a_MK, w_NK, is_backward)
        scale_M1, scale_N1 = self.scales(a_MK, True), self.scales(w_NK, True)
        scale_M1 = scale_M1 * E4M3_MAX / 57344
        codes_MK = (a_MK / scale_M1).to(torch.float8_e5m2).float()
        return codes_MK @ self.codes(w_NK, scale_N1, True).T * scale_M1 * scale_N1.T


class OverRanks(Quantiser):
    """The largest number of a row is taken over all ranks' columns."""

    def amax(self, values_RK: torch.Tensor, is_backward: bool) -> torch.Tensor:
        amax_R1 = super().amax(values_RK, is_backward)
        if not is_backward or self.comm is None or self.comm.size == 1:
            return amax_R1
        return torch.stack(self.comm.all_gather(amax_R1)).amax(0)


class ScaleForgotten(Quantiser):
    """Sums of a weight's gradient are not multiplied by the scales of the gradient."""

    def of_weight(self, grad_RN: torch.Tensor, x_RK: torch.Tensor) -> torch.Tensor:
        return super().of_weight(grad_RN, x_RK) / self.scales(grad_RN.T, True)


def mistaken(quantiser: type[Quantiser], layer: type[Products] = Fp8Training) -> Products:
    """A layer with a mistaken quantiser."""
    return type(quantiser.__name__, (layer,), {"quantiser": quantiser})()
