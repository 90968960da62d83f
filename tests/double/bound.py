"""How far two correct fp64 evaluations of the layer may lie apart, whatever their order of summation.

Standard model (Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 3): an operation
returns the exact result times (1 + d), |d| <= u = 2^-53. A result that went through n of them is off by at
most gamma(n) = n u / (1 - n u) times the SUM OF THE ABSOLUTE VALUES of its terms. exp, erf and tanh are taken
to be good to 4 ulps, the weakest promise of glibc, SLEEF and NumPy. Two evaluations may err in opposite
directions, hence the factor 2 at the end. Data in these tests stay far from underflow.
"""

import math

import numpy as np

from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec, Router
from tests.double.layer import Arrays, mixing_matrix
from tests.double.router import Choice, dot

UNIT_ROUNDOFF = 2.0**-53

FUNCTION = 8
"""Error of exp, erf, tanh in units of u: 4 ulps, an ulp being at most 2 u."""

ACTIVATION_SLOPE = 1.13
"""Largest derivative: silu 1.0998, gelu 1.1290, gelu_tanh 1.1290."""

ACTIVATION = 2 * FUNCTION + 16
"""Rounding inside an activation in units of u |gate|. The error of 1 + erf or 1 + tanh is absolute, so near
their zero it is not small beside the activation, but it is always multiplied by the gate."""


def gamma(operations: float) -> float:
    """n u / (1 - n u)."""
    return operations * UNIT_ROUNDOFF / (1.0 - operations * UNIT_ROUNDOFF)


def score_error(x_H: np.ndarray, arrays: Arrays, router: Router,
                injected_E: np.ndarray | None = None) -> float:
    """Relative error of one token's scores.

    A logit is a sum of H products: gamma(H) times the sum of absolute values; injected logits are exact.
    softmax: numerator and denominator move by a factor e^error each, and subtracting the maximum rounds a
    number of at most twice the largest logit; then exp, a sum of E, a division. sigmoid: the derivative of
    its logarithm is at most 1; then exp, an addition, a division.
    """
    if injected_E is None:
        largest = max(dot(np.abs(x_H), row_H) for row_H in np.abs(arrays["router_EH"]))
        error = gamma(len(x_H)) * largest
    else:
        largest, error = float(np.abs(injected_E).max()), 0.0
    if router.score == "sigmoid":
        return math.expm1(error) + gamma(2 * FUNCTION + 4)
    return math.expm1(2.0 * (error + gamma(2) * largest)) + gamma(2 * FUNCTION + router.num_experts + 2)


def weight_error(router: Router, relative_score_error: float) -> float:
    """Relative error of a routing weight: its score's, that of the sum that divides it, K + 4 operations."""
    factor = 2.0 if router.renormalize else 1.0
    return factor * relative_score_error * (1.0 + 4.0 * relative_score_error) + gamma(router.top_k + 4)


def could_differ(choice: Choice, arrays: Arrays, router: Router, relative_score_error: float) -> bool:
    """Whether two correct evaluations may choose differently: some decision was closer than both errors.

    Scores are at most 1; a group score adds two of them, each with its bias. A decision compares two of
    these, and each of the two evaluations may have both of them wrong.
    """
    largest_bias = float(np.abs(arrays["selection_bias_E"]).max()) if router.selection_bias else 0.0
    error = 2.0 * (relative_score_error + gamma(3) * (1.0 + largest_bias))
    return choice.margin <= 4.0 * error


def layer_difference(x_TH: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray, arrays: Arrays,
                     spec: MoESpec, *, parallel: Parallel | None = None,
                     residual_TH: np.ndarray | None = None,
                     weight_error_T: np.ndarray | None = None) -> np.ndarray:
    """Largest difference of two correct results from one routing, (T, H).

    Sum of absolute values: over slots |w|, over neurons |w2| G U; G = sum |w1 x| bounds the gate, hence the
    activation (|activation| <= |gate|), and U = sum |w3 x| bounds up. Operations on the way: H for the gate,
    times the activation's slope; the activation itself; H for up; the product; I for down; the weight;
    K slots, the shared expert, the ranks and the residual to add. weight_error_T: relative error that the
    routing weights already carry.
    """
    arrays = {name: np.abs(array) for name, array in arrays.items()}
    merge = spec.top_k + (parallel.tp if parallel else 1) + 4
    inner = (1.0 + ACTIVATION_SLOPE) * spec.hidden_size + ACTIVATION + 2
    mixing_TE = mixing_matrix(ids_TK, np.abs(weights_TK), spec.num_experts)
    gate_TEI, up_TEI = np.einsum("th,egih->gtei", np.abs(x_TH), arrays["w13_EGIH"])
    routed_TH = np.einsum("te,tei,ehi->th", mixing_TE, gate_TEI * up_TEI, arrays["w2_EHI"])
    relative_T = np.zeros(len(x_TH)) if weight_error_T is None else weight_error_T
    operations = inner + spec.intermediate_size + merge
    bound_TH = (gamma(operations) + relative_T[:, None] * (1.0 + gamma(operations))) * routed_TH
    if spec.shared is not None:
        bound_TH += _shared_bound(np.abs(x_TH), arrays, spec, inner + merge)
    if residual_TH is not None:
        bound_TH += gamma(merge) * np.abs(residual_TH)
    return 2.0 * bound_TH


def _shared_bound(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, operations: float) -> np.ndarray:
    """The shared expert's part; its gate is a sigmoid (<= 1) of a sum of H products."""
    gate_TI, up_TI = np.einsum("th,gih->gti", x_TH, arrays["shared_w13_GIH"])
    shared_TH = np.einsum("ti,hi->th", gate_TI * up_TI, arrays["shared_w2_HI"])
    operations += spec.shared.intermediate_size + 2 * FUNCTION + 4
    relative_T1 = np.full((len(x_TH), 1), gamma(operations))
    if spec.shared.gate == "sigmoid":
        relative_T1 += 2.0 * np.expm1(gamma(spec.hidden_size) * (x_TH @ arrays["shared_gate_SH"].T))
    return relative_T1 * shared_TH
