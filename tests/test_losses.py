"""Auxiliary losses and their written-out gradients: by hand, against autograd, differences and transformers.

Every loss here sums terms of one sign (the z-loss squares), and every gradient is a softmax-like factor times a
difference of such sums. So a right evaluation with unit roundoff u errs by at most n u times the same expression
with its difference made a sum, n counting tokens, experts, slots and under 64 elementwise roundings, and each
exponential losing its argument's size once more (Higham 2002, section 3.1).
"""

from collections.abc import Callable

import pytest
import torch

from moe_ref import Router
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.oracle import losses
from moe_ref.oracle.backward.weights import score_backward
from moe_ref.oracle.losses import (
    load_balancing_gradient,
    load_balancing_loss,
    router_z_gradient,
    router_z_loss,
    sequence_balance_gradient,
    sequence_balance_loss,
)
from moe_ref.oracle.router import score, select

TOKENS, EXPERTS, SLOTS, LENGTH = 12, 5, 2, 4
SCORES = {"softmax": Router(num_experts=EXPERTS, top_k=SLOTS),
          "sigmoid": Router(num_experts=EXPERTS, top_k=SLOTS, score="sigmoid"),
          "sqrt_softplus": Router(num_experts=EXPERTS, top_k=SLOTS, score="sqrt_softplus"),
          "scaled and capped": Router(num_experts=EXPERTS, top_k=SLOTS, score="sigmoid", logit_scale=1.5,
                                      logit_softcap=1.25)}


