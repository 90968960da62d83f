"""Logits, ids and weights of every rank against the oracle; and the choice the rest of the oracle follows."""

from dataclasses import dataclass
from types import MappingProxyType

import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.parallel import Range
from moe_ref.contract.routing import Routing
from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.inputs.build import Inputs
from moe_ref.records.schema import StageResult, Worst
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact
from moe_ref.verify.bounds.scores import Scores
from moe_ref.verify.bounds.selection import broken_ties
from moe_ref.verify.bounds.steps import Steps
from moe_ref.verify.measure.placing import RankTensors
from moe_ref.verify.measure.stage_meter import Place, StageMeter, Watched


@dataclass(frozen=True)
class FollowedRouting:
    """The subject's choice with the oracle's weights.

    ids_TK; weights with their error bound from the layer's inputs, (T, K); shared: the same of shared experts that
    the router gates, (T, S); judged_T: tokens whose choice is known (all of them when the subject shows its ids).
    """

    ids_TK: torch.Tensor
    weights: Rows
    shared: Rows | None
    judged_T: torch.Tensor


@dataclass(frozen=True)
class RoutingMeasure:
    """Stage results, the routing to go on with, and what the weights of the first rank were compared with."""

    stages: list[StageResult]
    followed: FollowedRouting
    weights: Rows | None = None


def tainted_tokens(inputs: Inputs) -> torch.Tensor:
    """Tokens that hold a NaN or an infinity, (T,)."""
    return ~torch.isfinite(inputs.x_TH).all(-1)


@dataclass(frozen=True)
class Router:
    """What the routing of one case is judged with; tainted: tokens without finite logits of their own.

    ranks: every rank's routing over all tokens; own: the tokens [start, stop) that are each rank's to answer for.
    """

    inputs: Inputs
    ranks: list[RankTensors]
    own: list[Range]
    steps: Steps
    truth: Scores
    tainted_T: torch.Tensor
    tainted_weights_T: torch.Tensor
    watched: Watched

    def own_scores(self, tensors: RankTensors) -> Scores:
        """From the subject's own logits, which carry no error of their own; the oracle's where it shows none."""
        if Stage.LOGITS not in tensors:
            return self.truth
        return Scores(exact(tensors[Stage.LOGITS]), _shared_logits(self.inputs, self.steps), self.inputs,
                      self.steps.model)


def measure_routing(inputs: Inputs, ranks: list[RankTensors], own: list[Range], numerics: Numerics,
                    capabilities: Capabilities, model: RoundingModel, sigmas_allowed: float,
                    watched: Watched = MappingProxyType({})) -> RoutingMeasure:
    """Every rank is compared in the tokens that it holds; ranks and own as in Router."""
    spec, num_tokens = inputs.problem.spec, len(inputs.x_TH)
    if spec.router is None or inputs.routing is not None:
        return _given(inputs, ranks, own, watched)
    steps = Steps(spec, numerics, model)
    truth, shared_logits = true_scores(inputs, steps)
    logits, tainted_T = truth.logits, tainted_tokens(inputs)
    own_logits_T = tainted_T & (inputs.logits_TE is None)
    router = Router(inputs, ranks, own, steps, truth, own_logits_T,
                    tainted_T if shared_logits is not None else own_logits_T, watched)
    stages = []
    if Stage.LOGITS in ranks[0]:
        meter = StageMeter(Stage.LOGITS, spec.num_choices, tainted_T=own_logits_T, sigmas_allowed=sigmas_allowed,
                           watch=watched.get(Stage.LOGITS))
        for rank, tensors in enumerate(ranks):
            _add_own(meter, tensors[Stage.LOGITS], logits, rank, own[rank])
        stages.append(meter.result())
    if Stage.IDS not in ranks[0]:
        return RoutingMeasure(stages, _follow(router, router.truth.ids(), router.truth.choice.unambiguous_T))
    stages.append(_measure_ids(router, capabilities))
    weights = None
    if Stage.WEIGHTS in ranks[0]:
        result, weights = _measure_weights(router, sigmas_allowed)
        stages.append(result)
    # Whatever was chosen for a token without finite logits, it must not vanish.
    ids_TK = ranks[0][Stage.IDS].long()
    in_range_TK = (ids_TK >= 0) & (ids_TK < spec.num_choices)
    ids_TK = torch.where(own_logits_T[:, None] & ~in_range_TK, router.truth.ids(), ids_TK)
    return RoutingMeasure(stages, _follow(router, ids_TK, torch.ones(num_tokens, dtype=torch.bool)), weights)


def _add_own(meter: StageMeter, got: torch.Tensor, want: Rows, rank: int, tokens: Range) -> None:
    at = slice(*tokens)
    meter.add(got[at], want.rows(at), Place(rank, torch.arange(*tokens)))


def _given(inputs: Inputs, ranks: list[RankTensors], own: list[Range], watched: Watched) -> RoutingMeasure:
    """The injected routing; without a router the only one is expert 0 with weight 1."""
    stages, num_tokens, routing = [], len(inputs.x_TH), inputs.routing
    if routing is None:
        routing = Routing(torch.zeros(num_tokens, 1, dtype=torch.int64), torch.ones(num_tokens, 1))
    for stage, want in ((Stage.IDS, exact(routing.ids_TK)), (Stage.WEIGHTS, exact(routing.weights_TK))):
        if stage in ranks[0]:
            meter = StageMeter(stage, inputs.problem.spec.top_k, exact=inputs.routing is not None,
                               watch=watched.get(stage))
            for rank, tensors in enumerate(ranks):
                _add_own(meter, tensors[stage], want, rank, own[rank])
            stages.append(meter.result())
    return RoutingMeasure(stages, FollowedRouting(routing.ids_TK, exact(routing.weights_TK), None,
                                                  torch.ones(num_tokens, dtype=torch.bool)))


