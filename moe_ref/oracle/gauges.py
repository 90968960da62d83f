"""Sums of absolute and of squared terms beside every product: what error bounds and predicted deviations are made of.

A sum of n products a_k b_k, each operation rounded with relative error at most u, errs by at most
gamma(n) * sum |a_k b_k| (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and typically by
about u * sqrt(sum (a_k b_k)^2) for each rounding of a term. Both gauges hold whatever the order of summation.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_ref.contract.checks import check_routing, check_tokens
from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WeightSource, check_expert, check_weights
from moe_ref.oracle import expert as formula


class Gauged(NamedTuple):
    """A sum of products, the sum of its terms' absolute values, and that of their squares, in fp64."""

    value: torch.Tensor
    absolute: torch.Tensor
    squares: torch.Tensor


Observer = Callable[[int, torch.Tensor, torch.Tensor, Gauged], None]


def gauged_product(a_RK: torch.Tensor, b_NK: torch.Tensor) -> Gauged:
    """a @ b^T with its gauges, each (R, N) in fp64; one fp64 copy of b is made and reused."""
    a_RK, b_NK = a_RK.double(), b_NK.double() if b_NK.dtype != torch.float64 else b_NK.clone()
    value = a_RK @ b_NK.T
    absolute = a_RK.abs() @ b_NK.abs_().T
    return Gauged(value, absolute, a_RK.square() @ b_NK.square_().T)


@torch.no_grad()
def routed_with_gauges(x_TH: torch.Tensor, routing: Routing, weights: WeightSource, spec: MoESpec, *,
                       observe: Observer | None = None) -> Gauged:
    """The routed experts' weighted sum, (T, H), with the gauges of down product and merge, activations taken as exact.

    observe(e, token_R, slot_R, gate_up) gets the gate and up products of every expert, each (R, G, I), before
    biases are added. Unsharded weights; identity and shared experts have no part in it. Raises as `experts` does.
    """
    check_tokens(x_TH, spec, PLAIN_DTYPES, "moe_ref")
    check_weights(weights, spec, None, 0)
    check_routing(routing, spec, len(x_TH), "metadata")
    total = Gauged(*(torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device) for _ in range(3)))
    for e in range(spec.num_experts):
        token_R, slot_R = (routing.ids_TK == e).nonzero(as_tuple=True)
        if len(token_R) == 0:
            continue
        w13_GIH, w2_HI, w13_bias_GI, w2_bias_H = check_expert(weights.expert(e), spec, Parallel(), 0, e)
        w_R1 = routing.weights_TK[token_R, slot_R, None].double()
        on_input = spec.weight_on == "input"
        x_RH = x_TH[token_R].double() * w_R1 if on_input else x_TH[token_R]
        gate_up = Gauged(*(part.unflatten(1, w13_GIH.shape[:2])
                           for part in gauged_product(x_RH, w13_GIH.flatten(0, 1))))
        if observe is not None:
            observe(e, token_R, slot_R, gate_up)
        with_bias = gate_up.value if w13_bias_GI is None else gate_up.value + w13_bias_GI.double()
        down = gauged_product(formula.activate(with_bias, spec.experts), w2_HI)
        if w2_bias_H is not None:
            bias_H = w2_bias_H.double()
            down = Gauged(down.value + bias_H, down.absolute + bias_H.abs(), down.squares + bias_H.square())
        factor_R1 = torch.ones_like(w_R1) if on_input else w_R1
        for sum_TH, rows_RH, factor in zip(total, down, (factor_R1, factor_R1.abs(), factor_R1.square()), strict=True):
            sum_TH.index_add_(0, token_R, factor * rows_RH)
    return total
