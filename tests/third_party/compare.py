"""A block against the oracle: choice, weights and experts apart, each judged by a bound that is derived."""

from dataclasses import dataclass, replace

import torch

import moe_ref
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Format
from moe_ref.contract.weights import MoEWeights
from moe_ref.oracle.released import moe_as_released, route_as_released, scores_as_released
from moe_ref.oracle.router import capped, router_logits, score, selection_score
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.released import released_bound
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows
from tests.third_party.blocks import Run
from tests.third_party.family import Family

MODEL = RoundingModel(load_tolerances(), "cpu", Format.FP32)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Choice:
    """Tokens whose set of experts differs, and those of them that no tie and no rounding explains."""

    flipped_T: torch.Tensor
    unexplained: list[int]


@dataclass(frozen=True)
class Forward:
    """One family in fp32 against fp64.

    error:    max |block - moe_ref.moe| / max |moe_ref.moe| over tokens with the same experts
    weights:  largest error / bound of routing weights and shared gates, as a dense (T, E + Z) matrix
    experts:  largest error / bound of the output with the block's routing injected
    None: not compared, since the family's router or its experts are outside the spec.
    """

    error: float | None
    weights: float | None
    experts: float | None
    choice: Choice | None


@dataclass(frozen=True)
class Rounded:
    """One family in bf16.

    experts:     largest error / bound against fp64, the block's routing injected
    difference:  max |block - mimic| / max |block|; equal: share of elements with the same bits
    choice:      the mimic's experts against the block's; weights_equal: share of equal weights
    """

    experts: float | None
    difference: float | None
    equal: float | None
    weights_equal: float | None
    choice: Choice | None


@torch.no_grad()
def compare_forward(x_TH: torch.Tensor, run: Run, weights: MoEWeights, family: Family,
                    spec: MoESpec | None = None, own: Routing | None = None) -> Forward:
    """fp32 block against fp64; another `spec`, other weights or another routing than the oracle's are mistakes."""
    spec = spec or family.spec
    experts = None if family.fit == "router" else experts_ratio(x_TH, run, weights, family, spec, Format.FP32)
    if family.fit == "routing":
        return Forward(None, None, experts, None)
    if own is None:
        own = moe_ref.route(x_TH, weights, spec, logits_TE=run.logits_TE)
    choice = _oracle_choice(x_TH, run, weights, spec, own)
    ratio = _weights_ratio(x_TH, run, own, weights, family, spec, ~choice.flipped_T)
    if family.fit == "router":
        return Forward(None, ratio, None, choice)
    want_TH = moe_ref.moe(x_TH, weights, spec, logits_TE=run.logits_TE)
    same_T = ~choice.flipped_T
    error = relative_error(run.output_TH[same_T], want_TH[same_T]) if bool(same_T.any()) else None
    return Forward(error, ratio, experts, choice)


@torch.no_grad()
def compare_rounded(x_TH: torch.Tensor, run: Run, weights: MoEWeights, family: Family) -> Rounded:
    """bf16 block against fp64 with its routing, and against the oracle with the family's rounding points."""
    choice = share = None
    if family.fit != "routing":
        mimic = route_as_released(x_TH, weights, family.spec, family.released, logits_TE=run.logits_TE)
        choice = _mimic_choice(x_TH, run, weights, family, mimic)
        share = equal_weights(mimic, run.routing, family.spec)
    if family.fit == "router":
        return Rounded(None, None, None, share, choice)
    got_TH = run.output_TH
    want_TH = moe_as_released(x_TH, weights, family.spec, family.released, routing=run.routing)
    assert got_TH.dtype == want_TH.dtype == x_TH.dtype
    ratio = experts_ratio(x_TH, run, weights, family, family.spec, Format.BF16)
    equal = float((got_TH == want_TH).double().mean())
    return Rounded(ratio, relative_error(got_TH, want_TH.double()), equal, share, choice)


