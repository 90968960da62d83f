"""The router's operators: torch's own checks, their gradients, which slots a capacity keeps, what they refuse."""

import re
from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from moe_fast.kernels.route import route_cut
from moe_fast.operators.drop import drop_by
from moe_fast.operators.route import route_by
from moe_fast.operators.select import WEIGHTING, select_by
from moe_ref import Capacity, Router
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.oracle import router as formula
from moe_ref.oracle.backward.weights import divisor, score_backward, weigh_backward
from moe_ref.oracle.capacity import kept_slots
from tests.test_operators import HIDDEN, uniform

ops = torch.ops.moe_fast
SOFTMAX = Router(num_experts=6, top_k=3)
SIGMOID = Router(num_experts=6, top_k=3, score="sigmoid")

ROUTERS = {
    "softmax": SOFTMAX, "softmax of one": replace(SOFTMAX, top_k=1, renormalize=True),
    "softmax renormalised": replace(SOFTMAX, renormalize=True, scaling_factor=2.5),
    "softmax groups": replace(SOFTMAX, top_k=2, num_groups=3, num_groups_kept=2, renormalize_epsilon=0.5,
                              renormalize=True),
    "sigmoid": replace(SIGMOID, scaling_factor=0.75),
    "sigmoid, everything": replace(SIGMOID, top_k=2, num_groups=2, group_score="top2_sum", selection_bias="score",
                                   renormalize=True, renormalize_epsilon=1e-20, scaling_factor=2.5),
    "every expert": replace(SOFTMAX, top_k=6, renormalize=True),
    "sqrt softplus": replace(SOFTMAX, score="sqrt_softplus", renormalize=True, scaling_factor=1.5),
    "scale and cap": replace(SOFTMAX, logit_scale=0.5, logit_softcap=1.25, renormalize=True),
    "cap, sigmoid": replace(SIGMOID, logit_softcap=1.25),
    "cap, sqrt softplus": replace(SIGMOID, score="sqrt_softplus", logit_scale=1.5, logit_softcap=2.0),
    "bias on logits": replace(SIGMOID, selection_bias="logit", logit_softcap=2.0, renormalize=True),
    "groups filled with 0": replace(SIGMOID, num_groups=3, group_fill="zero", selection_bias="score"),
    "clamp": replace(SIGMOID, renormalize=True, renormalize_epsilon=1.5, epsilon_rule="clamp"),
    "one scale": replace(SIGMOID, renormalize=True, learned_scale="layer", scaling_factor=2.5),
    "scales": replace(SOFTMAX, learned_scale="expert", scaling_factor=2.5),
    "scales, renormalised": replace(SIGMOID, learned_scale="expert", renormalize=True),
}
WITH_COLUMNS = {name: router for name, router in ROUTERS.items() if router.score != "softmax"}
CAPACITIES = {
    "by token": Capacity(factor=0.75), "by choice": Capacity(tokens=9, priority="choice"),
    "by weight": Capacity(tokens=9, priority="weight"), "in sequences": Capacity(tokens=3, sequence_length=16),
    "by choice in sequences": Capacity(factor=0.5, sequence_length=7, priority="choice"),
    "by weight in sequences": Capacity(factor=0.5, sequence_length=40, priority="weight"),
    "everything fits": Capacity(tokens=10**12), "one in all": Capacity(tokens=1, sequence_length=10**9),
}


