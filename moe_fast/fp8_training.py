"""moe_fast training in 8 bits, as an implementation of its own: `moe-ref verify moe_fast.fp8_training`.

Weights stay in their dtype. Both operands of every product of experts are rounded to e4m3 along its sum, each row under
a scale of its own, forward and backward (docs/backward.md); sums are in fp32. Router, gates and biases are not rounded.
"""

from dataclasses import fields
from functools import wraps

from moe_fast import layer
from moe_fast.capabilities import FP8_TRAINING
from moe_fast.held import FP8Weights, Held
from moe_ref.contract.errors import UsageTypeError
from moe_ref.contract.module import LayerModule
from moe_ref.contract.weights import MoEWeights

CAPABILITIES = FP8_TRAINING

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
    """The layer over this rank's parameters, which stay in the dtype of its input; on DTensors too."""

    layer_function = staticmethod(layer.moe)

    @property
    def weights(self) -> FP8Weights:
        """The parameters as the functional form takes them."""
        return in_fp8(super().weights)
