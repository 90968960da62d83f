"""Relations between results of one layer that hold whatever its numbers are; each is a function of a case.

A relation calls a layer on the inputs of a case and on others made of them, under an injected routing where it is not
the router's own business, and says how far the two sides are apart. What is allowed is the rigorous bound of both: the
harness's own, of the output from the layer's inputs. Where a layer promises that a row does not depend on its batch,
the same relation must hold to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.case import Case
from moe_ref.contract.comm import grid_groups
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.routing import Routing
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.spec import Router
from moe_ref.contract.vocabulary import Data, Hosting, Pattern, Schedule, Tokens
from moe_ref.contract.weights import EXPERT_PARAMETERS, MoEWeights
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_shards
from moe_ref.oracle.router import route
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.output_chain import OutputChain
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import exact
from moe_ref.verify.bounds.steps import Steps
from moe_ref.verify.measure.placing import servers


@dataclass(frozen=True)
class Run:
    """A layer and a case; x_TH, residual_TH, routing and the shards of all ranks, from which others are made."""

    layer: Any
    case: Case
    x_TH: torch.Tensor
    residual_TH: torch.Tensor | None
    routing: Routing
    shards: list[MoEWeights]

    @classmethod
    def of(cls, layer: Any, case: Case) -> "Run":
        """The case's own inputs, its routing in multiples of 2^-10."""
        inputs, spec = build_inputs(case.problem), case.problem.spec
        ids_TK = route(inputs.x_TH, inputs.weights, spec, logits_TE=inputs.logits_TE).ids_TK
        generator = torch.Generator().manual_seed(case.problem.seed)
        weights_TK = torch.randint(64, 1024, ids_TK.shape, generator=generator).float() / 1024.0
        return cls(layer, case, inputs.x_TH, inputs.residual_TH, Routing(ids_TK, weights_TK),
                   build_shards(case.problem, case.parallel))

    @property
    def capabilities(self) -> Capabilities:
        return self.layer.CAPABILITIES

    def output(self, **others: Any) -> torch.Tensor:
        """The result of rank 0, (T, H) fp64, with other inputs than the case's."""
        run, spec, parallel = replace(self, **others), self.case.problem.spec, self.case.parallel

        def one(comm: LocalComm) -> torch.Tensor:
            return self.layer.moe(run.x_TH, run.shards[comm.rank], spec, parallel,
                                  grid_groups(comm, tp=parallel.tp, ep=parallel.ep), routing=run.routing,
                                  residual_TH=run.residual_TH)

        return run_virtual_ranks(parallel.size, one)[0].double()

    def bound(self, **others: Any) -> torch.Tensor:
        """How far the output may be from the exact result, (T, H), of unsharded inputs that are the case's tokens."""
        run, problem, inputs = replace(self, **others), self.case.problem, build_inputs(self.case.problem)
        numerics = self.capabilities.numerics[problem.dtype]
        model = RoundingModel.of(load_tolerances(), "cpu", numerics, problem.dtype)
        shares, ids_TK = rank_shares(self.case), run.routing.ids_TK
        chain = OutputChain(Steps(problem.spec, numerics, model), inputs.x_TH, self.case.parallel, shares)
        server_TK = servers(ids_TK, self.case, shares)
        for e in range(problem.spec.num_experts):
            token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
            if len(token_R):
                weight = exact(run.routing.weights_TK.double()[token_R, slot_R, None])
                chain.routed(token_R, inputs.weights.expert(e), weight, server_TK[token_R, slot_R], e)
        if shared := inputs.weights.shared_expert():
            chain.shared(shared, None)
        return chain.finish(inputs.residual_TH, inputs.weights.output_bias_H).bound


def apart(one_TH: torch.Tensor, other_TH: torch.Tensor, allowed_TH: torch.Tensor) -> bool:
    """Whether two results of the same exact one differ by more than is allowed."""
    return bool(((one_TH - other_TH).abs() > allowed_TH).any())


