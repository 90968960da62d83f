"""Sharding rules of torch.ops.moe_fast, registered on import: which placements an operator takes and returns.

Each mesh dimension has one Role, any combination of which is sound over several dimensions, because every sum here is
linear in what is cut. For placements that no rule takes DTensor redistributes to those of one that does.
"""

from collections.abc import Callable, Iterable

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

import moe_fast.operators.act_rows
import moe_fast.operators.experts
import moe_fast.operators.merged_down
import moe_fast.operators.router_logits
import moe_fast.operators.select  # noqa: F401
from moe_fast.distributed.roles import Role, of_result, of_tensor

Rule = tuple[list[Placement | None], list[Placement | None]]
"""Placements of an operator's results and of its arguments along one mesh dimension; None: no tensor."""

BY_TOKEN = (Role.REPLICATED, Role.TOKENS)
"""Roles for operators that work on each token by itself, with parameters that are never cut."""

BY_WEIGHT = (Role.REPLICATED, Role.COLUMNS, Role.EXPERTS)
"""Roles for operators with rows in (token, slot) order: those of shards of tokens are no shards of T * K rows."""

ROUTER = ("x_TH", "router_EH", "router_bias_E")
SHARED = ("shared_w13_GIH", "shared_w2_HI", "shared_gate_T1")
EXPERTS = ("x_TH", "ids_TK", "weights_TK", "hosted_E", "w13_EGIH", "w2_EHI", *SHARED)
ACT_ROWS = ("x_TH", "ids_TK", "hosted_E", "w13_EGIH")
MERGED_DOWN = ("act_RI", "ids_TK", "weights_TK", "hosted_E", "w2_EHI", "shared_act_TI", "shared_w2_HI",
               "shared_gate_T1")
"""Tensors that operators take, in the order of their arguments."""


def rules_of(results: Iterable[str], tensors: tuple[str, ...], roles: Iterable[Role]) -> Callable[..., list[Rule]]:
    """The rules of an operator as register_sharding takes them, one per role, from the names of all its tensors.

    A gradient is a result with the name of its tensor; of a tensor that is not given it is empty, on every rank.
    """
    def rules(*given: object) -> list[Rule]:
        absent = {name for name, value in zip(tensors, given, strict=False) if value is None}
        others = [None] * (len(given) - len(tensors))
        return [([Replicate() if name in absent else of_result(name, role) for name in results],
                 [None if name in absent else of_tensor(name, role) for name in tensors] + others) for role in roles]

    return rules


RULES = {
    torch.ops.moe_fast.router_logits.default: rules_of(("logits_TE",), ROUTER, BY_TOKEN),
    torch.ops.moe_fast.router_logits_backward.default: rules_of(ROUTER, ("grad_TE", *ROUTER), BY_TOKEN),
    torch.ops.moe_fast.select.default: rules_of(
        ("ids_TK", "weights_TK", "shared_TS"),
        ("logits_TE", "shared_logits_TS", "selection_bias_E", "weight_scale_E"), BY_TOKEN),
    torch.ops.moe_fast.select_backward.default: rules_of(
        ("logits_TE", "shared_logits_TS", "weight_scale_E"),
        ("grad_TK", "grad_TS", "logits_TE", "shared_logits_TS", "weight_scale_E", "ids_TK"), BY_TOKEN),
    torch.ops.moe_fast.experts.default: rules_of(("merged_TH",), EXPERTS, Role),
    torch.ops.moe_fast.experts_backward.default: rules_of(
        ("x_TH", "weights_TK", "w13_EGIH", "w2_EHI", *SHARED), ("grad_TH", *EXPERTS), Role),
    torch.ops.moe_fast.act_rows.default: rules_of(("act_RI",), ACT_ROWS, BY_WEIGHT),
    torch.ops.moe_fast.act_rows_backward.default: rules_of(("x_TH", "w13_EGIH"), ("grad_RI", *ACT_ROWS), BY_WEIGHT),
    torch.ops.moe_fast.merged_down.default: rules_of(("merged_TH",), MERGED_DOWN, BY_WEIGHT),
    torch.ops.moe_fast.merged_down_backward.default: rules_of(
        ("act_RI", "weights_TK", "w2_EHI", "shared_act_TI", "shared_w2_HI", "shared_gate_T1"),
        ("grad_TH", *MERGED_DOWN), BY_WEIGHT),
}

for _operator, _rules in RULES.items():
    register_sharding(_operator)(_rules)