def parameters(router: Router) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Selection bias and learned scales, the latter around 1, where the router has them."""
    num_scales = {"layer": 1, "expert": router.num_experts, None: 0}[router.learned_scale]
    return (uniform(6, seed=2) if router.selection_bias else None,
            1 + uniform(num_scales, seed=5) / 2 if num_scales else None)


def columns(name: str, num_tokens: int, shared: bool) -> torch.Tensor | None:
    """Logits of two further columns, which no softmax has."""
    return 4 * uniform(num_tokens, 2, seed=4) if shared and name in WITH_COLUMNS else None


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [6, 0])
def test_torch_checks_the_product(num_tokens: int, dtype: torch.dtype) -> None:
    """Schema, fakes, autograd registration and ahead-of-time dispatch with dynamic shapes, forward and backward."""
    x_TH, router_EH = uniform(num_tokens, HIDDEN, seed=1, dtype=dtype), uniform(8, HIDDEN, seed=2, dtype=dtype)
    for bias_E in (None, uniform(8, seed=3, dtype=dtype)):
        leaves = [None if one is None else one.clone().requires_grad_() for one in (x_TH, router_EH, bias_E)]
        opcheck(ops.router_logits.default, leaves)
        opcheck(ops.router_logits_backward.default, (uniform(num_tokens, 8, seed=3), x_TH, router_EH, bias_E))


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("num_tokens", [6, 0])
@pytest.mark.parametrize("name", ["sigmoid, everything", "scale and cap", "scales", "one scale"])
def test_torch_checks_the_selection(name: str, num_tokens: int) -> None:
    """The same of selection and capacity, whose gradients through torch.compile have a test with the layer: opcheck
    adds outputs up and cannot add weights to ids."""
    router, logits_TE = ROUTERS[name], uniform(num_tokens, 6, seed=3)
    shared_TS, (bias_E, scale_E) = columns(name, num_tokens, True), parameters(router)
    options = [getattr(router, option) for option in ("top_k", "selection_bias", "num_groups", "num_groups_kept",
                                                      "group_score", "group_fill", *WEIGHTING)]
    opcheck(ops.select.default, (logits_TE, shared_TS, bias_E, scale_E, *options))
    leaves = [None if one is None else one.clone().requires_grad_() for one in (logits_TE, shared_TS)]
    untraced = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    opcheck(ops.select.default, (*leaves, bias_E, scale_E, *options), **untraced)
    ids_TK, weights_TK, gates_TS = select_by(router, logits_TE, shared_TS, bias_E, scale_E)
    opcheck(ops.select_backward.default,
            (weights_TK, None if shared_TS is None else gates_TS, logits_TE, shared_TS, scale_E, ids_TK, *options[6:]))
    limits = [2, None, "weight", None, True, 6, 0, router.top_k, router.renormalize, router.renormalize_epsilon,
              "add", 2.5, router.learned_scale]
    if router.renormalize:
        opcheck(ops.drop.default, (ids_TK, weights_TK, gates_TS, scale_E, *limits))
        opcheck(ops.drop.default, (ids_TK, weights_TK.requires_grad_(), gates_TS, scale_E, *limits), **untraced)
    opcheck(ops.drop_backward.default,
            (weights_TK.detach(), gates_TS, ids_TK, weights_TK.detach(), gates_TS, scale_E, *limits[5:]))


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("num_tokens", [6, 0])
@pytest.mark.parametrize("name", ["sigmoid, everything", "one scale"])
def test_torch_checks_both_at_once(name: str, num_tokens: int) -> None:
    """The same of product and selection in one operator."""
    router, shared_TS = ROUTERS[name], columns(name, num_tokens, True)
    x_TH, router_EH = uniform(num_tokens, HIDDEN, seed=1), uniform(6, HIDDEN, seed=2)
    options = [getattr(router, option) for option in ("top_k", "selection_bias", "num_groups", "num_groups_kept",
                                                      "group_score", "group_fill", *WEIGHTING)]
    for bias_E in (None, uniform(6, seed=3)):
        opcheck(ops.route.default, (x_TH, router_EH, bias_E, shared_TS, *parameters(router), *options))
    opcheck(ops.route.default, (x_TH.requires_grad_(), router_EH.requires_grad_(), None, None, *parameters(router),
                                *options),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("shared", [False, True], ids=["", "with columns"])
@pytest.mark.parametrize("num_tokens", [20, 70])
@pytest.mark.parametrize("name", ROUTERS)
def test_both_at_once_are_one_after_the_other(name: str, num_tokens: int, shared: bool) -> None:
    """What is selected by the logits that come back; 20 tokens in parts of H, 70 in one kernel; strides of all kinds,
    and a router that is kept in fp32."""
    router, (selection_bias_E, scale_E) = ROUTERS[name], parameters(ROUTERS[name])
    shared_TS, bias_E = columns(name, num_tokens, shared), uniform(12, seed=3)[::2]
    x_TH = uniform(130, num_tokens, seed=1, dtype=torch.bfloat16).T
    router_EH = uniform(6, 260, seed=2)[:, ::2]
    cut = route_cut(x_TH.device, torch.float32, num_tokens, 6, 130)
    assert (cut.fused, cut.num_parts) == ((True, 1) if num_tokens == 70 else (False, 2))
    *found, logits_TE = route_by(router, x_TH, router_EH, bias_E, shared_TS, selection_bias_E, scale_E)
    exact_TE = x_TH.double() @ router_EH.double().T + bias_E
    size_TE = x_TH.double().abs() @ router_EH.double().abs().T + bias_E.abs()
    assert ((logits_TE.double() - exact_TE).abs() <= 132 * 2**-24 * size_TE).all()
    assert all(map(torch.equal, found, select_by(router, logits_TE, shared_TS, selection_bias_E, scale_E)))


@pytest.mark.parametrize("used", [("weights",), ("logits",), ("gates",), ("weights", "logits", "gates")])
def test_gradients_of_both_at_once(used: tuple[str, ...]) -> None:
    """Those of the two operators, whichever results the loss depends on; logits also matter to losses of balance."""
    router = replace(SIGMOID, renormalize=True, learned_scale="layer")
    leaves = [uniform(*shape, seed=seed).requires_grad_() for seed, shape in
              enumerate(((40, 130), (6, 130), (6,), (40, 2), (1,)))]
    x_TH, router_EH, bias_E, shared_TS, scale_E = leaves
    ids_TK, *results = route_by(router, x_TH, router_EH, bias_E, shared_TS, None, scale_E)
    named = dict(zip(("weights", "gates", "logits"), results, strict=True))
    grads = {name: uniform(*named[name].shape, seed=9) for name in used}
    found = torch.autograd.grad([named[name] for name in used], leaves, list(grads.values()), allow_unused=True)
    given = [grads.get(name, torch.zeros_like(named[name])) for name in ("weights", "gates")]
    with torch.no_grad():
        logits_TE, *others = ops.select_backward(*given, named["logits"], shared_TS, scale_E, ids_TK,
                                                 *(getattr(router, option) for option in WEIGHTING))
        if "logits" in used:
            logits_TE += grads["logits"]
        wanted = (*ops.router_logits_backward(logits_TE, x_TH, router_EH, bias_E), *others)
    for got, expected in zip(found, wanted, strict=True):
        assert expected.any() == (got is not None)
        assert got is None or torch.equal(got, expected)


def test_the_product_back() -> None:
    """Plain sums: each element within (n + 1) roundings of the sum of absolute values, n its number of terms."""
    x_TH, router_EH, grad_TE = uniform(70, 130, seed=1), uniform(6, 130, seed=2), uniform(70, 6, seed=3)
    for found, left, right in zip(ops.router_logits_backward(grad_TE, x_TH, router_EH, uniform(6, seed=4)),
                                  (grad_TE.double(), grad_TE.T.double(), grad_TE.T.double()),
                                  (router_EH.double(), x_TH.double(), torch.ones(70, 1, dtype=torch.float64)),
                                  strict=True):
        bound = (left.shape[1] + 1) * 2**-24 * (left.abs() @ right.abs())
        assert ((found.double().view_as(bound) - left @ right).abs() <= bound).all()


def majorant(score: torch.Tensor, size: torch.Tensor, logits: torch.Tensor, router: Router) -> torch.Tensor:
    """score_backward with absolute values: what gradients of scores, up to `size`, become at most at the logits."""
    if router.score == "softmax":
        unit = replace(router, score="sigmoid")
        slope = score_backward(torch.ones_like(score), logits, unit) / (formula.score(logits, unit)
                                                                         * (1 - formula.score(logits, unit)))
        return slope * score * (size + (score * size).sum(1, keepdim=True))
    return score_backward(size, logits, router)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("shared", [False, True], ids=["", "with columns"])
@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_of_the_selection(name: str, shared: bool) -> None:
    """Against the formulas in fp64; the bound is the formula with absolute values times what its factors lose.

    A score loses what its exponent's argument does (at most 8), a sum over 6 experts, a function and a division: 24
    roundings, and 16 more by a softcap of at most 2, whose slope loses as much; a path has at most four scores, a sum
    over slots and columns and over experts, and 16 steps more. A learned scale sums over 40 tokens besides.
    """
    router, logits_TE = ROUTERS[name], 4 * uniform(40, 6, seed=1)
    shared_logits_TS, (bias_E, scale_E) = columns(name, 40, shared), parameters(router)
    if shared and shared_logits_TS is None:
        shared_logits_TS = logits_TE[:, :0]
    grad_TK = uniform(40, router.top_k, seed=3)
    ids_TK, _, gates_TS = select_by(router, logits_TE, shared_logits_TS, bias_E, scale_E)
    grad_TS = uniform(*gates_TS.shape, seed=6)
    given_TS = None if shared_logits_TS is None else grad_TS
    found = ops.select_backward(grad_TK, given_TS, logits_TE, shared_logits_TS, scale_E, ids_TK,
                                *(getattr(router, option) for option in WEIGHTING))
    logits_TE, wide_TK = logits_TE.double(), ids_TK.long()
    columns_TS = torch.zeros(40, 0).double() if shared_logits_TS is None else shared_logits_TS.double()
    score_TE, score_TS = formula.score(logits_TE, router), formula.score(columns_TS, router)
    grads = weigh_backward(grad_TK, grad_TS, score_TE, wide_TK, router, scale_E, score_TS)
    truth = (score_backward(grads.score_TE, logits_TE, router), score_backward(grads.shared_TS, columns_TS, router))
    # The same with absolute values: of the weights' gradients, then of the shares', then of the scores'.
    chosen_TK, scale = score_TE.gather(1, wide_TK), 1.0 if scale_E is None else scale_E.double()
    slot_scale = scale[wide_TK] if router.learned_scale == "expert" else scale
    column_scale = scale if router.learned_scale == "layer" else 1.0
    of_slots_TK, of_columns_TS = (router.scaling_factor * grad.double().abs() for grad in (grad_TK, grad_TS))
    divisor_T1 = divisor(chosen_TK.sum(1, keepdim=True) + score_TS.sum(1, keepdim=True), router)
    scale_parts = ((of_slots_TK * chosen_TK).sum(1, keepdim=True) + (of_columns_TS * score_TS).sum(1, keepdim=True))
    size_TK, size_TS = of_slots_TK * slot_scale, of_columns_TS * column_scale
    both_T1 = ((size_TK * chosen_TK).sum(1, keepdim=True) + (size_TS * score_TS).sum(1, keepdim=True)) / divisor_T1
    size_TK, size_TS = ((size + router.renormalize * both_T1) / divisor_T1 for size in (size_TK, size_TS))
    size_TE = torch.zeros_like(score_TE).scatter_add(1, wide_TK, size_TK)
    sizes = majorant(score_TE, size_TE, logits_TE, router), majorant(score_TS, size_TS, columns_TS, router)
    unit = (4 * 40 + 5 + 6 + 16) * 2**-24
    for got, wanted, size in zip(found, truth, sizes, strict=False):
        assert ((got.double() - wanted).abs() <= unit * size).all()
    if scale_E is not None:
        assert ((found[2].double() - grads.weight_scale_E).abs()
                <= (unit + 40 * 2**-24) * (scale_parts / divisor_T1).sum()).all()
        assert found[2].any()
    if router.score != "softmax":
        chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, wide_TK, True)
        assert not found[0][~chosen_TE].any(), "what was not selected has no gradient"


def test_scores_far_below_zero() -> None:
    """sqrt(softplus) of a logit of -100 is 2^-72, and its slope half of that: nothing underflows on the way."""
    router = replace(SOFTMAX, num_experts=1, top_k=1, score="sqrt_softplus")
    logits_T1 = torch.tensor([[-100.0], [-16.5], [-15.5], [-4.5], [-4.0], [0.0], [3.0], [90.0], [200.0]])
    ids_T1, weights_T1, _ = select_by(router, logits_T1, None, None, None)
    grad_T1, *_ = ops.select_backward(torch.ones(9, 1), None, logits_T1, None, None, ids_T1,
                                      *(getattr(router, option) for option in WEIGHTING))
    exact_T1 = logits_T1.double().requires_grad_()
    score_T1 = torch.sqrt(torch.where(exact_T1 > 100, exact_T1, torch.log1p(torch.exp(exact_T1.clamp(max=100)))))
    truth_T1, = torch.autograd.grad(score_T1.sum(), exact_T1)
    assert ((weights_T1 / score_T1.detach() - 1).abs() <= 2**-16).all()
    assert ((grad_T1 / truth_T1 - 1).abs() <= 2**-16).all()


@pytest.mark.parametrize("name", CAPACITIES)
def test_which_slots_a_capacity_keeps(name: str) -> None:
    """Those of the oracle, to the slot: 150 tokens over several programs and blocks of others; scores on a coarse grid,
    so that many are equal; identity experts beside, which have no limit; one token that is broken."""
    router = Router(num_experts=5, num_zero_experts=2, top_k=3, capacity=CAPACITIES[name])
    generator = torch.Generator().manual_seed(1)
    ids_TK = torch.rand(150, 7, generator=generator).argsort(1)[:, :3].int()
    scores_TK = torch.randint(1, 9, (150, 3), generator=generator) / 8
    scores_TK[70, 1] = torch.nan
    kept_TK, weights_TK, _ = drop_by(router, ids_TK, scores_TK, scores_TK[:, :0], None)
    expected_TK = kept_slots(ids_TK.long(), scores_TK, router)
    assert torch.equal(kept_TK, torch.where(expected_TK, ids_TK, -1))
    assert torch.equal(weights_TK.nan_to_num(7.0), torch.where(expected_TK, scores_TK.nan_to_num(7.0), 0.0))
    assert bool(expected_TK.all()) == (name == "everything fits")


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("shared", [0, 2], ids=["", "with columns"])
@pytest.mark.parametrize("learned_scale", [None, "layer", "expert"])
@pytest.mark.parametrize("capacity", [Capacity(tokens=3, priority="weight", renormalize_after=True),
                                      Capacity(tokens=1, renormalize_after=True), Capacity(tokens=3)],
                         ids=["by weight, after", "tokens without a slot", "by token"])
@pytest.mark.parametrize("rule", ["add", "clamp"])
def test_what_is_left_is_weighted(rule: str, capacity: Capacity, learned_scale: str | None, shared: int) -> None:
    """Weights and gradients against the formulas in fp64: a sum of three slots and columns, a division and a scale lose
    eight roundings forward, twice that and two more sums backward, a scale's sum over tokens 40 more."""
    after = capacity.renormalize_after
    router = replace(SIGMOID, renormalize=True, renormalize_epsilon=0.75, epsilon_rule=rule, scaling_factor=2.5,
                     learned_scale=learned_scale, capacity=capacity)
    score_TE, shared_TS = (uniform(40, size, seed=seed).abs() for size, seed in ((6, 1), (shared, 2)))
    (_, scale_E), ids_TK = parameters(router), formula.top_ids(score_TE, 3)
    # What is renormalised before a capacity arrives so, and its gradient is that of the division left out.
    router = router if after else replace(router, renormalize=False, epsilon_rule="add")
    scores_TK = score_TE.gather(1, ids_TK)
    leaves = [scores_TK.clone().requires_grad_(), shared_TS.clone().requires_grad_()]
    kept_TK, *found = drop_by(router, ids_TK.int(), *leaves, scale_E)
    columns_TS = shared_TS.double() if shared else None
    wanted_TK, *truth = formula.weigh(score_TE.double(), ids_TK, router, scale_E, columns_TS)
    assert torch.equal(kept_TK.long(), wanted_TK)
    for got, wanted in zip(found, truth if shared else truth[:1], strict=False):
        assert ((got - wanted).abs() <= 8 * 2**-24 * wanted.abs()).all()
    grads = [uniform(40, 3, seed=3), uniform(40, shared, seed=4)]
    back = ops.drop_backward(*grads, kept_TK, scores_TK, shared_TS, scale_E, 6, 0, 3, router.renormalize, 0.75,
                             router.epsilon_rule, 2.5, learned_scale)
    exact = weigh_backward(*grads, score_TE.double(), ids_TK, router, scale_E, shared_TS.double())
    # A share is at most 1, and a divisor at least 0.75 or, with everything else in it, more.
    size = 2.5 * 1.5 * (1 + 3 + shared) / 0.75
    for got, wanted in zip(back[:2], (exact.score_TE.gather(1, ids_TK), exact.shared_TS), strict=True):
        assert ((got - wanted).abs() <= 32 * 2**-24 * size).all()
    if scale_E is not None:
        assert ((back[2] - exact.weight_scale_E).abs() <= 72 * 2**-24 * 2.5 * 40 * (3 + shared)).all()
    torch.autograd.backward(found[:1 + bool(shared)], grads[:1 + bool(shared)])
    assert torch.equal(leaves[0].grad, back[0])
    assert not back[0][kept_TK < 0].any(), "what was dropped has no gradient"


