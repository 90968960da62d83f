"""A prediction of times from what the compiler and the launches say: no GPU is asked, and none has confirmed it yet.

    devices   what a device reaches, and what is assumed of it
    product   a product as its kernel walks it: shape, tile, row blocks
    walk      programs, waves, bytes: reuse in L2 by a least-recently-used walk over stripes of operands
    predict   seconds of a product, and what bounds it
    layer     every kernel of a layer on one rank
"""

from moe_fast.roofline.devices import DEVICES
from moe_fast.roofline.layer import KernelTime, LayerTime, predict_layer

__all__ = ["DEVICES", "KernelTime", "LayerTime", "predict_layer"]
