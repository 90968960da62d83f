"""moe_fast inside `saving_activations`, as an implementation of its own: `moe-ref verify moe_fast.saved`."""

from dataclasses import replace

from moe_fast import layer
from moe_fast.capabilities import CAPABILITIES as DEFAULT
from moe_fast.saving import saving_activations

CAPABILITIES = replace(DEFAULT, name="moe_fast.saved")

route, experts, moe = (saving_activations()(function) for function in (layer.route, layer.experts, layer.moe))
