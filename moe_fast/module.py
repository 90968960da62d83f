"""The fast layer as an nn.Module."""

from moe_fast.layer import moe
from moe_ref.contract.module import LayerModule


class MoELayer(LayerModule):
    """The fast layer over this rank's parameters; output in the dtype of its input."""

    layer_function = staticmethod(moe)
