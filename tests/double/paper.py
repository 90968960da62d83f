"""Layers whose result is a small multiple of the token, exact in binary, for vectors worked out on paper."""

import numpy as np

from moe_ref import MoESpec, Router
from tests.double.layer import Arrays

FACTORS = (1.0, 2.0, 4.0, 8.0)


def scaling_mlp(factor: float) -> tuple[np.ndarray, np.ndarray]:
    """w13 and w2 of an expert that maps the token (v, 1) to (factor * v, 0); H = 2, I = 2, two equal halves.

    gate = 64 * 1, silu(gate) = 64, up = factor * v / 64, act = factor * v in both neurons, w2 = (1/2, 1/2).
    """
    w13_GIH = np.array([[[0.0, 64.0]] * 2, [[factor / 64.0, 0.0]] * 2])
    return w13_GIH, np.array([[0.5, 0.5], [0.0, 0.0]])


def scaling_arrays(logits: tuple[float, ...], factors: tuple[float, ...] = FACTORS) -> Arrays:
    """Expert e multiplies v by factors[e]; the token (v, 1) has exactly these logits."""
    experts = [scaling_mlp(factor) for factor in factors]
    return {"w13_EGIH": np.stack([w13 for w13, _ in experts]), "w2_EHI": np.stack([w2 for _, w2 in experts]),
            "router_EH": np.array([[0.0, logit] for logit in logits])}


def scaling_spec(**router: object) -> MoESpec:
    """H = 2, I = 2, four experts unless told otherwise."""
    return MoESpec(hidden_size=2, intermediate_size=2, router=Router(**{"num_experts": 4, **router}))


def token(value: float) -> np.ndarray:
    """The token (v, 1)."""
    return np.array([[value, 1.0]])


def neuron_arrays(gate: float, up: float | None) -> Arrays:
    """One expert of one neuron, H = I = 1, w2 = 1: the token 1 gives activation(gate) * up."""
    rows = [[gate]] if up is None else [[gate], [up]]
    return {"w13_EGIH": np.array([[[row] for row in rows]]), "w2_EHI": np.ones((1, 1, 1))}