def drawn(seed: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    """Logits in (-2, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(tokens, EXPERTS, generator=generator, dtype=torch.float64) - 2


def best(logits_TE: torch.Tensor, slots: int = SLOTS) -> torch.Tensor:
    """The experts that the largest logits select."""
    return select(logits_TE, Router(num_experts=EXPERTS, top_k=slots))


MASK = torch.arange(TOKENS) % 5 != 2


def allowed(gauge: torch.Tensor, logits_TE: torch.Tensor, unit: float = 2**-53) -> torch.Tensor:
    """Bound on the difference of two evaluations whose terms have absolute sums `gauge`."""
    roundings = len(logits_TE) + EXPERTS + SLOTS + 64 + 4 * float(logits_TE.abs().max())
    return 2 * roundings * unit * gauge


def balance_gauge(logits_TE: torch.Tensor, ids_TK: torch.Tensor,
                  mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """The gradient of the load-balancing loss with its difference made a sum."""
    share_E, mean_T = losses._shares(logits_TE, ids_TK, mask_T)
    prob_TE = torch.softmax(logits_TE, -1)
    return EXPERTS * mean_T[:, None] * prob_TE * (share_E + (prob_TE @ share_E)[:, None])


def sequence_gauge(logits_TE: torch.Tensor, ids_TK: torch.Tensor, router: Router) -> torch.Tensor:
    """The gradient of the sequence-wise loss likewise; a score's slope is at most scale times the score.

    That is so for sigmoid and sqrt(softplus); softmax subtracts once more, and loses the sum over all experts.
    """
    score_TE = score(logits_TE, router)
    share_TE = losses._sequence_shares(logits_TE, ids_TK, LENGTH).repeat_interleave(LENGTH, 0)
    sum_T1 = score_TE.sum(-1, keepdim=True)
    sums_TE = (share_TE + (share_TE * score_TE).sum(-1, keepdim=True) / sum_T1) / (sum_T1 * len(score_TE))
    lost_T1 = (sums_TE * score_TE).sum(-1, keepdim=True) if router.score == "softmax" else 0.0
    return router.logit_scale * score_TE * (sums_TE + lost_T1)


def z_gauge(logits_TE: torch.Tensor) -> torch.Tensor:
    """The gradient of the z-loss, its logarithm no smaller than what cancels in it."""
    total_T1 = torch.logsumexp(logits_TE, -1, keepdim=True).abs() + logits_TE.abs().amax(-1, keepdim=True)
    return 2 * total_T1 * torch.softmax(logits_TE, -1) / len(logits_TE)


def by_autograd(loss: Callable[[torch.Tensor], torch.Tensor], logits_TE: torch.Tensor) -> torch.Tensor:
    """Gradient of a loss with respect to the logits."""
    leaf = logits_TE.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def test_uniform_logits_by_hand() -> None:
    """p = 1/E: E sum f_e / E is the number of slots; normalised f and P give 1; of one logit, z is the logit."""
    logits_TE, ids_TK = torch.zeros(8, 4), torch.tensor([[0, 1], [0, 2]] * 4)
    router = Router(num_experts=4, top_k=2, score="sigmoid")
    assert load_balancing_loss(logits_TE, ids_TK) == 2.0
    assert sequence_balance_loss(logits_TE, ids_TK, router, sequence_length=2) == 1.0
    assert router_z_loss(torch.tensor([[3.0], [-1.0]])) == (9 + 1) / 2


def test_all_tokens_on_one_expert_by_hand() -> None:
    """Eq. 4 of Switch at its worst, E: every token on expert 0 with probability 1. A masked token is not there."""
    logits_TE = torch.tensor([[1000.0, 0, 0, 0]] * 3 + [[0, 1000.0, 0, 0]])
    ids_TK = torch.tensor([[0], [0], [0], [1]])
    assert load_balancing_loss(logits_TE[:3], ids_TK[:3]) == 4.0
    assert load_balancing_loss(logits_TE, ids_TK, torch.tensor([True, True, True, False])) == 4.0
    assert load_balancing_loss(logits_TE, ids_TK) == 4 * (0.75**2 + 0.25**2)


def test_sequences_are_apart() -> None:
    """Two sequences, each on an expert of its own: balanced together, 1, and each alone at the worst, 2."""
    logits_TE = torch.tensor([[500.0, -500.0]] * 2 + [[-500.0, 500.0]] * 2, dtype=torch.float64)
    ids_TK, router = torch.tensor([[0], [0], [1], [1]]), Router(num_experts=2, top_k=1, score="sigmoid")
    assert sequence_balance_loss(logits_TE, ids_TK, router) == 1.0
    assert sequence_balance_loss(logits_TE, ids_TK, router, sequence_length=2) == 2.0


@pytest.mark.parametrize("mask_T", [None, MASK])
def test_load_balancing_gradient(mask_T: torch.Tensor | None) -> None:
    """The formula is what autograd and differences find."""
    logits_TE = drawn()
    ids_TK = best(logits_TE)
    off = load_balancing_gradient(logits_TE, ids_TK, mask_T) - by_autograd(
        lambda leaf: load_balancing_loss(leaf, ids_TK, mask_T), logits_TE)
    assert (off.abs() <= allowed(balance_gauge(logits_TE, ids_TK, mask_T), logits_TE)).all()
    assert torch.autograd.gradcheck(lambda leaf: load_balancing_loss(leaf, ids_TK, mask_T),
                                    logits_TE.requires_grad_())


@pytest.mark.parametrize("name", SCORES)
def test_sequence_balance_gradient(name: str) -> None:
    """For every score, with its scale and cap, and for more than one sequence."""
    logits_TE, router = drawn(1), SCORES[name]
    ids_TK = best(logits_TE)
    off = sequence_balance_gradient(logits_TE, ids_TK, router, LENGTH) - by_autograd(
        lambda leaf: sequence_balance_loss(leaf, ids_TK, router, LENGTH), logits_TE)
    assert (off.abs() <= allowed(sequence_gauge(logits_TE, ids_TK, router), logits_TE)).all()
    assert torch.autograd.gradcheck(lambda leaf: sequence_balance_loss(leaf, ids_TK, router, LENGTH),
                                    logits_TE.requires_grad_())


@pytest.mark.parametrize("shift", [0.0, -60.0])
@pytest.mark.parametrize("name", SCORES)
def test_sequence_balance_by_definition(name: str, shift: float) -> None:
    """Computed from logarithms, n_e is s_e / sum of s all the same, as long as fp64 holds the scores."""
    logits_TE, router = drawn(5) + shift, SCORES[name]
    ids_TK = best(logits_TE)
    share_BE = losses._sequence_shares(logits_TE, ids_TK, LENGTH)

    def defined(leaf: torch.Tensor) -> torch.Tensor:
        score_TE = score(leaf, router)
        normed_BLE = (score_TE / score_TE.sum(-1, keepdim=True)).unflatten(0, (-1, LENGTH))
        return (share_BE * normed_BLE.mean(1)).sum() / len(share_BE)

    value = sequence_balance_loss(logits_TE, ids_TK, router, LENGTH)
    assert (value - defined(logits_TE)).abs() <= allowed(value, logits_TE)
    off = sequence_balance_gradient(logits_TE, ids_TK, router, LENGTH) - by_autograd(defined, logits_TE)
    assert (off.abs() <= allowed(sequence_gauge(logits_TE, ids_TK, router), logits_TE)).all()


@pytest.mark.parametrize(("name", "slope"), [("softmax", 1.0), ("sigmoid", 1.0), ("sqrt_softplus", 0.5)])
def test_scores_that_underflow(name: str, slope: float) -> None:
    """Scores of -1600 are 0 in fp64, their shares 1/2 each, so that f = (2, 0) gives 1 and (1/2, -1/2) * slope.

    Beside a logit of 0 the share is 0, and the token that chose the other expert gives 2 without a gradient.
    """
    router = Router(num_experts=2, top_k=1, score=name)  # type: ignore[arg-type]
    for logits_TE, ids_TK, value, gradient in (
            (torch.tensor([[-1600.0, -1600.0]]), torch.tensor([[0]]), 1.0, [[slope / 2, -slope / 2]]),
            (torch.tensor([[-1600.0, 0.0]]), torch.tensor([[1]]), 2.0, [[0.0, 0.0]])):
        logits_TE = logits_TE.double()
        assert sequence_balance_loss(logits_TE, ids_TK, router) == value
        expected_TE = torch.tensor(gradient, dtype=torch.float64)
        assert torch.equal(sequence_balance_gradient(logits_TE, ids_TK, router), expected_TE)
        found_TE = by_autograd(lambda leaf, ids_TK=ids_TK: sequence_balance_loss(leaf, ids_TK, router), logits_TE)
        assert torch.equal(found_TE, expected_TE)


def test_z_gradient() -> None:
    """Likewise for the z-loss."""
    logits_TE = drawn(2)
    off = router_z_gradient(logits_TE) - by_autograd(router_z_loss, logits_TE)
    assert (off.abs() <= allowed(z_gauge(logits_TE), logits_TE)).all()
    assert torch.autograd.gradcheck(router_z_loss, logits_TE.requires_grad_())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_against_mixtral(layers: int, masked: bool) -> None:
    """transformers' loss pools layers and sums in fp32; ours takes the layers one after the other."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    per_layer = [drawn(seed).requires_grad_() for seed in range(layers)]
    mask_BL = MASK.reshape(-1, LENGTH).long() if masked else None
    theirs = load_balancing_loss_func(tuple(per_layer), EXPERTS, SLOTS, mask_BL)
    theirs.backward()
    logits_TE = torch.cat(per_layer).detach()
    ids_TK, mask_T = best(logits_TE), MASK.repeat(layers) if masked else None
    ours = load_balancing_loss(logits_TE, ids_TK, mask_T)
    assert (theirs.double() - ours).abs() <= allowed(ours, logits_TE, 2**-24)
    gradient = torch.cat([layer.grad for layer in per_layer])  # type: ignore[misc]
    off = (gradient - load_balancing_gradient(logits_TE, ids_TK, mask_T)).abs()
    assert (off <= allowed(balance_gauge(logits_TE, ids_TK, mask_T), logits_TE, 2**-24)).all()


def test_against_switch() -> None:
    """transformers' Switch loss: top-1, the mean over sequences of what we compute for one; fractions in fp32."""
    from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func
    logits_TE = drawn(3)
    leaf = logits_TE.reshape(-1, LENGTH, EXPERTS).requires_grad_()
    ids_TK = best(logits_TE.detach(), slots=1)
    theirs = load_balancing_loss_func(torch.softmax(leaf, -1), ids_TK.reshape(-1, LENGTH))
    theirs.backward()
    sequences = list(zip(logits_TE.detach().split(LENGTH), ids_TK.split(LENGTH), strict=True))
    ours = torch.stack([load_balancing_loss(*sequence) for sequence in sequences]).mean()
    assert (theirs - ours).abs() <= allowed(ours, logits_TE.detach(), 2**-24)
    assert leaf.grad is not None
    for gradient_LE, (part_LE, part_LK) in zip(leaf.grad, sequences, strict=True):
        off = (gradient_LE - load_balancing_gradient(part_LE, part_LK) / len(sequences)).abs()
        assert (off <= allowed(balance_gauge(part_LE, part_LK) / len(sequences), part_LE, 2**-24)).all()


def test_against_switch_z_loss() -> None:
    """transformers' z-loss in fp64."""
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func
    logits_TE = drawn(4)
    leaf = logits_TE.reshape(-1, LENGTH, EXPERTS).clone().requires_grad_()
    theirs = torch.as_tensor(router_z_loss_func(leaf))
    theirs.backward()
    total_T = torch.logsumexp(logits_TE, -1).abs() + logits_TE.abs().amax(-1)
    assert (theirs - router_z_loss(logits_TE)).abs() <= allowed((total_T**2).mean(), logits_TE)
    assert leaf.grad is not None
    off = (leaf.grad.reshape(-1, EXPERTS) - router_z_gradient(logits_TE)).abs()
    assert (off <= allowed(z_gauge(logits_TE), logits_TE)).all()


def test_wrong_formulas_are_seen() -> None:
    """The bounds tell: a mean or the mask forgotten, scores not normalised, their sum held fixed, no factor 2."""
    logits_TE, router = drawn(1), SCORES["sigmoid"]
    ids_TK, score_TE = best(logits_TE), score(logits_TE, router)
    share_TE = losses._sequence_shares(logits_TE, ids_TK, LENGTH).repeat_interleave(LENGTH, 0)
    share_E, prob_TE = losses._shares(logits_TE, ids_TK, None)[0], torch.softmax(logits_TE, -1)
    wrong = {
        "mean forgotten": (load_balancing_gradient(logits_TE, ids_TK), EXPERTS * prob_TE * share_E / TOKENS,
                           balance_gauge(logits_TE, ids_TK)),
        "mask forgotten": (load_balancing_gradient(logits_TE, ids_TK, MASK),
                           load_balancing_gradient(logits_TE, ids_TK), balance_gauge(logits_TE, ids_TK, MASK)),
        "not normalised": (sequence_balance_gradient(logits_TE, ids_TK, router, LENGTH),
                           score_backward(share_TE / TOKENS, logits_TE, router),
                           sequence_gauge(logits_TE, ids_TK, router)),
        "sum held fixed": (sequence_balance_gradient(logits_TE, ids_TK, router, LENGTH),
                           score_backward(share_TE / TOKENS / score_TE.sum(-1, keepdim=True), logits_TE, router),
                           sequence_gauge(logits_TE, ids_TK, router)),
        "factor forgotten": (router_z_gradient(logits_TE), router_z_gradient(logits_TE) / 2, z_gauge(logits_TE)),
    }
    unseen = [name for name, (right, mistaken, gauge) in wrong.items()
              if ((right - mistaken).abs() <= allowed(gauge, logits_TE)).all()]
    assert unseen == []


def test_ids_of_no_expert_and_no_tokens() -> None:
    """A dropped slot counts for nothing; nothing at all gives 0, not 0 / 0."""
    logits_TE, router = drawn(), SCORES["sigmoid"]
    dropped_TK = torch.full((TOKENS, SLOTS), -1)
    assert load_balancing_loss(logits_TE, dropped_TK) == 0
    assert load_balancing_loss(logits_TE, best(logits_TE), torch.zeros(TOKENS)) == 0
    none_TE, none_TK = logits_TE[:0], dropped_TK[:0]
    assert load_balancing_loss(none_TE, none_TK) == sequence_balance_loss(none_TE, none_TK, router) == 0
    assert router_z_loss(none_TE) == 0
    for gradient in (load_balancing_gradient(none_TE, none_TK), router_z_gradient(none_TE),
                     sequence_balance_gradient(none_TE, none_TK, router)):
        assert gradient.shape == (0, EXPERTS)


def test_wrong_use() -> None:
    """Both numbers in the message."""
    logits_TE = drawn()
    with pytest.raises(UsageValueError, match=r"ids_TK: shape \(3, 2\) of torch.int64, but should be \(12, K\)"):
        load_balancing_loss(logits_TE, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(UsageValueError, match=r"mask_T: shape \(4,\), but should be \(12,\)"):
        load_balancing_loss(logits_TE, best(logits_TE), MASK[:4])
    with pytest.raises(UsageValueError, match=r"sequence_length=5, but should divide the number of tokens, 12"):
        sequence_balance_loss(logits_TE, best(logits_TE), SCORES["sigmoid"], 5)
    with pytest.raises(UsageValueError, match=r"ids_TK: shape \(12, 0\) of torch.int64, .* with K of at least 1"):
        load_balancing_loss(logits_TE, best(logits_TE)[:, :0])
    with pytest.raises(UsageTypeError, match=r"logits_TE: shape \(12, 5\) of torch.int64, but should be"):
        router_z_loss(logits_TE.long())


@pytest.mark.parametrize("function", [sequence_balance_loss, sequence_balance_gradient])
def test_wrong_use_of_sequences(function: Callable[..., torch.Tensor]) -> None:
    """The loss and its gradient refuse the same, before anything is computed, with all faults at once."""
    logits_TE, router = drawn(), SCORES["sigmoid"]
    ids_TK = best(logits_TE)
    for length in (2.0, True, 0, -4):
        with pytest.raises(UsageValueError, match=f"sequence_length={length}, but should be an integer of at"):
            function(logits_TE, ids_TK, router, length)
    with pytest.raises(UsageTypeError, match="router=None, but should be a Router"):
        function(logits_TE, ids_TK, None)
    with pytest.raises(UsageValueError, match=r"ids_TK: shape \(12, 0\)"):
        function(logits_TE, ids_TK[:, :0], router)
    with pytest.raises(UsageValueError) as caught:
        function(logits_TE, ids_TK, Router(num_experts=6, top_k=2, num_zero_experts=2), 5)
    assert "logits_TE: 5 columns, but should be one per choice of the router, 8" in str(caught.value)
    assert "sequence_length=5, but should divide the number of tokens, 12" in str(caught.value)