@torch.no_grad()
def experts_ratio(x_TH: torch.Tensor, run: Run, weights: MoEWeights, family: Family, spec: MoESpec,
                  model_format: Format) -> float:
    """Largest error / bound of the block's output with its own routing injected into the oracle."""
    released, routing = family.released, run.routing
    _, bound_TH = released_bound(x_TH, routing, weights, spec, released, model_format, MODEL)
    if released.scale_on == "output" and spec.router is not None:
        routing = replace(routing, weights_TK=routing.weights_TK.double() * spec.router.scaling_factor)
    return _ratio(run.output_TH, moe_ref.moe(x_TH, weights, spec, routing=routing), bound_TH)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want|."""
    return float((got.double() - want).abs().max() / want.abs().max())


def _ratio(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> float:
    assert bool(got.isfinite().all()), "the block's numbers are not finite"
    error = (got.double() - want.double()).abs()
    if error.numel() == 0:  # no token has the same experts: the choice speaks for itself
        return 0.0
    return float(torch.where(error > 0, error / bound, 0.0).max())


def dense_weights(routing: Routing, spec: MoESpec) -> torch.Tensor:
    """Weights as (T, E + Z) in fp64; dropped slots are nowhere."""
    held_TK = routing.ids_TK >= 0
    dense_TE = routing.weights_TK.new_zeros(len(held_TK), spec.num_choices, dtype=torch.float64)
    return dense_TE.scatter_add(1, routing.ids_TK.clamp(min=0), routing.weights_TK.double() * held_TK)


def _sorted(routing: Routing) -> torch.Tensor:
    return routing.ids_TK.sort(-1).values


def equal_weights(first: Routing, second: Routing, spec: MoESpec) -> float:
    """Share of equal weights among those selected, on tokens with the same experts; 1 if there are none."""
    same_T = (_sorted(first) == _sorted(second)).all(-1)
    first_N, second_N = dense_weights(first, spec)[same_T], dense_weights(second, spec)[same_T]
    held = second_N != 0
    return float((first_N == second_N)[held].double().mean()) if bool(held.any()) else 1.0


def logit_bound(x_TH: torch.Tensor, weights: MoEWeights, run: Run) -> Rows:
    """fp64 logits and what fp32 ones may be off by; logits that are injected are exact."""
    if run.logits_TE is not None:
        logits_TE = run.logits_TE.double()
        return Rows(logits_TE, torch.zeros_like(logits_TE))
    router_EH, bias_E = weights.router_EH, weights.router_bias_E
    assert router_EH is not None
    gauge_TE = x_TH.double().abs() @ router_EH.double().abs().T
    if bias_E is not None:
        gauge_TE = gauge_TE + bias_E.double().abs()
    return Rows(router_logits(x_TH, weights), MODEL.summed(gauge_TE, x_TH.shape[1] + 1))


def _score_error(logits: Rows, spec: MoESpec) -> torch.Tensor:
    """Relative error of every score, (T, E + Z)."""
    assert spec.router is not None
    after = MODEL.capped(logits, spec.router)
    # |d score| <= score * (exp(2 b) - 1) when every logit of the token is off by at most b, for every score.
    return torch.expm1(2 * after.bound.amax(-1, keepdim=True)) + MODEL.score_units(after.value, spec.router)


def _weights_ratio(x_TH: torch.Tensor, run: Run, own: Routing, weights: MoEWeights, family: Family, spec: MoESpec,
                   same_T: torch.Tensor) -> float:
    """Largest error / bound of weights and of shared weights that the block shows."""
    assert spec.router is not None
    relative_TE = _score_error(logit_bound(x_TH, weights, run), spec)
    relative_TK = relative_TE.gather(1, own.ids_TK.clamp(min=0))
    columns = run.routing.shared_TS is not None and spec.shared is not None and spec.shared.gate == "router"
    shared_TS = None
    if columns and spec.shared is not None:  # further columns of the router are off by its worst score at most
        shared_TS = relative_TE.amax(-1, keepdim=True).expand(-1, spec.shared.num_gates)
    units_TK, units_TS = MODEL.weight_units(relative_TK, spec.router, shared_TS)
    factor = spec.router.scaling_factor if family.released.scale_on == "output" else 1.0
    got_TE, want_TE = dense_weights(run.routing, spec) * factor, dense_weights(own, spec)
    bound_TE = dense_weights(replace(own, weights_TK=own.weights_TK.abs() * units_TK), spec)
    ratio = _ratio(got_TE[same_T], want_TE[same_T], bound_TE[same_T])
    if units_TS is None or own.shared_TS is None or run.routing.shared_TS is None:
        return ratio
    want_TS = own.shared_TS[same_T]
    return max(ratio, _ratio(run.routing.shared_TS[same_T], want_TS, want_TS * units_TS[same_T]))


def _oracle_choice(x_TH: torch.Tensor, run: Run, weights: MoEWeights, spec: MoESpec, own: Routing) -> Choice:
    """Flips against fp64; a flip is explained when fp32 cannot tell the scores apart."""
    router = spec.router
    assert router is not None
    flipped_T = (_sorted(own) != _sorted(run.routing)).any(-1)
    logits = logit_bound(x_TH, weights, run)
    score_TE = score(logits.value, router)
    selection_TE = selection_score(score_TE, logits.value, weights.selection_bias_E, router)
    on_logits = router.selection_bias == "logit"
    base_TE = capped(logits.value, router).abs() if on_logits else score_TE
    error_TE = MODEL.capped(logits, router).bound if on_logits else score_TE * _score_error(logits, spec)
    gauge_TE = base_TE + error_TE + selection_TE.abs().nan_to_num(posinf=0)
    error_TE = error_TE + 2 * MODEL.evaluation_unit * gauge_TE
    return _explained(flipped_T, own, run.routing, selection_TE, error_TE)


def _mimic_choice(x_TH: torch.Tensor, run: Run, weights: MoEWeights, family: Family, mimic: Routing) -> Choice:
    """Flips against the mimic; a flip is explained by a tie up to one unit in the last place of the rounded score.

    The order of a long sum moves a value that lies near the middle of two numbers of the format to the other one.
    """
    router, released = family.spec.router, family.released
    assert router is not None
    flipped_T = (_sorted(mimic) != _sorted(run.routing)).any(-1)
    _, score_TE, selection_TE = scores_as_released(x_TH, weights, router, released, logits_TE=run.logits_TE)
    # Where logits are rounded, a score moves with its logit, by the logit's unit times its size.
    coarse = "model" in (released.logits, released.score)
    unit = UNIT[x_TH.dtype] if coarse else UNIT[torch.float32]
    logits_T1 = mimic.logits_TE.abs().amax(-1, keepdim=True) if mimic.logits_TE is not None else 1.0
    steps = 2 * unit * (1 + logits_T1) if coarse else 2 * unit * (1 + x_TH.shape[1] * logits_T1)
    return _explained(flipped_T, mimic, run.routing, selection_TE, steps * score_TE.abs())


def _explained(flipped_T: torch.Tensor, ours: Routing, theirs: Routing, selection_TE: torch.Tensor,
               error_TE: torch.Tensor) -> Choice:
    """Which flips exceed the errors of the scores of the worst chosen and the best expert left out.

    Nothing explains a slot that only one side dropped.
    """
    unexplained = []
    for token in flipped_T.nonzero().flatten().tolist():
        held_K = theirs.ids_TK[token] >= 0
        if int(held_K.sum()) != int((ours.ids_TK[token] >= 0).sum()) or not bool(held_K.any()):
            unexplained.append(token)
            continue
        chosen_E = torch.zeros_like(selection_TE[token], dtype=torch.bool)
        chosen_E[theirs.ids_TK[token][held_K]] = True
        upper_E, lower_E = selection_TE[token] + error_TE[token], selection_TE[token] - error_TE[token]
        if float(lower_E[~chosen_E].max()) > float(upper_E[chosen_E].min()):
            unexplained.append(token)
    return Choice(flipped_T, unexplained)
