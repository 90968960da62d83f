"""Truth and bound of a whole layer for a given routing, without looking at anything in between."""

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.shares import spread
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WeightSource
from moe_ref.verify.bounds.output_chain import OutputChain
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact
from moe_ref.verify.bounds.steps import Steps


def output_bound(x_TH: torch.Tensor, routing: Routing, weights: WeightSource, spec: MoESpec, numerics: Numerics,
                 model: RoundingModel) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 truth (T, H) of the unsharded layer and what any implementation with these numerics may be off by.

    The routing's ids, weights and shared gates are taken as exact; a sigmoid gate that it lacks is computed from
    the tokens, with its error. Holds one expert at a time. Derivation in docs/bounds.md. Raises UsageValueError
    when the routing lacks the weights of shared experts that the router gates, OverflowError when a sum has no bound.
    """
    steps = Steps(spec, numerics, model)
    gates = _gates(x_TH, routing, weights, steps)
    output = output_rows(x_TH, routing.ids_TK, exact(routing.weights_TK), gates, weights, steps)
    return output.value, output.bound


def output_rows(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: Rows, gates: Rows | None, weights: WeightSource,
                steps: Steps) -> Rows:
    """The same truth and bound with the variance that is predicted, (T, H), for routing weights that carry errors.

    gates: of the shared expert, (T, S), None without gates.
    """
    spec = steps.spec
    chain = OutputChain(steps, x_TH, Parallel(), spread(spec, len(x_TH), Parallel()))
    for e in range(spec.num_choices):
        token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
        if len(token_R) == 0:
            continue
        weight = weights_TK.mapped(lambda one, at=(token_R, slot_R): one[*at, None])
        if e < spec.num_experts:
            chain.routed(token_R, weights.expert(e), weight, torch.zeros_like(token_R), e)
        else:
            chain.identity(token_R, weight)
    if expert := weights.shared_expert():
        chain.shared(expert, gates)
    return chain.finish(None, weights.output_bias_H)


def _gates(x_TH: torch.Tensor, routing: Routing, weights: WeightSource, steps: Steps) -> Rows | None:
    shared = steps.spec.shared
    if shared is None or shared.gate == "none":
        return None
    if routing.shared_TS is not None:
        return exact(routing.shared_TS)
    if shared.gate == "router":
        raise UsageValueError("routing: shared_TS is missing, but should hold the weights of the shared experts, "
                              f"(T, {shared.num_gates}), since the router gates them")
    return steps.shared_gate(x_TH, weights)