def allowed(run: Run, **others: Any) -> torch.Tensor:
    """The errors of two results, or no error at all where bits are promised."""
    if run.capabilities.batch_invariant:
        return torch.zeros_like(run.x_TH, dtype=torch.float64)
    return 2.0 * run.bound(**others)


def taken(run: Run, token_T: torch.Tensor) -> dict[str, Any]:
    """Some of the tokens, in that order."""
    residual_TH = run.residual_TH if run.residual_TH is None else run.residual_TH[token_T]
    return {"x_TH": run.x_TH[token_T], "residual_TH": residual_TH,
            "routing": Routing(run.routing.ids_TK[token_T], run.routing.weights_TK[token_T])}


def permuted_tokens(run: Run) -> bool:
    """Tokens in another order: rows in that order."""
    order_T = torch.randperm(len(run.x_TH), generator=torch.Generator().manual_seed(1))
    return not apart(run.output(**taken(run, order_T)), run.output()[order_T], allowed(run)[order_T])


def batch_cut_in_two(run: Run) -> bool:
    """Each half alone: the same rows."""
    cut = (len(run.x_TH) + 1) // 2
    token_T = torch.arange(len(run.x_TH))
    parts = [run.output(**taken(run, part_T)) for part_T in (token_T[:cut], token_T[cut:])]
    return not apart(torch.cat(parts), run.output(), allowed(run))


def another_token_changed(run: Run) -> bool:
    """The last token three times as large, at its experts: nothing else moves, whatever is promised, by one bit.

    The same experts multiply as many rows as before, so no sum runs in another order.
    """
    x_TH = run.x_TH.clone()
    x_TH[-1:] *= 3.0
    return torch.equal(run.output(x_TH=x_TH)[:-1], run.output()[:-1])


def relabelled_experts(run: Run) -> bool:
    """Experts and ids renamed alike: the same result."""
    experts = run.case.problem.spec.num_experts
    old_E = torch.randperm(experts, generator=torch.Generator().manual_seed(2))
    shards = [replace(shard, **{name: getattr(shard, name)[old_E] for name in EXPERT_PARAMETERS
                                if getattr(shard, name) is not None}) for shard in run.shards]
    routing = replace(run.routing, ids_TK=old_E.argsort()[run.routing.ids_TK])
    return not apart(run.output(shards=shards, routing=routing), run.output(), 2.0 * run.bound())


def linear_in_the_weights(run: Run) -> bool:
    """f(v + w) + f(0) = f(v) + f(w)."""
    routing, weights_TK = run.routing, run.routing.weights_TK
    routings = [replace(routing, weights_TK=one) for one in (
        weights_TK + weights_TK.flip(0), 0.0 * weights_TK, weights_TK, weights_TK.flip(0))]
    both, none, first, second = [run.output(routing=one) for one in routings]
    difference_TH = both + none - first - second
    # A bound takes longer than a result: only where bits differ.
    allowed_TH = sum(run.bound(routing=one) for one in routings) if difference_TH.any() else difference_TH
    return not apart(both + none, first + second, allowed_TH)


def an_expert_named_twice(run: Run) -> bool:
    """Slot 0 again in slot 1, or slot 0 with both weights and no slot 1."""
    ids_TK, weights_TK = run.routing.ids_TK.clone(), run.routing.weights_TK.clone()
    ids_TK[:, 1] = ids_TK[:, 0]
    twice = Routing(ids_TK.clone(), weights_TK.clone())
    ids_TK[:, 1] = -1
    weights_TK[:, 0] += weights_TK[:, 1]
    once = Routing(ids_TK, weights_TK)
    return not apart(run.output(routing=twice), run.output(routing=once),
                     run.bound(routing=twice) + run.bound(routing=once))


def exchanged_ranks(run: Run) -> bool:
    """Ranks hold each other's columns: the same sum. Their shares are equal."""
    return not apart(run.output(shards=run.shards[::-1]), run.output(), 2.0 * run.bound())