def test_gradients_of_gradients_are_refused() -> None:
    """By name, for every operator of the router, instead of a graph that ends in silence."""
    x_TH, logits_TE = uniform(6, HIDDEN, seed=1, grad=True), uniform(6, 6, seed=3, grad=True)
    weights_TK = uniform(6, 3, seed=4, grad=True)
    ids_TK, selected_TK, nothing_T0 = select_by(SOFTMAX, logits_TE, None, None, None)
    router = replace(SOFTMAX, renormalize=True, capacity=Capacity(tokens=2, renormalize_after=True))
    dropped_TK = drop_by(router, ids_TK, weights_TK, nothing_T0, None)[1]
    routed_TK = route_by(SOFTMAX, x_TH, uniform(6, HIDDEN, seed=2), None, None, None, None)[1]
    for result, leaf in ((ops.router_logits(x_TH, uniform(4, HIDDEN, seed=2), None), x_TH), (selected_TK, logits_TE),
                         (dropped_TK, weights_TK), (routed_TK, x_TH)):
        first, = torch.autograd.grad(result.square().sum(), leaf, create_graph=True)
        with pytest.raises(UsageValueError, match="only first gradients are implemented"):
            first.sum().backward()


def test_wrong_arguments_of_the_product() -> None:
    """Are told with both numbers."""
    x_TH = uniform(6, HIDDEN, seed=1)
    with pytest.raises(UsageValueError, match=re.escape("router_EH: shape (4, 21), but should be (4, 20)")):
        ops.router_logits(x_TH, uniform(4, 21, seed=1), None)
    with pytest.raises(UsageValueError, match=re.escape("router_bias_E: shape (5,), but should be (4,)")):
        ops.router_logits(x_TH, uniform(4, HIDDEN, seed=1), uniform(5, seed=1))
    with pytest.raises(UsageTypeError, match=re.escape("x_TH: dtype torch.float64, but should be")):
        ops.router_logits(x_TH.double(), uniform(4, HIDDEN, seed=1), None)


