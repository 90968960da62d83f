"""moe_fast: the tensor-parallel MoE layer in Triton; same names and signatures as moe_ref.

On CUDA tensors the kernels are compiled; on CPU tensors the same sources run in Triton's interpreter,
switched per launch by the package.
"""

from moe_fast.capabilities import CAPABILITIES
from moe_fast.invariance import batch_invariant
from moe_fast.layer import experts, moe, route
from moe_fast.module import MoELayer
from moe_fast.saving import saving_activations

__all__ = ["CAPABILITIES", "MoELayer", "batch_invariant", "experts", "moe", "route", "saving_activations"]
