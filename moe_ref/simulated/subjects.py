"""Simulated layers as subjects: `moe-ref verify moe_ref.simulated.subjects:pairwise` judges one as a right layer.

All are dense torch on the CPU in one rounding contract, the most usual: router in fp32, gate and up in registers, every
other row and partial sum in the dtype of the model.
"""

from collections.abc import Callable
from functools import partial

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.comm import Groups
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.contract.weights import WeightSource
from moe_ref.numerics.summation import Order
from moe_ref.numerics.summation import matmul as ordered_matmul
from moe_ref.numerics.tensor_core import matmul as tensor_core_matmul
from moe_ref.numerics.tensor_core import tensor_core
from moe_ref.simulated.fault import Matmul
from moe_ref.simulated.layer import SimulatedLayer, capabilities
from moe_ref.simulated.reduction import Reduction
from moe_ref.tolerances.load import load_tolerances


def usual_numerics(dtype: Dtype) -> Numerics:
    """The rounding contract of all subjects here."""
    model = Format(dtype.value)
    rows = dict.fromkeys((Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), model)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **rows}, reduce=model)


class Subject:
    """`moe` and `CAPABILITIES` of one machine: which product it has for each dtype, and how its ranks add up."""

    def __init__(self, name: str, machine: Callable[[Dtype], Matmul], reduction: Reduction = "ring") -> None:
        self.machine, self.reduction = machine, reduction
        self.CAPABILITIES = capabilities(f"simulated {name}", {dtype: usual_numerics(dtype) for dtype in Dtype})

    def moe(self, x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
        """The contract's entry point, (T, H); see SimulatedLayer.moe."""
        dtypes = {TORCH_DTYPES[dtype]: dtype for dtype in Dtype}
        dtype = dtypes.get(x_TH.dtype, Dtype.FP32)  # another is refused by any layer
        layer = SimulatedLayer(usual_numerics(dtype), self.machine(dtype), self.reduction)
        return layer.moe(x_TH, weights, spec, parallel, groups, routing=routing, logits_TE=logits_TE,
                         residual_TH=residual_TH, trace=trace)


def in_order(order: Order) -> Callable[[Dtype], Matmul]:
    """fp32 additions in one order for every dtype."""
    return lambda dtype: partial(ordered_matmul, order=order)


def on_device(hardware: str) -> Callable[[Dtype], Matmul]:
    """The tensor core of a hardware class for 16-bit operands, a chain of fp32 FMAs for fp32."""
    def product(dtype: Dtype) -> Matmul:
        if dtype is Dtype.FP32:
            return partial(ordered_matmul, order="sequential", fused=True)
        core = tensor_core(load_tolerances().file.hardware[hardware], Format(dtype.value))
        return partial(tensor_core_matmul, core=core)

    return product


sequential = Subject("sequential", in_order("sequential"))
backwards = Subject("reversed", in_order("reversed"), reduction="rank_order")
blocked = Subject("blocked", in_order("blocked"), reduction="tree")
pairwise = Subject("pairwise", in_order("pairwise"), reduction="once")
split_k = Subject("split_k", in_order("split_k"))
shuffled = Subject("shuffled", in_order("shuffled"), reduction="tree")
hopper = Subject("hopper", on_device("sm90"))
ampere = Subject("ampere", on_device("sm80"))