@pytest.mark.parametrize(("place", "wrong", "error", "message"), [
    (0, uniform(6, 6, seed=2, dtype=torch.bfloat16), UsageTypeError,
     "logits_TE: dtype torch.bfloat16, but should be torch.float32"),
    (1, uniform(5, 2, seed=1), UsageValueError, "shared_logits_TS: shape (5, 2), but should be (6, 2)"),
    (2, uniform(5, seed=1), UsageValueError, "selection_bias_E: shape (5,), but should be (6,)"),
    (2, None, UsageValueError, "selection_bias_E is missing, but the option is 'score'"),
    (3, uniform(6, seed=1), UsageValueError, "weight_scale_E: shape (6,), but should be (1,)"),
    (4, 7, UsageValueError, "top_k=7, but should be at most num_experts=6"),
    (5, None, UsageValueError, "selection_bias_E is given, but the option is None"),
    (6, 4, UsageValueError, "num_groups=4, but should divide num_experts=6"),
    (10, "tanh", UsageValueError, "score='tanh', but should be one of"),
    (15, "clamp", UsageValueError, "epsilon_rule='clamp', but there is no renormalize_epsilon to clamp at"),
])
def test_wrong_arguments_of_the_selection(place: int, wrong: object, error: type, message: str) -> None:
    """Before any kernel starts; wrong options in the words of a Router."""
    given = [uniform(6, 6, seed=2), uniform(6, 2, seed=3), uniform(6, seed=4), torch.ones(1), 2, "score", 1, 1, "max",
             "minus_inf", "sigmoid", 1.0, 0.0, False, 0.0, "add", 1.0, "layer"]
    ops.select(*given)
    given[place] = wrong
    with pytest.raises(error, match=re.escape(message)):
        ops.select(*given)


