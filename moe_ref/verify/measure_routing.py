"""Logits, ids and weights of every rank against the oracle; and the choice the rest of the oracle follows."""

from dataclasses import dataclass

import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.inputs.build import Inputs
from moe_ref.oracle.router import score, top_ids, weigh
from moe_ref.oracle.router import selection_score as grouped_selection_score
from moe_ref.records.schema import StageResult, Worst
from moe_ref.verify.bounds import FLUSH, RoundingModel
from moe_ref.verify.selection import AllowedChoice, allowed_choice, broken_ties
from moe_ref.verify.stage_meter import Place, StageMeter

RankTensors = dict[Stage, torch.Tensor]


@dataclass(frozen=True)
class FollowedRouting:
    """The subject's choice with the oracle's weights.

    ids_TK; weights_TK and their error bound from the layer's inputs; judged_T: tokens whose choice is known
    (all of them when the subject shows its ids).
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    bound_TK: torch.Tensor
    judged_T: torch.Tensor


@dataclass(frozen=True)
class RoutingMeasure:
    """Stage results and the routing to go on with."""

    stages: list[StageResult]
    followed: FollowedRouting


def measure_routing(inputs: Inputs, ranks: list[RankTensors], numerics: Numerics, capabilities: Capabilities,
                    model: RoundingModel) -> RoutingMeasure:
    """Every rank holds the whole routing, so every rank is compared."""
    spec, num_tokens = inputs.problem.spec, len(inputs.x_TH)
    if spec.router is None:
        return _dense(ranks, num_tokens)
    logits_TE, bound_TE = _true_logits(inputs, numerics, model)
    stages = []
    if Stage.LOGITS in ranks[0]:
        meter = StageMeter(Stage.LOGITS, spec.num_experts)
        for rank, tensors in enumerate(ranks):
            meter.add(tensors[Stage.LOGITS], logits_TE, bound_TE, Place(rank, torch.arange(num_tokens)))
        stages.append(meter.result())
    truth = _Scores(logits_TE, bound_TE, inputs, model)
    if Stage.IDS not in ranks[0]:
        ids_TK = top_ids(grouped_selection_score(truth.score_TE, truth.logits_TE, truth.bias_E, spec.router),
                         spec.router.top_k)
        followed = truth.follow(ids_TK, truth.choice().unambiguous_T, numerics.storage.get(Stage.WEIGHTS))
        return RoutingMeasure(stages, followed)
    stages.append(_measure_ids(inputs, ranks, capabilities, truth))
    if Stage.WEIGHTS in ranks[0]:
        stages.append(_measure_weights(inputs, ranks, numerics, truth))
    everyone = torch.ones(num_tokens, dtype=torch.bool)
    return RoutingMeasure(stages, truth.follow(ranks[0][Stage.IDS].long(), everyone,
                                               numerics.storage.get(Stage.WEIGHTS)))


def _dense(ranks: list[RankTensors], num_tokens: int) -> RoutingMeasure:
    """Without a router the only routing is expert 0 with weight 1."""
    stages = []
    for stage, value in ((Stage.IDS, 0.0), (Stage.WEIGHTS, 1.0)):
        if stage in ranks[0]:
            meter = StageMeter(stage, 1)
            for rank, tensors in enumerate(ranks):
                want = torch.full((num_tokens, 1), value, dtype=torch.float64)
                meter.add(tensors[stage], want, torch.zeros_like(want), Place(rank, torch.arange(num_tokens)))
            stages.append(meter.result())
    ones = torch.ones(num_tokens, 1, dtype=torch.float64)
    return RoutingMeasure(stages, FollowedRouting(torch.zeros(num_tokens, 1, dtype=torch.int64), ones,
                                                  torch.zeros_like(ones), torch.ones(num_tokens, dtype=torch.bool)))


def _true_logits(inputs: Inputs, numerics: Numerics, model: RoundingModel) -> tuple[torch.Tensor, torch.Tensor]:
    stored = numerics.storage.get(Stage.LOGITS)
    if inputs.logits_TE is not None:
        logits_TE = inputs.logits_TE.double()
        exact = stored in (None, Format.FP32, Format.FP64)
        return logits_TE, torch.zeros_like(logits_TE) if exact else model.rounded(logits_TE.abs(), stored)
    router_EH = inputs.weights.router_EH
    assert router_EH is not None
    x_TH, w_EH = inputs.x_TH.double(), router_EH.double()
    logits_TE = x_TH @ w_EH.T
    bound_TE = model.summed(x_TH.abs() @ w_EH.abs().T, x_TH.shape[1])
    return logits_TE, bound_TE + model.rounded(logits_TE.abs() + bound_TE, stored)


class _Scores:
    """Scores of given logits with their error bounds; the logits may be the oracle's or the subject's own."""

    def __init__(self, logits_TE: torch.Tensor, bound_TE: torch.Tensor, inputs: Inputs, model: RoundingModel) -> None:
        router = inputs.problem.spec.router
        assert router is not None
        self.router, self.model, self.bias_E = router, model, inputs.weights.selection_bias_E
        self.logits_TE = logits_TE.double()
        self.score_TE = score(self.logits_TE, router)
        # |d score| <= score * (exp(2 b) - 1) when every logit of the token is off by at most b, for both scores.
        propagated_T1 = torch.expm1(2 * bound_TE.amax(-1, keepdim=True))
        self.relative_TE = propagated_T1 + model.score_units(self.logits_TE, router)

    def choice(self) -> AllowedChoice:
        """Which selections these scores allow."""
        selection_TE, error_TE = self.score_TE, self.score_TE * self.relative_TE + FLUSH
        if self.bias_E is not None:
            selection_TE = selection_TE + self.bias_E.double()
        error_TE = error_TE + 2 * self.model.evaluation_unit * (selection_TE.abs() + error_TE)
        return allowed_choice(selection_TE, error_TE, self.router)

    def weights(self, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the chosen experts and their bound; a slot with an id out of range has weight 0."""
        in_range = (ids_TK >= 0) & (ids_TK < self.router.num_experts)
        safe_TK = torch.where(in_range, ids_TK, 0).long()
        weights_TK = weigh(self.score_TE, safe_TK, self.router)[1]
        units_TK = self.model.weight_units(self.relative_TE.gather(1, safe_TK), self.router)
        bound_TK = weights_TK * units_TK + FLUSH * self.router.scaling_factor
        return torch.where(in_range, weights_TK, 0.0), torch.where(in_range, bound_TK, 0.0)

    def follow(self, ids_TK: torch.Tensor, judged_T: torch.Tensor, stored: Format | None) -> FollowedRouting:
        weights_TK, bound_TK = self.weights(ids_TK)
        bound_TK = bound_TK + self.model.rounded(weights_TK + bound_TK, stored)
        return FollowedRouting(ids_TK, weights_TK, bound_TK, judged_T)


