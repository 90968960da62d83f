"""moe_fast on DTensors: sharding rules of the operators, plans for parallelize_module, the layer as one function.

Importing it registers the rules. Not imported by moe_fast itself, since torch.distributed.tensor takes seconds to load.
"""

import moe_fast.distributed.rules  # noqa: F401
from moe_fast.distributed.layer import moe_dtensor
from moe_fast.distributed.local import local_experts
from moe_fast.distributed.plans import MoEExpertParallel, MoETensorExpertParallel, MoETensorParallel
from moe_fast.distributed.roles import Role

__all__ = ["MoEExpertParallel", "MoETensorExpertParallel", "MoETensorParallel", "Role", "local_experts", "moe_dtensor"]