def test_wrong_arguments_of_both_at_once() -> None:
    """In the words of the operator that was called."""
    x_TH, router_EH = uniform(6, HIDDEN, seed=1), uniform(6, HIDDEN, seed=2)
    with pytest.raises(UsageValueError, match=re.escape("moe_fast::route: router_EH: shape (6, 19), but should be")):
        route_by(SOFTMAX, x_TH, router_EH[:, 1:], None, None, None, None)
    with pytest.raises(UsageValueError, match=re.escape("moe_fast::route: selection_bias_E: shape (5,), but should")):
        route_by(replace(SIGMOID, selection_bias="score"), x_TH, router_EH, None, None, torch.ones(5), None)
    with pytest.raises(UsageValueError, match=re.escape("shared_logits_TS: shape (5, 2), but should be (6, 2)")):
        route_by(SIGMOID, x_TH, router_EH, None, torch.ones(5, 2), None, None)


def test_wrong_arguments_of_a_capacity() -> None:
    """Likewise."""
    ids_TK, scores_TK, nothing_T0 = torch.zeros(6, 3, dtype=torch.int32), uniform(6, 3, seed=1), torch.empty(6, 0)
    router = replace(SOFTMAX, capacity=Capacity(tokens=2))
    with pytest.raises(UsageTypeError, match=re.escape("ids_TK: dtype torch.int64, but should be torch.int32")):
        drop_by(router, ids_TK.long(), scores_TK, nothing_T0, None)
    with pytest.raises(UsageValueError, match=re.escape("scores_TK: shape (6, 2), but should be (6, 3)")):
        drop_by(router, ids_TK, scores_TK[:, :2], nothing_T0, None)
    with pytest.raises(UsageValueError, match="tokens=None, factor=None, but exactly one of them should be given"):
        ops.drop(ids_TK, scores_TK, nothing_T0, None, None, None, "token", None, False, 6, 0, 3, False, 0.0, "add", 1.0,
                 None)
