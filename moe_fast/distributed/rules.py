"""Sharding rules of torch.ops.moe_fast, registered on import: which placements an operator takes and returns.

Each mesh dimension has one Role, any combination of which is sound over several dimensions, because every sum here is
linear in what is cut; where operands are rounded, each rank's rows have scales of their own, as contracts say. For
placements that no rule takes DTensor redistributes to those of one that does.
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
from moe_fast.distributed.roles import Role, of_argument, of_gradient, of_result

Rule = tuple[list[Placement | None], list[Placement | None]]
"""Placements of an operator's results and of its arguments along one mesh dimension; None: no tensor."""

BY_TOKEN = (Role.REPLICATED, Role.TOKENS)
"""Roles for operators that work on each token by itself, with parameters that are never cut."""

BY_WEIGHT = (Role.REPLICATED, Role.COLUMNS, Role.EXPERTS)
"""Roles for operators with rows in (token, slot) order: those of shards of tokens are no shards of T * K rows."""

ROUTER = ("x_TH", "router_EH", "router_bias_E")
SHARED = ("shared_w13_GIH", "shared_w2_HI", "shared_gate_T1")
BIASES = ("w13_bias_EGI", "w2_bias_EH", "shared_w13_bias_GI", "shared_w2_bias_H", "output_bias_H")
EXPERTS = ("x_TH", "ids_TK", "weights_TK", "hosted_E", "w13_EGIH", "w2_EHI", *SHARED, None, None, *BIASES, None, None)
ACT_ROWS = ("x_TH", "ids_TK", "hosted_E", "w13_EGIH", None, "weights_TK", "w13_bias_EGI", None)
MERGED_DOWN = ("act_RI", "ids_TK", "weights_TK", "hosted_E", "w2_EHI", "shared_act_TI", "shared_w2_HI",
               "shared_gate_T1", "w2_bias_EH", "shared_w2_bias_H", "output_bias_H", None, None)
"""Tensors that operators take, in the order of their arguments; None: an argument that is no tensor."""


def rules_of(results: Iterable[str], arguments: tuple[str | None, ...], roles: Iterable[Role],
             backward: bool = False) -> Callable[..., list[Rule]]:
    """The rules of an operator as register_sharding takes them, one per role, from the names of all its arguments.

    backward: each result is the gradient of the argument of its name; of one that is not given it is empty, on every
    rank. Arguments that are left out at the end are not given either.
    """
    def rules(*given: object) -> list[Rule]:
        names = arguments[:len(given)] + (None,) * (len(given) - len(arguments))
        present = {name for name, value in zip(names, given, strict=True) if name and value is not None}
        of_one = of_gradient if backward else of_result
        return [([Replicate() if backward and name not in present else of_one(name, role) for name in results],
                 [of_argument(name, role) if name in present else None for name in names]) for role in roles]

    return rules


RULES = {
    torch.ops.moe_fast.router_logits.default: rules_of(("logits_TE",), ROUTER, BY_TOKEN),
    torch.ops.moe_fast.router_logits_backward.default: rules_of(ROUTER, ("grad_TE", *ROUTER), BY_TOKEN, backward=True),
    torch.ops.moe_fast.select.default: rules_of(
        ("ids_TK", "weights_TK", "shared_TS"),
        ("logits_TE", "shared_logits_TS", "selection_bias_E", "weight_scale_E"), BY_TOKEN),
    torch.ops.moe_fast.select_backward.default: rules_of(
        ("logits_TE", "shared_logits_TS", "weight_scale_E"),
        ("grad_TK", "grad_TS", "logits_TE", "shared_logits_TS", "weight_scale_E", "ids_TK"), BY_TOKEN,
        backward=True),
    torch.ops.moe_fast.experts.default: rules_of(("merged_TH",), EXPERTS, Role),
    torch.ops.moe_fast.experts_backward.default: rules_of(
        ("x_TH", "weights_TK", "w13_EGIH", "w2_EHI", *SHARED, *BIASES), ("grad_TH", *EXPERTS), Role, backward=True),
    torch.ops.moe_fast.act_rows.default: rules_of(("act_RI",), ACT_ROWS, BY_WEIGHT),
    torch.ops.moe_fast.act_rows_backward.default: rules_of(
        ("x_TH", "w13_EGIH", "weights_TK", "w13_bias_EGI"), ("grad_RI", *ACT_ROWS), BY_WEIGHT, backward=True),
    torch.ops.moe_fast.merged_down.default: rules_of(("merged_TH",), MERGED_DOWN, BY_WEIGHT),
    torch.ops.moe_fast.merged_down_backward.default: rules_of(
        ("act_RI", "weights_TK", "w2_EHI", "shared_act_TI", "shared_w2_HI", "shared_gate_T1", "w2_bias_EH",
         "shared_w2_bias_H", "output_bias_H"), ("grad_TH", *MERGED_DOWN), BY_WEIGHT, backward=True),
}

for _operator, _rules in RULES.items():
    register_sharding(_operator)(_rules)
