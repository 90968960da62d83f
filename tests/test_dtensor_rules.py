"""The operators' sharding rules: right for every placement of their arguments, without communication for their own."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

import moe_fast
from moe_fast.operators.select import select_by
from moe_ref.contract.errors import UsageValueError
from tests.backward_bound import Named
from tests.dtensor_cases import Problem, problem, warm_up
from tests.gloo_ranks import run_gloo_ranks

NAMES = {"merged_TH": "y_TH", "shared_gate_T1": "shared_TS"}
"""Tensors of the operators that have another name in the layer."""


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    warm_up()


def arguments(given: Problem) -> dict[str, torch.Tensor]:
    """Tensors of moe_fast::experts by name, in its order, for the routing that the layer chooses."""
    inputs, weights = given.inputs, given.inputs.weights
    routing = moe_fast.route(inputs.x_TH, weights, given.spec)
    tensors = {"x_TH": inputs.x_TH, "ids_TK": routing.ids_TK, "weights_TK": routing.weights_TK,
               "hosted_E": torch.arange(given.spec.num_experts), "w13_EGIH": weights.w13_EGIH,
               "w2_EHI": weights.w2_EHI, "shared_w13_GIH": weights.shared_w13_GIH,
               "shared_w2_HI": weights.shared_w2_HI, "shared_gate_T1": routing.shared_TS}
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}


def passed(given: Problem, function: Callable, mesh: Any, placements: dict[str, list],
           grad_placements: list) -> tuple[dict[str, Any], int]:
    """Result and gradients of the experts on DTensors, by name, and the number of collectives of both passes."""
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    leaves = {name: distribute_tensor(tensor, mesh, placements[name], src_data_rank=None)
              for name, tensor in arguments(given).items()}
    for leaf in leaves.values():
        leaf.requires_grad_(leaf.dtype.is_floating_point)
    grad_TH = distribute_tensor(given.inputs.grad_y_TH, mesh, grad_placements, src_data_rank=None)
    with CommDebugMode() as counted:
        merged_TH = function(*leaves.values(), "silu", "silu")
        merged_TH.backward(grad_TH)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(gradients) == 7
    return {"merged_TH": merged_TH, **gradients}, counted.get_total_counts()


def excess(given: Problem, found: dict[str, Any]) -> dict[str, float]:
    """Largest error over its bound, by name, of whole tensors put together from all ranks."""
    whole: Named = {NAMES.get(name, name): tensor.detach().full_tensor() for name, tensor in found.items()}
    return {name: ratio for name, ratio in given.excess(whole).items() if not ratio <= 1}


GATHERS_UNEVEN = torch.__version__.startswith("2.11.")
"""torch 2.11 gathers gradients of parameters that do not divide evenly where local_map hands them back
(pytorch/pytorch #107661, mended by #177174); delete with torch 2.11."""


def by_roles(given: Problem, function: Callable, shape: tuple[int, ...], roles: tuple, gathers: bool = False) -> None:
    """One role per mesh dimension: the declared placements, right whole tensors, and no collective at all.

    gathers: torch may send gradients and place them otherwise; the numbers have to be right all the same.
    """
    from torch.distributed.device_mesh import init_device_mesh

    from moe_fast.distributed.roles import of_result, of_tensor

    found, collectives = passed(given, function, init_device_mesh("cpu", shape),
                                {name: [of_tensor(name, role) for role in roles] for name in arguments(given)},
                                [of_tensor("merged_TH", role) for role in roles])
    if not gathers:
        assert collectives == 0, roles
        for name, tensor in found.items():
            assert tensor.placements == tuple(of_result(name, role) for role in roles), (name, roles)
    assert excess(given, found) == {}, roles


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("shape", [(2,), (3,), (4,), (2, 2)], ids=str)
def test_every_role_and_pair_of_roles(shape: tuple[int, ...]) -> None:
    """Tokens, columns and experts over 2, 3 and 4 ranks, where nothing divides evenly, and over two dimensions."""
    given = problem("gated shared", injected=True)

    def body(rank: int) -> None:
        from moe_fast.distributed import Role

        for roles in product(Role, repeat=len(shape)):
            by_roles(given, torch.ops.moe_fast.experts, shape, roles)

    run_gloo_ranks(torch.Size(shape).numel(), body)


def test_the_experts_by_local_map() -> None:
    """The same placements and numbers from a function that sees local tensors only; uneven tokens are refused."""
    given, uneven = problem("gated shared", num_tokens=12, injected=True), problem("gated shared", injected=True)

    def body(rank: int) -> str:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor

        from moe_fast.distributed import Role, local_experts

        def local(*tensors: Any) -> torch.Tensor:
            assert not any(isinstance(tensor, DTensor) for tensor in tensors)
            return torch.ops.moe_fast.experts(*tensors)

        mesh = init_device_mesh("cpu", (2, 2))
        for roles in [(Role.EXPERTS, Role.COLUMNS), (Role.COLUMNS, Role.REPLICATED), (Role.TOKENS, Role.COLUMNS)]:
            by_roles(given, local_experts(mesh, roles, local), (2, 2), roles, gathers=GATHERS_UNEVEN)
        with pytest.raises(UsageValueError) as raised:
            by_roles(uneven, local_experts(mesh, roles), (2, 2), roles)
        return str(raised.value)

    [said] = set(run_gloo_ranks(4, body))
    assert said == "local_experts: 11 tokens, but should be a multiple of the 2 ranks that share them"


TOKENS = {"x_TH": 0, "ids_TK": 0, "weights_TK": 0, "shared_gate_T1": 0}
COLUMNS = {"w13_EGIH": 2, "w2_EHI": 2}
DEALT = {"w13_EGIH": 0, "w2_EHI": 0}
SHARED = {"shared_w13_GIH": 1, "shared_w2_HI": 1}
MIXED: dict[str, dict[str, int]] = {
    "routed experts cut, the shared one whole": COLUMNS,
    "experts dealt out, the shared one whole": DEALT | {"hosted_E": 0},
    "experts dealt out, their ids whole": DEALT | SHARED,
    "ids dealt out, experts whole": {"hosted_E": 0},
    "the shared expert cut, routed ones whole": SHARED,
    "tokens sharded, their routing whole": {"x_TH": 0},
    "routing sharded, tokens whole": {"ids_TK": 0, "weights_TK": 0},
    "tokens sharded, experts cut": TOKENS | COLUMNS | SHARED,
    "hidden axis of tokens cut": {"x_TH": 1} | COLUMNS,
    "hidden axis of w13 cut": {"w13_EGIH": 3, "w2_EHI": 2},
    "output of w2 cut": {"w13_EGIH": 2, "w2_EHI": 1} | SHARED,
    "one product dealt out, the other cut": {"w13_EGIH": 0, "w2_EHI": 2},
}
"""Placements beside any rule: the dimension that is cut over two ranks, of the tensors that are cut."""


def mixed(given: Problem, cuts: dict[str, int]) -> dict[str, float]:
    """Excess for tensors cut so over two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    placed = {name: [Shard(cuts[name]) if name in cuts else Replicate()] for name in arguments(given)}
    return excess(given, passed(given, torch.ops.moe_fast.experts, init_device_mesh("cpu", (2,)), placed,
                                [Replicate()])[0])


def test_placements_that_no_rule_takes() -> None:
    """Moved to placements that have a rule, never wrong: a whole shared expert, say, is not added once per rank."""
    given = problem("gated shared", injected=True)

    def body(rank: int) -> dict:
        return {name: over for name, cuts in MIXED.items() if (over := mixed(given, cuts))}

    assert run_gloo_ranks(2, body) == [{}, {}]


def test_routing_of_sharded_tokens_is_bitwise_that_of_all() -> None:
    """The router sees a token by itself: which others are on its rank changes no bit of ids and weights."""
    given = problem("groups, bias, shared")
    routing = moe_fast.route(given.inputs.x_TH, given.inputs.weights, given.spec)

    def body(rank: int) -> bool:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh, weights, router = init_device_mesh("cpu", (3,)), given.inputs.weights, given.spec.router
        logits_TE = torch.ops.moe_fast.router_logits(distribute_tensor(given.inputs.x_TH, mesh, [Shard(0)]),
                                                     distribute_tensor(weights.router_EH, mesh, [Replicate()]), None)
        ids_TK, weights_TK, _ = select_by(router, logits_TE, None,
                                          distribute_tensor(weights.selection_bias_E, mesh, [Replicate()]), None)
        assert logits_TE.placements == ids_TK.placements == weights_TK.placements == (Shard(0),)
        return (torch.equal(ids_TK.full_tensor(), routing.ids_TK)
                and torch.equal(weights_TK.full_tensor(), routing.weights_TK))

    assert run_gloo_ranks(3, body) == [True] * 3


def in_two_halves(*given: Any) -> Any:
    """moe_fast::experts as act_rows of routed and shared experts, and merged_down of both."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI, gate_T1, *activations = given
    every_T1, one_E = (distribute_tensor(tensor, x_TH.device_mesh, [Replicate()], src_data_rank=None)
                       for tensor in (torch.zeros(len(x_TH), 1, dtype=torch.int64), torch.arange(1)))
    act_RI = torch.ops.moe_fast.act_rows(x_TH, ids_TK, hosted_E, w13_EGIH, activations[0])
    shared_act_TI = torch.ops.moe_fast.act_rows(x_TH, every_T1, one_E, shared_w13_GIH[None], activations[1])
    return torch.ops.moe_fast.merged_down(act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, shared_act_TI, shared_w2_HI,
                                          gate_T1)


def test_experts_in_two_halves() -> None:
    """Columns need no collective between the halves; rows of dealt-out experts are zero elsewhere, and add up."""
    given = problem("gated shared", injected=True)

    def body(rank: int) -> dict:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate

        from moe_fast.distributed import Role
        from moe_fast.distributed.roles import of_tensor

        mesh, found = init_device_mesh("cpu", (3,)), {}
        for role in Role:
            placed = {name: [of_tensor(name, role)] for name in arguments(given)}
            tensors, collectives = passed(given, in_two_halves, mesh, placed, [Replicate()])
            found[str(role)] = (collectives == 0, excess(given, tensors))
        return found

    right: dict[str, float] = {}
    for found in run_gloo_ranks(3, body):
        assert found == {"replicated": (True, right), "columns": (True, right), "experts": (False, right),
                         "tokens": (False, right)}


def test_rules_name_the_operators_arguments() -> None:
    """Rules go by names in the order of the operators' own."""
    from moe_fast.distributed import rules

    for operator, names in [("experts", rules.EXPERTS), ("act_rows", rules.ACT_ROWS),
                            ("merged_down", rules.MERGED_DOWN)]:
        for suffix, gradient in [("", 0), ("_backward", 1)]:
            schema = getattr(torch.ops.moe_fast, operator + suffix).default._schema
            tensors = [argument.name for argument in schema.arguments if "Tensor" in str(argument.type)]
            # DTensors make gate and up again, so that what was saved of them is never given.
            saved = [name for name in tensors if "products" in name]
            assert tensors[gradient:] == [name for name in names if name] + saved
            assert len(schema.arguments) == gradient + len(names) + len(saved)


def test_an_operator_without_rules_is_refused() -> None:
    """Tables of rows on their way to other ranks mean nothing to DTensor: it raises instead of guessing."""
    def body(rank: int) -> str:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh = init_device_mesh("cpu", (1,))
        x_TH, source_R, place_TK = (distribute_tensor(tensor, mesh, [Replicate()])
                                    for tensor in (torch.ones(2, 4), torch.arange(2), torch.arange(2)[:, None]))
        with pytest.raises(NotImplementedError) as raised:
            torch.ops.moe_fast.take_rows(x_TH, source_R, place_TK)
        return str(raised.value)

    assert "moe_fast.take_rows.default" in run_gloo_ranks(1, body)[0]


MUTANTS: dict[str, tuple[str, int, int, tuple[int, ...], dict[str, int], str]] = {
    "partial sums declared whole": ("experts", 2, 0, (0,), COLUMNS | SHARED, "y_TH"),
    "a whole shared expert on every ep rank": ("experts", 3, 1, (6, 7), DEALT | {"hosted_E": 0}, "y_TH"),
    "parts of the routing weights' gradient declared whole": (
        "experts_backward", 2, 0, (1,), COLUMNS | SHARED, "weights_TK"),
    "parts of a weight's gradient declared whole": ("experts_backward", 1, 0, (2,), TOKENS, "w13_EGIH"),
}
"""Operator; which rule, of results (0) or arguments (1), which places: replicated there; cuts; what shows it."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_seen(name: str) -> None:
    """The checks above fail for a rule that is off in one tensor."""
    given = problem("gated shared", injected=True)
    operator, which, side, places, cuts, shown = MUTANTS[name]

    def body(rank: int) -> bool:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.experimental import register_sharding

        from moe_fast.distributed.rules import RULES

        overload = getattr(torch.ops.moe_fast, operator).default

        def wrong(*values: object) -> list:
            rules = RULES[overload](*values)
            for place in places:
                rules[which][side][place] = Replicate()
            return rules

        register_sharding(overload)(wrong)
        return shown in mixed(given, cuts)

    assert run_gloo_ranks(2, body) == [True, True]
