"""moe_fast inside `batch_invariant`, as an implementation that declares it: `moe-ref verify moe_fast.invariant`."""

from dataclasses import replace

from moe_fast import layer
from moe_fast.capabilities import CAPABILITIES as DEFAULT
from moe_fast.invariance import batch_invariant

CAPABILITIES = replace(DEFAULT, name="moe_fast.invariant", batch_invariant=True)

route, experts, moe = (batch_invariant()(function) for function in (layer.route, layer.experts, layer.moe))