def four_times_the_factor(run: Run) -> bool:
    """The routed part is four times as large, to the bit: a power of two rounds nothing; by the layer's own router."""
    spec = run.case.problem.spec
    assert spec.router is not None
    router = replace(spec.router, scaling_factor=4.0 * spec.router.scaling_factor)
    larger = replace(run.case, problem=replace(run.case.problem, spec=replace(spec, router=router)))
    one, four = (replace(run, case=case).output(routing=None) for case in (run.case, larger))
    return torch.equal(4.0 * one, four)


def plain(case: Case) -> Case:
    """The nearest case that every relation can be asked of.

    Two tokens or more, on every rank; a router without a capacity, groups and identity experts; no gate of the shared
    expert, since an injected routing holds ids and weights alone; no exact data, which have a routing of their own.
    """
    problem, spec = case.problem, case.problem.spec
    router = spec.router or Router(num_experts=2, top_k=1)
    router = replace(router, capacity=None, num_zero_experts=0, num_groups=1, num_groups_kept=1,
                     top_k=min(router.top_k, router.num_experts))
    shared = spec.shared and replace(spec.shared, gate="none")
    data = Data.UNIT if problem.data is Data.EXACT else problem.data
    problem = replace(problem, spec=replace(spec, router=router, shared=shared), pattern=Pattern.UNIFORM, data=data,
                      num_tokens=max(2, problem.num_tokens))
    parallel = replace(case.parallel, ep=1, tokens=Tokens.REPLICATED, hosting=Hosting.CONTIGUOUS)
    return replace(case, problem=problem, parallel=parallel)


def of_spec(case: Case, **changed: Any) -> Case:
    """The case with other options of its spec."""
    return replace(case, problem=replace(case.problem, spec=replace(case.problem.spec, **changed)))


def weighted_output(case: Case) -> Case:
    return of_spec(case, weight_on="output")


def several_experts(case: Case) -> Case:
    router = case.problem.spec.router
    assert router is not None
    return of_spec(case, router=replace(router, num_experts=max(2, router.num_experts)))


def two_slots(case: Case) -> Case:
    case = weighted_output(several_experts(case))
    router = case.problem.spec.router
    assert router is not None
    return of_spec(case, router=replace(router, top_k=max(2, router.top_k)))


def equal_ranks(case: Case) -> Case:
    tp = max(2, case.parallel.tp)
    spec, schedule = case.problem.spec, case.parallel.schedule
    schedule = Schedule.ALL_REDUCE if schedule is Schedule.GATHER else schedule
    shared = spec.shared and replace(spec.shared, intermediate_size=spec.shared.intermediate_size * tp)
    case = of_spec(case, intermediate_size=spec.intermediate_size * tp, shared=shared)
    return replace(case, parallel=replace(case.parallel, tp=tp, splits=None, schedule=schedule))


def routed_alone(case: Case) -> Case:
    case = replace(case, problem=replace(case.problem, residual=False))
    return weighted_output(of_spec(case, shared=None, output_bias=False))


@dataclass(frozen=True)
class Relation:
    """What must hold, and the case beside a drawn one of which it says something."""

    holds: Callable[[Run], bool]
    beside: Callable[[Case], Case] = lambda case: case

    def adapted(self, case: Case) -> Case:
        return self.beside(plain(case))

    def of(self, layer: Any, case: Case) -> bool:
        """Whether it holds for a case, whose inputs are made anew."""
        return self.holds(Run.of(layer, case))


RELATIONS = {
    "permuted tokens": Relation(permuted_tokens),
    "a batch cut in two": Relation(batch_cut_in_two),
    "another token changed": Relation(another_token_changed),
    "relabelled experts": Relation(relabelled_experts, several_experts),
    "linear in the weights": Relation(linear_in_the_weights, weighted_output),
    "an expert named twice": Relation(an_expert_named_twice, two_slots),
    "exchanged ranks": Relation(exchanged_ranks, equal_ranks),
    "four times the factor": Relation(four_times_the_factor, routed_alone),
}