def true_scores(inputs: Inputs, steps: Steps) -> tuple[Scores, Rows | None]:
    """Scores from the layer's inputs, and the logits of the router's further columns (T, S)."""
    shared_logits = _shared_logits(inputs, steps)
    return Scores(_true_logits(inputs, steps), shared_logits, inputs, steps.model), shared_logits


def _true_logits(inputs: Inputs, steps: Steps) -> Rows:
    if inputs.logits_TE is not None:
        rounded = steps.stored_in(Stage.LOGITS) not in (None, Format.FP32, Format.FP64)
        return steps.stored(exact(inputs.logits_TE), Stage.LOGITS) if rounded else exact(inputs.logits_TE)
    router_EH, bias_E = inputs.weights.router_EH, inputs.weights.router_bias_E
    assert router_EH is not None
    bias = None if bias_E is None else exact(bias_E)
    return steps.stored(steps.linear(exact(inputs.x_TH), router_EH, bias, Stage.LOGITS), Stage.LOGITS)


def _shared_logits(inputs: Inputs, steps: Steps) -> Rows | None:
    """Logits of the router's further columns, (T, S), which injected logits do not replace."""
    shared, gate_SH = inputs.problem.spec.shared, inputs.weights.shared_gate_SH
    if shared is None or shared.gate != "router" or gate_SH is None:
        return None
    return steps.stored(steps.linear(exact(inputs.x_TH), gate_SH, None, Stage.LOGITS), Stage.LOGITS)


def _follow(router: Router, ids_TK: torch.Tensor, judged_T: torch.Tensor) -> FollowedRouting:
    weights = router.truth.weights(ids_TK)
    routed = router.steps.stored(weights.routed, Stage.WEIGHTS)
    shared = None if weights.shared is None else router.steps.stored(weights.shared, Stage.WEIGHTS)
    # A weight that is not a number makes the result one, whichever expert it belongs to.
    return FollowedRouting(ids_TK, routed, shared, judged_T | torch.isnan(routed.value).all(-1))


def _measure_ids(router: Router, capabilities: Capabilities) -> StageResult:
    """Exact stage: a refused choice, a tie broken against the declared rule, or ranks that differ."""
    bad, notes = {}, set()
    for rank, tensors in enumerate(router.ranks):
        finite_T = ~router.tainted_T & _mask(router.own[rank], len(router.tainted_T))
        ids_TK, scores = tensors[Stage.IDS], router.own_scores(tensors)
        choice = scores.choice if scores.router.capacity is not None else scores.choice.chosen
        refused_T = ~choice.accepts(ids_TK) & finite_T
        if bool(refused_T.any()):
            notes.add("outside the experts that the scores allow")
        if capabilities.lower_id_ties and (Stage.LOGITS in tensors or router.inputs.logits_TE is not None):
            tied_T = broken_ties(ids_TK, scores.logits.value, scores.bias_E, scores.router) & finite_T
            if bool((tied_T & ~refused_T).any()):
                notes.add("exact tie not given to the lower id")
            refused_T |= tied_T
        differs_T = (ids_TK != router.ranks[0][Stage.IDS]).any(-1) & finite_T
        if bool(differs_T.any()):
            notes.add("ranks disagree")
        if bool((refused_T | differs_T).any()):
            bad[rank] = refused_T | differs_T
    return _ids_result(router, bad, notes)


def _mask(tokens: Range, num_tokens: int) -> torch.Tensor:
    token_T = torch.arange(num_tokens)
    return (token_T >= tokens[0]) & (token_T < tokens[1])


def _ids_result(router: Router, bad: dict[int, torch.Tensor], notes: set[str]) -> StageResult:
    num_checked = router.truth.router.top_k * sum(stop - start for start, stop in router.own)
    if not bad:
        return StageResult(stage=Stage.IDS, ratio=0.0, exact=True, num_checked=num_checked, num_bad=0)
    tokens = torch.stack(list(bad.values())).any(0).nonzero().flatten().tolist()
    rank, token = min(bad), int(bad[min(bad)].nonzero()[0, 0])
    want, got = (ids[token].tolist() for ids in (router.truth.ids(), router.ranks[rank][Stage.IDS]))
    notes.add(f"token {token} took experts {got}, the oracle takes {want}")
    worst = Worst(rank=rank, token=token, got=float(got[0]), want=float(want[0]), allowed=0.0)
    return StageResult(stage=Stage.IDS, ratio="inf", exact=True, num_checked=num_checked,
                       num_bad=sum(int(mask.sum()) for mask in bad.values()), worst=worst,
                       num_bad_tokens=len(tokens), bad_tokens=tokens[:8], bad_ranks=sorted(bad),
                       note="; ".join(sorted(notes)))


def _measure_weights(router: Router, sigmas_allowed: float) -> tuple[StageResult, Rows]:
    """Every rank's weights, and what those of the first are compared with."""
    meter = StageMeter(Stage.WEIGHTS, router.truth.router.top_k, tainted_T=router.tainted_weights_T,
                       sigmas_allowed=sigmas_allowed, watch=router.watched.get(Stage.WEIGHTS))
    wanted = [router.steps.stored(router.own_scores(tensors).weights(tensors[Stage.IDS]).routed, Stage.WEIGHTS)
              for tensors in router.ranks]
    for rank, (tensors, want) in enumerate(zip(router.ranks, wanted, strict=True)):
        _add_own(meter, tensors[Stage.WEIGHTS], want, rank, router.own[rank])
    return meter.result(), wanted[0]
