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
from moe_ref import MoEWeights, Trace
from moe_ref.contract.errors import UsageTypeError, UsageValueError
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


@pytest.mark.sampled(every=10)
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


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("shared", ["gated", ""])
@pytest.mark.parametrize("name", FORMS)
def test_torch_checks_every_form(name: str, shared: str) -> None:
    """The same of the other options of an MLP, of the mean, and of biases."""
    given = arguments(shared=shared, forms=FORMS[name], biases=name != "weight on input", grad=True)
    opcheck(ops.experts.default, given)
    plain = [one.detach() if isinstance(one, torch.Tensor) else one for one in given]
    opcheck(ops.experts_backward.default, [uniform(6, HIDDEN, seed=8), *plain])


@pytest.mark.parametrize("name", ["gpt-oss", "weight on input"])
def test_torch_checks_rounded_operands(name: str) -> None:
    """Of experts, and of the halves that the gather schedule runs."""
    words = (False, "fp8_row")
    given = [*arguments(forms=FORMS[name], biases=True, grad=True)[:16], *words]
    opcheck(ops.experts.default, given)
    plain = [one.detach() if isinstance(one, torch.Tensor) else one for one in given]
    opcheck(ops.experts_backward.default, [uniform(6, HIDDEN, seed=8), *plain])
    x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, *_ = plain
    on_input, w13_bias_EGI, w2_bias_EH = name == "weight on input", plain[11], plain[12]
    act = [x_TH, ids_TK, hosted_E, w13_EGIH, plain[9], weights_TK if on_input else None, w13_bias_EGI, "fp8_row"]
    down = [uniform(12, 9, seed=14), ids_TK, weights_TK, hosted_E, w2_EHI, None, None, None, w2_bias_EH, None, None,
            *words]
    opcheck(ops.act_rows.default, act)
    opcheck(ops.act_rows_backward.default, [uniform(12, 9, seed=15), *act])
    opcheck(ops.merged_down.default, down)
    opcheck(ops.merged_down_backward.default, [uniform(6, HIDDEN, seed=8), *down])


def test_a_bias_reaches_the_gradients_of_routing_weights() -> None:
    """Without columns the bias alone is weighted: its product with the gradient, within (n + 1) roundings."""
    given = arguments(hosted=(0, 1, 2, 3, 4), intermediate=0, shared="", biases=True)
    grad_TH, ids_TK, bias_EH = uniform(6, HIDDEN, seed=8), given[1], given[12]
    found_TK = ops.experts_backward(grad_TH, *given)[1]
    inside_TK = (ids_TK >= 0) & (ids_TK < NUM_IDS)
    terms_TKH = grad_TH[:, None].double() * bias_EH[ids_TK.where(inside_TK, 0)].double() * inside_TK[..., None]
    assert ((found_TK - terms_TKH.sum(2)).abs() <= (HIDDEN + 1) * 2**-24 * terms_TKH.abs().sum(2)).all()
    assert found_TK[inside_TK].all()


@pytest.mark.sampled(every=4)
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
    """By name, instead of a graph that ends in silence."""
    x_TH = uniform(6, HIDDEN, seed=1, grad=True)
    first, = torch.autograd.grad(ops.experts(x_TH, *arguments()[1:]).square().sum(), x_TH, create_graph=True)
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


def test_a_gradient_of_another_shape() -> None:
    """Is told with both shapes."""
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
