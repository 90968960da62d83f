"""The routing that gradients are judged at: the subject's own logits and weights where it shows them.

They are judged themselves, and nearer to what its backward pass starts from than the oracle's: a routing weight is off
by twice what its logits are off, which are long sums.
"""

from dataclasses import dataclass

import torch

from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.inputs.build import Inputs
from moe_ref.verify.bounds.rows import Rows
from moe_ref.verify.bounds.scores import Scores
from moe_ref.verify.bounds.steps import Steps
from moe_ref.verify.measure.placing import RankTensors
from moe_ref.verify.measure.routing import FollowedRouting, true_scores


@dataclass(frozen=True)
class GradientRouting:
    """ids and weights (T, K), weights of shared experts that the router gates (T, S), and what they are made of.

    scores: None without a router. shared_logits: of the router's further columns.
    """

    ids_TK: torch.Tensor
    weights: Rows
    shared: Rows | None
    scores: Scores | None
    shared_logits: torch.Tensor | None


def gradient_routing(inputs: Inputs, ranks: list[RankTensors], followed: FollowedRouting,
                     steps: Steps) -> GradientRouting:
    """ranks: every rank's routing over all tokens."""
    ids_TK = followed.ids_TK
    if inputs.problem.spec.router is None:
        return GradientRouting(ids_TK, followed.weights, None, None, None)
    scores, shared_logits = true_scores(inputs, steps)
    if Stage.LOGITS in ranks[0]:
        scores = Scores(_shown(ranks, Stage.LOGITS, steps), shared_logits, inputs, steps.model)
    found = scores.weights(ids_TK)
    weights = steps.stored(found.routed, Stage.WEIGHTS)
    if Stage.WEIGHTS in ranks[0]:
        weights = _shown(ranks, Stage.WEIGHTS, steps)
    return GradientRouting(ids_TK, weights, None if found.shared is None else steps.stored(found.shared, Stage.WEIGHTS),
                           scores, None if shared_logits is None else shared_logits.value)


def _shown(ranks: list[RankTensors], stage: Stage, steps: Steps) -> Rows:
    """What was shown, once more rounded as it is stored, since it may be made anew; and how far ranks are apart."""
    shown = torch.stack([tensors[stage].double() for tensors in ranks])
    apart = (shown - shown[0]).abs().amax(0)
    stored = steps.stored_in(stage)
    stored = None if stored is Format.FP64 else stored
    return Rows(shown[0], apart + steps.model.rounded(shown[0].abs(), stored),
                apart.square() + steps.model.stored_variance(shown[0], stored))
