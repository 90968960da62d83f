"""torch.ops.moe_fast of the parallel forms: torch's own checks, and what rows, halves and orders are."""

import pytest
import torch
from torch.library import opcheck

from moe_fast.operators.act_rows import act_rows, act_rows_backward
from moe_fast.operators.experts import experts
from moe_fast.operators.merged_down import merged_down, merged_down_backward
from moe_fast.operators.moved_rows import order_rows, sum_rows, take_rows
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from tests.test_api import Forbid

HIDDEN, OUTPUTS, WIDTH, SHARED = 20, 6, 9, 7
KINDS = [torch.float32, torch.bfloat16]


def uniform(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers in (-1, 1) on the grid of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(*shape, generator=generator) - 1).to(dtype)


def wanted(given: tuple) -> list[object]:
    """The same arguments, every floating one the start of a graph."""
    return [one.clone().requires_grad_() if isinstance(one, torch.Tensor) and one.dtype.is_floating_point else one
            for one in given]


SOURCE_R = torch.tensor([2, 0, -1, 2, 1])
PLACE_TK = torch.tensor([[1, -1], [-1, 4], [0, 3], [-1, -1]])
"""Five rows of four tokens: the third row has no token, the last token no row."""


def routed(num_tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_TK, some of no expert at hand, and hosted_E."""
    ids_TK = torch.tensor([[0, 4], [2, -1], [3, 4], [1, 0], [2**32 + 2, 2], [5, 3]])[:num_tokens]
    return ids_TK, torch.tensor([4, 0, 2])


def first_half(num_tokens: int = 6, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of act_rows."""
    ids_TK, hosted_E = routed(num_tokens)
    return (uniform(num_tokens, HIDDEN, seed=1, dtype=dtype), ids_TK, hosted_E,
            uniform(3, 2, width, HIDDEN, seed=3, dtype=dtype), "silu")


def second_half(num_tokens: int = 6, outputs: int = OUTPUTS, shared: str = "gated",
                dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of merged_down."""
    ids_TK, hosted_E = routed(num_tokens)
    return (uniform(ids_TK.numel(), WIDTH, seed=1, dtype=dtype), ids_TK, uniform(num_tokens, 2, seed=2), hosted_E,
            uniform(3, outputs, WIDTH, seed=4, dtype=dtype),
            uniform(num_tokens, SHARED, seed=5, dtype=dtype) if shared else None,
            uniform(outputs, SHARED, seed=6, dtype=dtype) if shared else None,
            uniform(num_tokens, 1, seed=7) if shared == "gated" else None)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("dtype", KINDS)
def test_torch_checks_moved_rows(dtype: torch.dtype) -> None:
    """Schema, fakes, autograd registration and ahead-of-time dispatch, forward and backward."""
    opcheck(take_rows, wanted((uniform(4, 3, seed=1, dtype=dtype), SOURCE_R, PLACE_TK)))
    opcheck(sum_rows, wanted((uniform(5, 3, seed=1, dtype=dtype), SOURCE_R, PLACE_TK)))
    opcheck(order_rows, (torch.tensor([[1, 0], [-1, 1]]), 2))


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("num_tokens", "width"), [(6, WIDTH), (0, WIDTH), (6, 0)],
                         ids=["rows", "no tokens", "no columns"])
def test_torch_checks_the_first_half(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    """The same of gate, up and activation."""
    given = first_half(num_tokens, width, dtype)
    opcheck(act_rows, wanted(given))
    opcheck(act_rows_backward, (uniform(2 * num_tokens, width, seed=8, dtype=dtype), *given))


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("num_tokens", "outputs", "shared"), [
    (6, OUTPUTS, "gated"), (6, OUTPUTS, "plain"), (6, OUTPUTS, ""), (0, OUTPUTS, "gated"), (6, 0, "gated")],
    ids=["gated shared", "shared", "routed alone", "no tokens", "no columns"])
def test_torch_checks_the_second_half(num_tokens: int, outputs: int, shared: str, dtype: torch.dtype) -> None:
    """The same of the down product and the merge."""
    given = second_half(num_tokens, outputs, shared, dtype)
    opcheck(merged_down, wanted(given))
    opcheck(merged_down_backward, (uniform(num_tokens, outputs, seed=8, dtype=dtype), *given))


def test_torch_checks_biases_and_weights_on_the_input() -> None:
    """The same of what either half may take beside."""
    x_TH, ids_TK, hosted_E, w13_EGIH, _ = first_half()
    weights_TK, bias_EGI = uniform(6, 2, seed=2), uniform(3, 2, WIDTH, seed=9)
    for given in ((x_TH, ids_TK, hosted_E, w13_EGIH, "silu weight_on_input=True", weights_TK),
                  (x_TH, ids_TK, hosted_E, w13_EGIH[:, :1], "relu gated=False", None, bias_EGI[:, :1])):
        opcheck(act_rows, wanted(given))
        opcheck(act_rows_backward, (uniform(12, WIDTH, seed=8), *given))
    biases = (uniform(3, OUTPUTS, seed=9), uniform(OUTPUTS, seed=10), uniform(OUTPUTS, seed=11))
    given = (*second_half(), *biases, True)
    opcheck(merged_down, wanted(given))
    opcheck(merged_down_backward, (uniform(6, OUTPUTS, seed=8), *given))
    opcheck(sum_rows, wanted((uniform(5, 3, seed=1), SOURCE_R, PLACE_TK, uniform(3, seed=2), True)))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
def test_the_halves_with_everything_are_the_whole(dtype: torch.dtype, on_input: bool) -> None:
    """Biases, a limit and a mean; the weight is in one half alone, and the same bits come out."""
    x_TH, ids_TK, hosted_E, w13_EGIH, _ = first_half(dtype=dtype)
    form, weights_TK = "silu limit=0.5 up_offset=1.0" + " weight_on_input=True" * on_input, uniform(6, 2, seed=2)
    w2_EHI, gate_T1 = uniform(3, HIDDEN, WIDTH, seed=4, dtype=dtype), uniform(6, 1, seed=7)
    shared_w13_GIH, shared_w2_HI = (uniform(*shape, seed=5, dtype=dtype) for shape in ((2, SHARED, HIDDEN),
                                                                                     (HIDDEN, SHARED)))
    bias_EGI, bias_EH, shared_bias_GI, shared_bias_H, output_bias_H = (
        uniform(*shape, seed=9, dtype=dtype) for shape in ((3, 2, WIDTH), (3, HIDDEN), (2, SHARED), (HIDDEN,),
                                                           (HIDDEN,)))
    whole = experts(x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI, gate_T1, form,
                    "gelu", bias_EGI, bias_EH, shared_bias_GI, shared_bias_H, output_bias_H, True)
    everybody = torch.zeros(6, 1, dtype=torch.int64)
    shared_act_TI = act_rows(x_TH, everybody, everybody[0], shared_w13_GIH[None], "gelu", None, shared_bias_GI[None])
    act_RI = act_rows(x_TH, ids_TK, hosted_E, w13_EGIH, form, weights_TK if on_input else None, bias_EGI)
    halves = merged_down(act_RI, ids_TK, torch.ones_like(weights_TK) if on_input else weights_TK, hosted_E, w2_EHI,
                         shared_act_TI, shared_w2_HI, gate_T1, bias_EH, shared_bias_H, output_bias_H, True)
    assert torch.equal(whole, halves)


def test_sums_of_rows_take_half_and_then_the_bias() -> None:
    """By hand, rounded once; each token's gradient reaches the bias whole and its rows by half."""
    rows_RH, bias_H = uniform(5, 3, seed=2).requires_grad_(), uniform(3, seed=4).requires_grad_()
    sums_TH = sum_rows(rows_RH, SOURCE_R, PLACE_TK, bias_H, True)
    plain_TH = sum_rows(rows_RH.detach(), SOURCE_R, PLACE_TK)
    assert torch.equal(sums_TH, plain_TH * 0.5 + bias_H)
    grad_TH = uniform(4, 3, seed=5)
    of_rows_RH, of_bias_H = torch.autograd.grad(sums_TH, (rows_RH, bias_H), grad_TH)
    assert torch.equal(of_rows_RH, take_rows(grad_TH * 0.5, SOURCE_R, PLACE_TK))
    assert torch.equal(of_bias_H, grad_TH.sum(0))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shared", ["gated", "plain", ""])
def test_the_halves_are_the_whole(shared: str, dtype: torch.dtype) -> None:
    """The experts operator cut in two: the same kernels, so the same bits; gradients to a rounding more of each row."""
    x_TH, ids_TK, hosted_E, w13_EGIH, _ = first_half(dtype=dtype)
    weights_TK, w2_EHI = uniform(6, 2, seed=2), uniform(3, HIDDEN, WIDTH, seed=4, dtype=dtype)
    shared_w13_GIH = uniform(2, SHARED, HIDDEN, seed=5, dtype=dtype) if shared else None
    shared_w2_HI = uniform(HIDDEN, SHARED, seed=6, dtype=dtype) if shared else None
    gate_T1 = uniform(6, 1, seed=7) if shared == "gated" else None
    whole = experts(x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, shared_w13_GIH, shared_w2_HI, gate_T1,
                        "silu", "gelu")
    shared_act_TI = None
    if shared_w13_GIH is not None:
        everybody = torch.zeros(6, 1, dtype=torch.int64)
        shared_act_TI = act_rows(x_TH, everybody, everybody[0], shared_w13_GIH[None], "gelu")
    act_RI = act_rows(x_TH, ids_TK, hosted_E, w13_EGIH, "silu")
    halves = merged_down(act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, shared_act_TI, shared_w2_HI, gate_T1)
    assert torch.equal(whole, halves)


def test_rows_of_no_expert_are_zero() -> None:
    """What is gathered from other ranks must not hold what memory held before."""
    x_TH, ids_TK, hosted_E, *rest = first_half()
    act_RI = act_rows(x_TH, ids_TK, hosted_E, *rest)
    assert torch.equal(act_RI.any(1), torch.isin(ids_TK, hosted_E).flatten())


@pytest.mark.parametrize("num_hosts", [1, 3, 4])
def test_rows_in_the_order_of_their_hosts(num_hosts: int) -> None:
    """A stable sort by host; slots of no host stay behind; ends count them. More slots than one chunk or block."""
    generator = torch.Generator().manual_seed(num_hosts)
    host_TK = torch.randint(-1, num_hosts, (700, 3), generator=generator)
    slot_R, place_TK, ends_N = order_rows(host_TK, num_hosts)
    slots = torch.cat([(host_TK.flatten() == host).nonzero().flatten() for host in range(num_hosts)])
    assert torch.equal(slot_R, torch.cat([slots, torch.full((2100 - len(slots),), -1)]))
    place_R = torch.full((2100,), -1)
    place_R[slots] = torch.arange(len(slots))
    assert torch.equal(place_TK, place_R.view(700, 3))
    assert ends_N.tolist() == [int(((host_TK >= 0) & (host_TK <= host)).sum()) for host in range(num_hosts)]


@pytest.mark.parametrize("dtype", KINDS)
def test_rows_are_taken_and_added_up(dtype: torch.dtype) -> None:
    """By hand; a row without a token is zero, and so is a token without rows; a sum is rounded once."""
    x_TH = uniform(4, 2000, seed=1, dtype=dtype)
    rows_RH = take_rows(x_TH, SOURCE_R, PLACE_TK)
    assert torch.equal(rows_RH, torch.stack([x_TH[2], x_TH[0], torch.zeros_like(x_TH[0]), x_TH[2], x_TH[1]]))
    rows_RH = uniform(5, 2000, seed=2, dtype=dtype)
    sums_TH = sum_rows(rows_RH, SOURCE_R, PLACE_TK)
    pair_H = (rows_RH[0].float() + rows_RH[3].float()).to(dtype)
    assert torch.equal(sums_TH, torch.stack([rows_RH[1], rows_RH[4], pair_H, torch.zeros_like(pair_H)]))


def test_each_is_the_gradient_of_the_other() -> None:
    """sum(take(x) * g) == sum(x * sum_rows(g)), and the other way round."""
    x_TH, grad_RH = uniform(4, 5, seed=1).requires_grad_(), uniform(5, 5, seed=2).requires_grad_()
    (grad_x_TH,) = torch.autograd.grad(take_rows(x_TH, SOURCE_R, PLACE_TK), x_TH, grad_RH)
    assert torch.equal(grad_x_TH, sum_rows(grad_RH, SOURCE_R, PLACE_TK))
    (grad_rows_RH,) = torch.autograd.grad(sum_rows(grad_RH, SOURCE_R, PLACE_TK), grad_RH, x_TH)
    assert torch.equal(grad_rows_RH, take_rows(x_TH, SOURCE_R, PLACE_TK))


def test_torch_does_none_of_the_work_inside() -> None:
    """No product, sort or scatter of torch in any of them, forward or backward, and nothing that waits for the host."""
    with Forbid() as mode:
        grad_TH = merged_down._init_fn(*second_half())
        merged_down_backward._init_fn(grad_TH, *second_half())
        act_rows_backward._init_fn(act_rows._init_fn(*first_half()), *first_half())
        order_rows._init_fn(torch.tensor([[1, 0], [-1, 1]]), 2)
        sum_rows._init_fn(take_rows._init_fn(uniform(4, 3, seed=1), SOURCE_R, PLACE_TK), SOURCE_R, PLACE_TK)
    assert mode.seen["empty"] > 0
    assert mode.seen["_local_scalar_dense"] == 0


def test_wrong_arguments_are_refused() -> None:
    """Before any kernel starts, with what is there and what should be."""
    x_TH, ids_TK, hosted_E, w13_EGIH, activation = first_half()
    with pytest.raises(UsageValueError, match=r"w13_EGIH: shape \(3, 2, 9, 19\), but should be \(3, 2, 9, 20\)"):
        act_rows(x_TH, ids_TK, hosted_E, w13_EGIH[..., :19], activation)
    given = list(second_half())
    with pytest.raises(UsageValueError, match=r"act_RI: shape \(11, 9\), but should be \(12, 9\)"):
        merged_down(given[0][:11], *given[1:])
    with pytest.raises(UsageValueError, match="a shared expert needs the first two"):
        merged_down(*given[:6], None, None)
    with pytest.raises(UsageValueError, match=r"weights_TK are not given, but the form is 'silu weight_on_input=True'"):
        act_rows(x_TH, ids_TK, hosted_E, w13_EGIH, "silu weight_on_input=True")
    with pytest.raises(UsageTypeError, match=r"bias_H: dtype torch\.bfloat16, but should be torch\.float32"):
        sum_rows(x_TH[:5], SOURCE_R, PLACE_TK, x_TH[0].bfloat16())
    with pytest.raises(UsageTypeError, match="source_R: dtype"):
        take_rows(x_TH[:4], SOURCE_R.int(), PLACE_TK)
    with pytest.raises(UsageTypeError, match="host_TK: dtype"):
        order_rows(torch.zeros(2, 2), 2)


def test_second_derivatives_of_the_halves_are_refused() -> None:
    """Only first gradients are implemented."""
    for operator, given in ((act_rows, first_half()), (merged_down, second_half())):
        leaves = wanted(given)
        (slope,) = torch.autograd.grad(operator(*leaves).sum(), leaves[0], create_graph=True)
        with pytest.raises(UsageValueError, match="only first gradients"):
            slope.square().sum().backward()
