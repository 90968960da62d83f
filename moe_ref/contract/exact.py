"""Which layers have inputs that every order of summation computes exactly, and how many terms fit. Imports no torch.

    gate    64 or 128, where silu and gelu are the identity to the last bit of fp64 (8 or 16 for relu_squared)
    up      -1 or 1, so an activation is an integer multiple of UNIT = 64: at most 2, of relu_squared at most 4
    down    TERMS activations with signs, times a routing weight of 2, 1 or 1/2: a multiple of UNIT / 2
    output  a sum of these over slots, shared expert, ranks and the residual, whose absolute values are at most
            256 times UNIT / 2 together: 8 bits, which every dtype holds whatever is added first
"""

from moe_ref.contract.spec import MLP, MoESpec
from moe_ref.contract.vocabulary import Format

UNIT = 64
"""Every activation, and half of it every row and sum, is an integer multiple of it."""
SLOT_WEIGHTS = (2.0, 1.0, 0.5)
"""Routing weights that follow each other over the slots, from token to token one further."""
STORED_LIMIT = 2**8
"""Integers up to this are exact in every dtype; bf16 has the fewest bits."""
MOST_TERMS = 16
LARGEST_HIDDEN = 2**20
"""A gate sums up absolute products of at most 4 H + 128, below 2^23 with this."""
NARROW = (Format.E4M3, Format.E5M2)
LONG_SUMS = (Format.FP32, Format.FP64)

_LARGEST_ACT = {"silu": 2, "gelu": 2, "gelu_tanh": 2, "relu": 2, "relu_squared": 4}
_RESIDUAL = 2
"""Largest residual in units of UNIT / 2."""


def down_terms(spec: MoESpec, residual: bool) -> int:
    """Activations that a down row may add up; below 1 where not even one fits."""
    most_weights = 7 * (spec.top_k // 3) + (0, 4, 6)[spec.top_k % 3] if spec.router else 2
    per_term = _LARGEST_ACT[spec.experts.activation] * most_weights
    columns = [spec.intermediate_size]
    if spec.shared is not None:
        per_term += 2 * _LARGEST_ACT[spec.shared.mlp.activation]
        columns.append(spec.shared.intermediate_size)
    return min(MOST_TERMS, *columns, (STORED_LIMIT - _RESIDUAL * residual) // per_term)


def exact_faults(spec: MoESpec, residual: bool) -> list[str]:
    """Why a layer has no exact inputs, in words; empty where it has."""
    faults = [f"data exact with {name}, but {why}" for given, name, why in (
        (spec.weight_on == "input", "weights on the input", "gates would leave the region in which they are exact"),
        (spec.output_bias, "an output bias", "biases are not drawn exactly"),
        (spec.router is not None and spec.router.num_zero_experts > 0, "identity experts",
         "tokens need more bits than 8 beside an expert's rows"),
        (spec.router is not None and spec.router.capacity is not None, "a capacity",
         "the routing is injected, so nothing is dropped"),
        (spec.shared is not None and spec.shared.gate != "none", "a gate of the shared expert",
         "a score is exact nowhere"),
        (spec.shared is not None and spec.shared.merge != "sum", "a mean", "sums alone are exact")) if given]
    for mlp in dict.fromkeys([spec.experts] + ([spec.shared.mlp] if spec.shared else [])):
        if mlp != MLP(activation=mlp.activation, gated=mlp.gated):
            faults.append("data exact with biases, limits, scales, offsets or caps of an MLP, but only plain "
                          "activations have a region in which they are exact")
    if spec.hidden_size > LARGEST_HIDDEN:
        faults.append(f"data exact with hidden_size={spec.hidden_size}, but should be at most {LARGEST_HIDDEN}, so "
                      "that sums fit 24 bits")
    if not faults and down_terms(spec, residual) < 1:
        faults.append(f"data exact with top_k={spec.top_k}, but sums over so many slots do not fit 8 bits")
    return faults
