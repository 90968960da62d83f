"""moe_fast::experts as a function of local tensors, between DTensors, by local_map."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import local_map
from torch.distributed.tensor.placement_types import Placement

from moe_fast.distributed.roles import Role, of_argument, of_gradient, of_result
from moe_fast.distributed.rules import EXPERTS
from moe_fast.operators.experts import experts
from moe_ref.contract.errors import raise_faults


def local_experts(mesh: DeviceMesh, roles: Sequence[Role],
                  function: Callable[..., torch.Tensor] = experts) -> Callable[..., Any]:
    """A function with moe_fast::experts' arguments that runs `function` on the local tensors of DTensors.

    roles: one for each mesh dimension. Its result is a DTensor, Partial where the role cuts parameters; so are the
    gradients of x_TH, weights_TK and shared_gate_T1. Raises ValueError for DTensors that are placed otherwise, and
    UsageValueError for tokens that do not divide evenly: local_map puts a result together from equal parts only.
    """
    def placements(arguments: Sequence[object], place: Callable[[str, Role], Placement]) -> tuple:
        # Only DTensors have placements; what follows the tensors has no name.
        names = EXPERTS[:len(arguments)]
        return tuple([place(name, role) for role in roles] if name and isinstance(value, DTensor) else None
                     for name, value in zip(names, arguments, strict=True))

    parts = prod(size for size, role in zip(mesh.shape, roles, strict=True) if role is Role.TOKENS)

    def call(x_TH: torch.Tensor, *others: object) -> Any:
        if isinstance(x_TH, DTensor) and x_TH.shape[0] % parts:
            raise_faults("local_experts", [f"{x_TH.shape[0]} tokens, but should be a multiple of the {parts} ranks "
                                           "that share them"])
        arguments = (x_TH, *others)
        mapped = local_map(function, [of_result("merged_TH", role) for role in roles],
                           placements(arguments, of_argument), placements(arguments, of_gradient), mesh)
        return mapped(*arguments)

    return call
