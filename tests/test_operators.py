"""torch.ops.moe_fast: torch's own checks of every operator, whom they host, what they refuse, and what they hide."""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.library import opcheck

import moe_fast
import moe_fast.interpreter.launch as interpreter
from moe_fast.form import parse_form
from moe_fast.operators.arguments import ExpertsArguments
from moe_fast.operators.experts import experts_forward
from moe_fast.operators.experts_backward import experts_backward
from moe_ref import MoEWeights, Router, Trace
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.oracle import router as formula
from moe_ref.oracle.backward.weights import score_backward, weigh_backward
from tests.backward_cases import draw
from tests.test_api import Forbid
from tests.test_fast_backward import CASES, gradients, inputs_of

ops = torch.ops.moe_fast
HIDDEN, SHARED, NUM_IDS = 20, 7, 5


def uniform(*shape: int, seed: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    """Numbers in (-1, 1) on the grid of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(*shape, generator=generator) - 1).to(dtype).requires_grad_(grad)


def arguments(num_tokens: int = 6, hosted: tuple[int, ...] = (4, 0, 2), shared: str = "gated",
              intermediate: int = 9, dtype: torch.dtype = torch.float32, grad: bool = False,
              forms: tuple[str, str] = ("silu", "gelu"), biases: bool = False) -> list[object]:
    """Arguments of moe_fast::experts: ids of 0 to 4 and what is no id; two slots per token; biases: all, and a mean."""
    ids_TK = torch.tensor([[0, 4], [2, -1], [3, 4], [1, 0], [2**32 + 2, 2], [5, 3]])[:num_tokens]
    kinds = {"dtype": dtype, "grad": grad}
    num_parts, shared_parts = (parse_form(form).num_projections for form in forms)
    added: list[object] = []
    if biases:
        added = [uniform(NUM_IDS, num_parts, intermediate, seed=9, dtype=dtype)[list(hosted)].requires_grad_(grad),
                 uniform(NUM_IDS, HIDDEN, seed=10, dtype=dtype)[list(hosted)].requires_grad_(grad),
                 uniform(shared_parts, SHARED, seed=11, **kinds) if shared else None,
                 uniform(HIDDEN, seed=12, **kinds) if shared else None, uniform(HIDDEN, seed=13, **kinds), bool(shared)]
    return [uniform(num_tokens, HIDDEN, seed=1, **kinds), ids_TK, uniform(num_tokens, 2, seed=2, grad=grad),
            torch.tensor(hosted, dtype=torch.int64),
            uniform(NUM_IDS, num_parts, intermediate, HIDDEN, seed=3, dtype=dtype)[list(hosted)].requires_grad_(grad),
            uniform(NUM_IDS, HIDDEN, intermediate, seed=4, dtype=dtype)[list(hosted)].requires_grad_(grad),
            uniform(shared_parts, SHARED, HIDDEN, seed=5, **kinds) if shared else None,
            uniform(HIDDEN, SHARED, seed=6, **kinds) if shared else None,
            uniform(num_tokens, 1, seed=7, grad=grad) if shared == "gated" else None, *forms, *added]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "hosted", "shared", "intermediate"), [
    (6, (4, 0, 2), "gated", 9), (6, (0, 1, 2, 3, 4), "", 9), (6, (1,), "plain", 9), (0, (4, 0, 2), "gated", 9),
    (6, (), "", 9), (6, (3, 1), "", 0)],
    ids=["some experts", "all", "shared, no gate", "no tokens", "no experts", "no columns"])
def test_torch_checks_the_experts(num_tokens: int, hosted: tuple[int, ...], shared: str, intermediate: int,
                                  dtype: torch.dtype) -> None:
    """Schema, fakes, autograd registration and ahead-of-time dispatch with dynamic shapes, forward and backward."""
    given = arguments(num_tokens, hosted, shared, intermediate, dtype, grad=True)
    opcheck(ops.experts.default, given)
    plain = [one.detach() if isinstance(one, torch.Tensor) else one for one in given]
    opcheck(ops.experts_backward.default, [uniform(num_tokens, HIDDEN, seed=8, dtype=dtype), *plain])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [6, 0])
def test_torch_checks_the_router(num_tokens: int, dtype: torch.dtype) -> None:
    """The same of the logits and of the selection, whose gradient through torch.compile has a test of its own:
    opcheck adds outputs up and cannot add weights to ids."""
    x_TH, router_EH = uniform(num_tokens, HIDDEN, seed=1, dtype=dtype), uniform(8, HIDDEN, seed=2, dtype=dtype)
    opcheck(ops.router_logits.default, (x_TH.requires_grad_(), router_EH.requires_grad_()))
    logits_TE, bias_E = uniform(num_tokens, 8, seed=3), uniform(8, seed=4)
    opcheck(ops.router_logits_backward.default, (logits_TE, x_TH.detach(), router_EH.detach()))
    for options in ((None, 2, "softmax", 1, 1, "max", True, 0.125, 2.0),
                    (bias_E, 3, "sigmoid", 4, 2, "top2_sum", False, 0.0, 1.0)):
        opcheck(ops.select.default, (logits_TE, *options))
        opcheck(ops.select.default, (logits_TE.clone().requires_grad_(), *options),
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    ids_TK, weights_TK = ops.select(logits_TE, *options)
    opcheck(ops.select_backward.default, (weights_TK, logits_TE, ids_TK, "sigmoid", False, 0.0, 1.0))


def results(given: list[object]) -> list[torch.Tensor]:
    """The operator's result and its gradients."""
    return [ops.experts(*given), *ops.experts_backward(uniform(*given[0].shape, seed=8), *given)]


def test_experts_may_stand_in_any_order() -> None:
    """hosted_E tells which expert stands where: the same bits from every order, gradients in that order."""
    straight, mixed = results(arguments(hosted=(0, 1, 2, 3, 4))), results(arguments(hosted=(3, 0, 4, 1, 2)))
    for place in (3, 4):
        straight[place] = straight[place][[3, 0, 4, 1, 2]]
    assert [torch.equal(one, two) for one, two in zip(straight, mixed, strict=True)] == [True] * 13


def test_ids_of_other_ranks_contribute_nothing() -> None:
    """Three of five experts: bit by bit what the same three give where the other ids are -1."""
    hosted, given = (4, 0, 2), arguments()
    places = {expert: place for place, expert in enumerate(hosted)}
    local_TK = torch.tensor([[places.get(e, -1) for e in row] for row in given[1].tolist()])
    relabelled = [given[0], local_TK, given[2], torch.arange(3), *given[4:]]
    first, second = results(given), results(relabelled)
    assert [torch.equal(one, two) for one, two in zip(first, second, strict=True)] == [True] * 13
    assert torch.equal(first[2] != 0, local_TK >= 0)


def test_ranks_make_up_the_whole() -> None:
    """Partial sums of five experts over two ranks: gradients of weights to the bit, sums within their roundings."""
    whole, parts = results(arguments(hosted=(0, 1, 2, 3, 4), shared="")), [
        results(arguments(hosted=hosted, shared="")) for hosted in ((1, 4), (3, 0, 2))]
    for place in (0, 1):  # sums of two terms that were rounded by themselves
        assert ((parts[0][place] + parts[1][place] - whole[place]).abs()
                <= 2**-24 * (parts[0][place].abs() + parts[1][place].abs() + whole[place].abs())).all()
    assert torch.equal(parts[0][2] + parts[1][2], whole[2])


@pytest.mark.parametrize(("options", "reached"), [
    ({"num_tokens": 0}, set()), ({"hosted": (), "shared": ""}, set()), ({"intermediate": 0, "shared": ""}, set()),
    ({"hosted": (), "shared": "gated"}, {0, 1, 5, 6, 7})], ids=["tokens", "experts", "columns", "experts, but shared"])
def test_nothing_gives_zeros(options: dict, reached: set[int]) -> None:
    """No tokens, no experts or no columns on a rank: zeros of the right shapes, in fresh memory that is NaN."""
    given = arguments(**options)
    torch.use_deterministic_algorithms(True)
    try:
        found = results(given)
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = [given[0], given[0], given[2], *given[4:9], *(None,) * 5]
    assert [tuple(one.shape) for one in found] == [(0,) if one is None else tuple(one.shape) for one in wanted]
    assert {place for place, one in enumerate(found) if one.any()} == reached


FORMS = {
    "gpt-oss": ("silu limit=0.75 sigmoid_scale=1.702 up_offset=1.0", "silu"),
    "one projection": ("relu_squared gated=False", "relu gated=False"),
    "weight on input": ("silu weight_on_input=True", "gelu_tanh"),
    "softcaps": ("silu gate_softcap=1.25 up_softcap=1.5", "silu limit=0.5 limit_at=after"),
}


@pytest.mark.parametrize("shared", ["gated", ""])
@pytest.mark.parametrize("name", FORMS)
def test_torch_checks_every_form(name: str, shared: str) -> None:
    """The same of the other options of an MLP, of the mean, and of biases."""
    given = arguments(shared=shared, forms=FORMS[name], biases=name != "weight on input", grad=True)
    opcheck(ops.experts.default, given)
    plain = [one.detach() if isinstance(one, torch.Tensor) else one for one in given]
    opcheck(ops.experts_backward.default, [uniform(6, HIDDEN, seed=8), *plain])


def test_a_bias_reaches_the_gradients_of_routing_weights() -> None:
    """Without columns the bias alone is weighted: its product with the gradient, within (n + 1) roundings."""
    given = arguments(hosted=(0, 1, 2, 3, 4), intermediate=0, shared="", biases=True)
    grad_TH, ids_TK, bias_EH = uniform(6, HIDDEN, seed=8), given[1], given[12]
    found_TK = ops.experts_backward(grad_TH, *given)[1]
    inside_TK = (ids_TK >= 0) & (ids_TK < NUM_IDS)
    terms_TKH = grad_TH[:, None].double() * bias_EH[ids_TK.where(inside_TK, 0)].double() * inside_TK[..., None]
    assert ((found_TK - terms_TKH.sum(2)).abs() <= (HIDDEN + 1) * 2**-24 * terms_TKH.abs().sum(2)).all()
    assert found_TK[inside_TK].all()


def test_the_routers_product_back() -> None:
    """Plain sums: each element within (n + 1) roundings of the sum of absolute values, n its number of terms."""
    x_TH, router_EH, grad_TE = uniform(70, 130, seed=1), uniform(6, 130, seed=2), uniform(70, 6, seed=3)
    for found, left, right in zip(ops.router_logits_backward(grad_TE, x_TH, router_EH),
                                  (grad_TE.double(), grad_TE.T.double()), (router_EH.double(), x_TH.double()),
                                  strict=True):
        bound = (left.shape[1] + 1) * 2**-24 * (left.abs() @ right.abs())
        assert ((found.double() - left @ right).abs() <= bound).all()


ROUTERS = {
    "softmax": Router(num_experts=6, top_k=3), "softmax of one": Router(num_experts=6, top_k=1, renormalize=True),
    "softmax renormalised": Router(num_experts=6, top_k=3, renormalize=True, scaling_factor=2.5),
    "softmax groups": Router(num_experts=6, top_k=2, num_groups=3, num_groups_kept=2, renormalize_epsilon=0.5,
                             renormalize=True),
    "sigmoid": Router(num_experts=6, top_k=3, score="sigmoid", scaling_factor=0.75),
    "sigmoid, everything": Router(num_experts=6, top_k=2, score="sigmoid", num_groups=2, num_groups_kept=1,
                                  group_score="top2_sum", selection_bias="score", renormalize=True,
                                  renormalize_epsilon=1e-20, scaling_factor=2.5),
    "every expert": Router(num_experts=6, top_k=6, renormalize=True),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_of_the_selection(name: str) -> None:
    """Against the formulas in fp64; the bound is the formula with absolute values times what its factors lose.

    A score loses what its exponent's argument does (at most 8), a sum over 6 experts, a function and a division: 24
    roundings; a path has at most four scores, a sum over slots and over experts, and 12 steps more.
    """
    router = ROUTERS[name]
    logits_TE, bias_E = 4 * uniform(40, 6, seed=1), uniform(6, seed=2) if router.selection_bias else None
    grad_TK = uniform(40, router.top_k, seed=3)
    ids_TK, _ = ops.select(logits_TE, bias_E, router.top_k, router.score, router.num_groups, router.num_groups_kept,
                           router.group_score, router.renormalize, router.renormalize_epsilon, router.scaling_factor)
    found_TE = ops.select_backward(grad_TK, logits_TE, ids_TK, router.score, router.renormalize,
                                   router.renormalize_epsilon, router.scaling_factor).double()
    score_TE, wide_TK = formula.score(logits_TE.double(), router), ids_TK.long()
    grads = weigh_backward(grad_TK, score_TE[:, :0], score_TE, wide_TK, router, None, score_TE[:, :0])
    truth_TE = score_backward(grads.score_TE, logits_TE.double(), router)
    chosen_TK, size_TK = score_TE.gather(1, wide_TK), router.scaling_factor * grad_TK.double().abs()
    divisor_T1 = chosen_TK.sum(1, keepdim=True) + router.renormalize_epsilon if router.renormalize else 1.0
    size_TK = (size_TK + router.renormalize * (size_TK * chosen_TK / divisor_T1).sum(1, keepdim=True)) / divisor_T1
    size_TE = torch.zeros_like(score_TE).scatter_add(1, wide_TK, size_TK)
    if router.score == "softmax":
        size_TE = score_TE * (size_TE + (score_TE * size_TE).sum(1, keepdim=True))
    else:
        size_TE = score_TE * (1 - score_TE) * size_TE
    assert ((found_TE - truth_TE).abs() <= (4 * 24 + 3 + 6 + 12) * 2**-24 * size_TE).all()
    if router.score == "sigmoid":
        chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, wide_TK, True)
        assert not found_TE[~chosen_TE].any(), "what was not selected has no gradient"


@pytest.mark.parametrize("name", ["everything", "every bias"])
def test_the_layer_compiles_to_the_same_bits(name: str) -> None:
    """torch.compile without a graph break, forward and backward; one graph does for every number of tokens."""
    spec = CASES[name]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(moe_fast.moe, fullgraph=True, backend="aot_eager")
    for num_tokens in (6, 11):
        inputs = draw(spec, num_tokens=num_tokens, dtype=torch.bfloat16)
        expected = gradients(inputs, spec)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.weights.named_tensors()}
        x_TH = inputs.x_TH.clone().requires_grad_()
        for tensor in (x_TH, inputs.residual_TH):
            torch._dynamo.mark_dynamic(tensor, 0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lru_cache.*")  # torch traces through the caches of checks, and says so
            y_TH = compiled(x_TH, MoEWeights(**leaves), spec, residual_TH=inputs.residual_TH)
        assert torch.equal(y_TH, moe_fast.moe(x_TH, inputs.weights, spec, residual_TH=inputs.residual_TH))
        y_TH.backward(inputs.grad_y_TH)
        found = {name: leaf.grad for name, leaf in leaves.items()} | {"x_TH": x_TH.grad}
        for field, grad in found.items():
            assert (grad is None) == (expected[field] is None)
            assert grad is None or torch.equal(grad, expected[field]), field
    assert counters["stats"]["unique_graphs"] == 1


def test_torch_does_none_of_the_work_inside() -> None:
    """No product, sort or scatter of torch in the experts, forward or backward, and nothing that waits for the host."""
    given = arguments(forms=FORMS["gpt-oss"], biases=True)
    with Forbid() as mode:
        experts_forward(ExpertsArguments(*given))
        experts_backward._init_fn(uniform(6, HIDDEN, seed=8), *given)
    assert mode.seen["empty"] > 0
    assert mode.seen["_local_scalar_dense"] == 0


def test_gradients_of_gradients_are_refused() -> None:
    """By name, for every operator, instead of a graph that ends in silence."""
    x_TH = uniform(6, HIDDEN, seed=1, grad=True)
    given = [x_TH, *arguments()[1:]]
    logits_TE = uniform(6, 4, seed=3, grad=True)
    selected_TK = ops.select(logits_TE, None, 2, "softmax", 1, 1, "max", True, 0.0, 1.0)[1]
    for result, leaf in ((ops.experts(*given), x_TH), (ops.router_logits(x_TH, uniform(4, HIDDEN, seed=2)), x_TH),
                         (selected_TK, logits_TE)):
        first, = torch.autograd.grad(result.square().sum(), leaf, create_graph=True)
        with pytest.raises(UsageValueError, match="only first gradients are implemented"):
            first.sum().backward()


@pytest.mark.parametrize(("place", "wrong", "error", "message"), [
    (0, uniform(6, 21, seed=1), UsageValueError, "w13_EGIH: shape (3, 2, 9, 20), but should be (3, 2, 9, 21)"),
    (1, torch.zeros(6, 3, dtype=torch.int64), UsageValueError, "weights_TK: shape (6, 2), but should be (6, 3)"),
    (1, torch.zeros(6, 2), UsageTypeError, "ids_TK: dtype torch.float32, but should be torch.int32 or torch.int64"),
    (2, uniform(6, 2, seed=1, dtype=torch.bfloat16), UsageTypeError,
     "weights_TK: dtype torch.bfloat16, but should be torch.float32"),
    (3, torch.arange(4), UsageValueError, "w13_EGIH: shape (3, 2, 9, 20), but should be (4, 2, 9, 20)"),
    (3, torch.arange(3, dtype=torch.int32), UsageTypeError, "hosted_E: dtype torch.int32, but should be torch.int64"),
    (4, uniform(3, 1, 9, 20, seed=1), UsageValueError, "w13_EGIH: shape (3, 1, 9, 20), but should be (3, 2, 9, 20)"),
    (5, uniform(3, 20, 8, seed=1), UsageValueError, "w2_EHI: shape (3, 20, 8), but should be (3, 20, 9)"),
    (5, uniform(3, 20, 9, seed=1, dtype=torch.bfloat16), UsageTypeError,
     "w2_EHI: dtype torch.bfloat16, but should be torch.float32"),
    (5, torch.empty(3, 20, 9, device="meta"), UsageTypeError, "w2_EHI: device meta, but should be cpu as x_TH"),
    (6, None, UsageValueError, "only shared_w2_HI and shared_gate_T1 given, but a shared expert needs"),
    (7, uniform(20, 8, seed=1), UsageValueError, "shared_w2_HI: shape (20, 8), but should be (20, 7)"),
    (8, uniform(6, 2, seed=1), UsageValueError, "shared_gate_T1: shape (6, 2), but should be (6, 1)"),
    (9, "swish", UsageValueError, "form 'swish': activation='swish', but should be one of silu, gelu, gelu_tanh, relu"),
    (9, "silu gated=False", UsageValueError, "w13_EGIH: shape (3, 2, 9, 20), but should be (3, 1, 9, 20)"),
    (10, "silu limit=seven", UsageValueError, "limit='seven', but should be a number"),
    (11, uniform(3, 1, 9, seed=1), UsageValueError, "w13_bias_EGI: shape (3, 1, 9), but should be (3, 2, 9)"),
    (12, uniform(3, 19, seed=1), UsageValueError, "w2_bias_EH: shape (3, 19), but should be (3, 20)"),
    (13, uniform(2, 7, seed=1).bfloat16(), UsageTypeError,
     "shared_w13_bias_GI: dtype torch.bfloat16, but should be torch.float32"),
    (15, torch.empty(20, device="meta"), UsageTypeError, "output_bias_H: device meta, but should be cpu as x_TH"),
    (10, "silu cap=7.0", UsageValueError, "'cap', but should be one of gated, weight_on_input, limit"),
    (10, "silu limit_at=between", UsageValueError, "limit_at='between', but should be before or after"),
    (10, "silu weight_on_input=True", UsageValueError, "but the gate is on the shared expert's output"),
])
def test_wrong_arguments_are_told_with_numbers(place: int, wrong: object, error: type, message: str) -> None:
    """Before any kernel starts, forward and backward."""
    given = arguments(biases=place > 10)
    given[place] = wrong
    with pytest.raises(error, match=re.escape(message)):
        ops.experts(*given)
    with pytest.raises(error, match=re.escape(message)):
        ops.experts_backward(uniform(*given[0].shape, seed=8), *given)


def test_a_mean_needs_two_parts() -> None:
    """Half of the routed experts alone is no mean."""
    with pytest.raises(UsageValueError, match="mean=True, but without a shared expert"):
        ops.experts(*arguments(shared=""), None, None, None, None, None, True)


def test_wrong_arguments_of_the_router() -> None:
    """Likewise; and a gradient that is not the result's."""
    x_TH, logits_TE = uniform(6, HIDDEN, seed=1), uniform(6, 4, seed=2)
    with pytest.raises(UsageValueError, match=re.escape("router_EH: shape (4, 21), but should be (4, 20)")):
        ops.router_logits(x_TH, uniform(4, 21, seed=1))
    with pytest.raises(UsageTypeError, match=re.escape("x_TH: dtype torch.float64, but should be")):
        ops.router_logits(x_TH.double(), uniform(4, HIDDEN, seed=1))
    with pytest.raises(UsageTypeError, match=re.escape("logits_TE: dtype torch.bfloat16, but should be torch.float32")):
        ops.select(logits_TE.bfloat16(), None, 2, "softmax", 1, 1, "max", True, 0.0, 1.0)
    with pytest.raises(UsageValueError, match=re.escape("selection_bias_E: shape (5,), but should be (4,)")):
        ops.select(logits_TE, uniform(5, seed=1), 2, "softmax", 1, 1, "max", True, 0.0, 1.0)
    with pytest.raises(UsageValueError, match="score='tanh', but should be one of softmax, sigmoid"):
        ops.select(logits_TE, None, 2, "tanh", 1, 1, "max", True, 0.0, 1.0)
    with pytest.raises(UsageValueError, match="num_groups=3, but should divide the 4 experts"):
        ops.select(logits_TE, None, 2, "softmax", 3, 1, "max", True, 0.0, 1.0)
    with pytest.raises(UsageValueError, match="top_k=3, but should be from 1 to 2, the experts to choose from"):
        ops.select(logits_TE, None, 3, "softmax", 2, 1, "max", True, 0.0, 1.0)
    with pytest.raises(UsageValueError, match=re.escape("grad_TH: (6, 19) torch.float32, but should be (6, 20)")):
        ops.experts_backward(uniform(6, 19, seed=1), *arguments())


def test_a_trace_and_gradients_exclude_each_other() -> None:
    """What is shown comes from the same kernels but outside the operator; under no_grad parameters may be leaves."""
    inputs, spec = inputs_of("everything"), CASES["everything"]
    weights = replace(inputs.weights, w2_EHI=inputs.weights.w2_EHI.clone().requires_grad_())
    with pytest.raises(UsageValueError, match=r"a traced call should be under torch\.no_grad\(\)"):
        moe_fast.moe(inputs.x_TH, weights, spec, trace=Trace())
    trace = Trace()
    with torch.no_grad():
        traced_TH = moe_fast.moe(inputs.x_TH, weights, spec, trace=trace)
    assert torch.equal(traced_TH, moe_fast.moe(inputs.x_TH, weights, spec))
    assert len(trace.tensors) == 8


def test_a_traced_call_launches_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Observing never selects another kernel: the same launches, counted by kernel."""
    inputs, spec, counts = inputs_of("everything"), CASES["everything"], []
    run = interpreter._run_programs
    for trace in (None, Trace()):
        names: Counter[str] = Counter()

        def counted(function: Callable, *rest: object, names: Counter[str] = names) -> None:
            names.update([function.__name__])
            run(function, *rest)

        monkeypatch.setattr(interpreter, "_run_programs", counted)
        moe_fast.moe(inputs.x_TH, inputs.weights, spec, trace=trace)
        counts.append(names)
    assert counts[0] == counts[1]
    assert counts[0]["gate_up_kernel"] == 2
