"""moe_fast training in 8 bits, as an implementation of its own: `moe-ref verify moe_fast.fp8_training`.

Weights stay in their dtype. Both operands of every product of experts are rounded to e4m3 along its sum, each row under
a scale of its own, forward and backward (docs/backward.md); sums are in fp32. Router, gates and biases are not rounded.
"""

from dataclasses import fields, replace
from functools import wraps

from moe_fast import layer
from moe_fast.capabilities import CAPABILITIES as DEFAULT
from moe_fast.capabilities import LONGEST_SUM
from moe_fast.held import FP8Weights, Held
from moe_ref.contract.errors import UsageTypeError
from moe_ref.contract.features import Feature
from moe_ref.contract.module import LayerModule
from moe_ref.contract.weights import MoEWeights

CAPABILITIES = replace(
    DEFAULT, name="moe_fast.fp8_training", schemes={},
    numerics={dtype: replace(numerics, products="fp8_row", promoted_after=LONGEST_SUM)
              for dtype, numerics in DEFAULT.numerics.items()},
    # Of shared experts that the router weights each is a row of its own.
    features=tuple(one for one in DEFAULT.features if one is not Feature.SHARED_ROUTER_GATE))


_NAMES = tuple(field.name for field in fields(MoEWeights))
"""Asked for once: torch.compile cannot ask inside a graph."""


def in_fp8(weights: Held) -> FP8Weights:
    """The same tensors, of experts that moe_fast trains in 8 bits; UsageTypeError unless they are plain."""
    if not isinstance(weights, MoEWeights):
        raise UsageTypeError(f"weights: {type(weights).__name__}, but should be MoEWeights [moe_fast.fp8_training]")
    return FP8Weights(**{name: getattr(weights, name) for name in _NAMES})


route = layer.route


@wraps(layer.experts)
def experts(x_TH, routing, weights, *arguments, **options):
    return layer.experts(x_TH, routing, in_fp8(weights), *arguments, **options)


@wraps(layer.moe)
def moe(x_TH, weights, *arguments, **options):
    return layer.moe(x_TH, in_fp8(weights), *arguments, **options)


class MoELayer(LayerModule):
    """The layer over this rank's parameters, which stay in the dtype of its input."""

    layer_function = staticmethod(moe)
