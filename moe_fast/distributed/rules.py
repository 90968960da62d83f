"""Sharding rules of torch.ops.moe_fast, registered on import: which placements an operator takes and returns.

Each mesh dimension has one Role, any combination of which is sound over several dimensions, because every sum here is
linear in what is cut. For placements that no rule takes DTensor redistributes to those of one that does.
"""

from collections.abc import Sequence

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

import moe_fast.operators.experts
import moe_fast.operators.router_logits
import moe_fast.operators.select  # noqa: F401
from moe_fast.distributed.roles import Role, of_gradient, of_result, of_tensor

Rule = tuple[list[Placement | None], list[Placement | None]]
"""Placements of an operator's results and of its arguments along one mesh dimension; None: no tensor."""

BY_TOKEN = (Role.REPLICATED, Role.TOKENS)
"""Roles for operators that work on each token by itself."""

EXPERTS = ("x_TH", "ids_TK", "weights_TK", "hosted_E", "w13_EGIH", "w2_EHI", "shared_w13_GIH", "shared_w2_HI",
           "shared_gate_T1")
"""Tensors of moe_fast::experts in the order of its arguments."""

EXPERTS_GRADIENTS = tuple(name for name in EXPERTS if name not in ("ids_TK", "hosted_E"))
"""Tensors whose gradients moe_fast::experts_backward returns, in their order."""


def taken(names: Sequence[str], given: Sequence[object], role: Role) -> list[Placement | None]:
    """Placements of the arguments `given`: of tensors by name, None for absent ones and for what follows them."""
    named = [None if value is None else of_tensor(name, role) for name, value in zip(names, given, strict=False)]
    return named + [None] * (len(given) - len(names))


def experts_rules(*given: object) -> list[Rule]:
    """moe_fast::experts: merged_TH."""
    return [([of_result(role)], taken(EXPERTS, given, role)) for role in Role]


def experts_backward_rules(*given: object) -> list[Rule]:
    """moe_fast::experts_backward: gradients of all floating tensors; of those not given, empty ones on every rank."""
    present = dict(zip(EXPERTS, given[1:], strict=False))
    return [([Replicate() if present[name] is None else of_gradient(name, role) for name in EXPERTS_GRADIENTS],
             taken(("grad_TH", *EXPERTS), given, role)) for role in Role]


def router_logits_rules(*given: object) -> list[Rule]:
    """moe_fast::router_logits: logits_TE; the gate of a sequence-parallel layer sees the rank's own tokens."""
    return [([of_tensor("logits_TE", role)], taken(("x_TH", "router_EH"), given, role)) for role in BY_TOKEN]


def router_logits_backward_rules(*given: object) -> list[Rule]:
    """moe_fast::router_logits_backward: gradients of x_TH and router_EH."""
    return [([of_gradient("x_TH", role), of_gradient("router_EH", role)],
             taken(("grad_TE", "x_TH", "router_EH"), given, role)) for role in BY_TOKEN]


def select_rules(*given: object) -> list[Rule]:
    """moe_fast::select: ids_TK and weights_TK."""
    return [([of_tensor("ids_TK", role), of_tensor("weights_TK", role)],
             taken(("logits_TE", "selection_bias_E"), given, role)) for role in BY_TOKEN]


def select_backward_rules(*given: object) -> list[Rule]:
    """moe_fast::select_backward: the gradient of logits_TE."""
    return [([of_gradient("logits_TE", role)], taken(("grad_TK", "logits_TE", "ids_TK"), given, role))
            for role in BY_TOKEN]


RULES = {
    torch.ops.moe_fast.experts.default: experts_rules,
    torch.ops.moe_fast.experts_backward.default: experts_backward_rules,
    torch.ops.moe_fast.router_logits.default: router_logits_rules,
    torch.ops.moe_fast.router_logits_backward.default: router_logits_backward_rules,
    torch.ops.moe_fast.select.default: select_rules,
    torch.ops.moe_fast.select_backward.default: select_backward_rules,
}

for _operator, _rules in RULES.items():
    register_sharding(_operator)(_rules)