def _own_scores(inputs: Inputs, tensors: RankTensors, truth: _Scores) -> _Scores:
    """Scores from the subject's own logits, which carry no error of their own; the oracle's where it shows none."""
    if Stage.LOGITS not in tensors:
        return truth
    logits_TE = tensors[Stage.LOGITS].double()
    return _Scores(logits_TE, torch.zeros_like(logits_TE), inputs, truth.model)


def _measure_ids(inputs: Inputs, ranks: list[RankTensors], capabilities: Capabilities, truth: _Scores) -> StageResult:
    """Exact stage: a refused choice, a tie broken against the declared rule, or ranks that differ."""
    router, bad, notes = truth.router, {}, set()
    for rank, tensors in enumerate(ranks):
        ids_TK, scores = tensors[Stage.IDS], _own_scores(inputs, tensors, truth)
        refused_T = ~scores.choice().accepts(ids_TK)
        if bool(refused_T.any()):
            notes.add("outside the experts that the scores allow")
        if capabilities.lower_id_ties and (Stage.LOGITS in tensors or inputs.logits_TE is not None):
            tied_T = broken_ties(ids_TK, scores.logits_TE, scores.bias_E, router)
            if bool((tied_T & ~refused_T).any()):
                notes.add("exact tie not given to the lower id")
            refused_T |= tied_T
        differs_T = (ids_TK != ranks[0][Stage.IDS]).any(-1)
        if bool(differs_T.any()):
            notes.add("ranks disagree")
        if bool((refused_T | differs_T).any()):
            bad[rank] = refused_T | differs_T
    return _ids_result(inputs.problem.spec, ranks, bad, notes, truth)


def _ids_result(spec: MoESpec, ranks: list[RankTensors], bad: dict[int, torch.Tensor], notes: set[str],
                truth: _Scores) -> StageResult:
    num_checked = sum(tensors[Stage.IDS].numel() for tensors in ranks)
    if not bad:
        return StageResult(stage=Stage.IDS, ratio=0.0, exact=True, num_checked=num_checked, num_bad=0)
    tokens = torch.stack(list(bad.values())).any(0).nonzero().flatten().tolist()
    rank, token = min(bad), int(bad[min(bad)].nonzero()[0, 0])
    assert spec.router is not None
    one = slice(token, token + 1)
    selection_1E = grouped_selection_score(truth.score_TE[one], truth.logits_TE[one], truth.bias_E, spec.router)
    want = top_ids(selection_1E, spec.top_k)[0]
    got = ranks[rank][Stage.IDS][token].tolist()
    notes.add(f"token {token} took experts {got}, the oracle takes {want.tolist()}")
    worst = Worst(rank=rank, token=token, got=float(got[0]), want=float(want[0]), allowed=0.0)
    return StageResult(stage=Stage.IDS, ratio="inf", exact=True, num_checked=num_checked,
                       num_bad=sum(int(mask.sum()) for mask in bad.values()), worst=worst, num_bad_tokens=len(tokens),
                       bad_tokens=tokens[:8], bad_ranks=sorted(bad), note="; ".join(sorted(notes)))


def _measure_weights(inputs: Inputs, ranks: list[RankTensors], numerics: Numerics, truth: _Scores) -> StageResult:
    meter, stored = StageMeter(Stage.WEIGHTS, inputs.problem.spec.top_k), numerics.storage.get(Stage.WEIGHTS)
    for rank, tensors in enumerate(ranks):
        want, bound = _own_scores(inputs, tensors, truth).weights(tensors[Stage.IDS])
        allowed = bound + truth.model.rounded(want + bound, stored)
        meter.add(tensors[Stage.WEIGHTS], want, allowed, Place(rank, torch.arange(len(want))))
    return meter.result()
