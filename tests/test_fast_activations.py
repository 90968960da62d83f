"""What stands between the two products of an expert, value by value: every form, its slopes, edges and NaN.

The products of moe_fast::act_rows are made to pass gate and up through as they are, so that its rows are the formula
alone; the truth is moe_ref.oracle in fp64.
"""

import math
from dataclasses import replace

import pytest
import torch

from moe_fast.form import Form, form_of, parse_form
from moe_fast.operators.act_rows import act_rows, act_rows_backward
from moe_ref import MLP, MoESpec, Router
from moe_ref.contract.errors import UsageValueError
from moe_ref.oracle.backward.mlp import activate_backward
from moe_ref.oracle.expert import activate

MLPS = {
    "silu": MLP(), "gelu": MLP(activation="gelu"), "gelu_tanh": MLP(activation="gelu_tanh"),
    "relu": MLP(activation="relu"), "relu_squared": MLP(activation="relu_squared"),
    "silu, one projection": MLP(gated=False), "limit, one projection": MLP(gated=False, limit=0.5),
    "relu_squared, one projection": MLP(activation="relu_squared", gated=False),
    "gpt-oss": MLP(limit=7.0, sigmoid_scale=1.702, up_offset=1.0), "limit": MLP(activation="gelu", limit=0.75),
    "limit after": MLP(limit=1.5, limit_at="after"),
    "softcaps": MLP(gate_softcap=1.25, up_softcap=2.5, sigmoid_scale=1.5, up_offset=0.5),
}
ROUNDINGS = 64
"""Of 2^-24 each: three functions of at most 4 ulp, and what their arguments of up to 21 lose before them."""


def projections(mlp: MLP) -> torch.Tensor:
    """Pairs of gate and up, (R, G, 1): from far below to far above every limit, dense around 0, and the limits."""
    edges = [sign * limit for limit in (0.5, 0.75, 1.5, 7.0) for sign in (-1, 1)]
    line = torch.cat([torch.linspace(-12, 12, 97), torch.linspace(-2**-6, 2**-6, 9), torch.tensor(edges)])
    gate, up = torch.meshgrid(line, line[::5], indexing="ij")
    return torch.stack([gate.flatten(), up.flatten()][:mlp.num_projections], 1)[:, :, None]


def through(gate_up_RGI: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Arguments of act_rows whose products are gate_up_RGI: every token is a row, and holds its gate and up."""
    num_rows, num_parts, _ = gate_up_RGI.shape
    ids_T1 = torch.zeros(num_rows, 1, dtype=torch.int64)
    return gate_up_RGI[:, :, 0], ids_T1, ids_T1[0], torch.eye(num_parts)[None, :, None]


def allowed(truth: torch.Tensor, gate_up_RGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """Relative to the result and 2^-10; of 1 + erf, which cancels for negative gates, to its other factors."""
    size = truth.abs() + 2**-10
    if mlp.activation == "gelu":
        size = size + (gate_up_RGI.abs() + 1).prod(1)
    return ROUNDINGS * 2**-24 * size


def excess(found: torch.Tensor, mlp: MLP, gate_up_RGI: torch.Tensor) -> float:
    """Largest error of the activation over what is allowed."""
    truth = activate(gate_up_RGI.double(), mlp)
    return float(((found.double() - truth).abs() / allowed(truth, gate_up_RGI, mlp)).max())


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("name", MLPS)
def test_every_form(name: str) -> None:
    """To a few units in the last place, also where tanh is small and where a sigmoid vanishes."""
    mlp = MLPS[name]
    given = projections(mlp)
    assert excess(act_rows(*through(given), form_of(mlp)), mlp, given) <= 1


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("name", MLPS)
def test_every_slope(name: str) -> None:
    """The rows' gradient is slope times identity; the edge of a limit passes, and relu has slope 0 at 0.

    Slopes change their sign, so the bound is relative to the factors of what is added up.
    """
    mlp = MLPS[name]
    given = projections(mlp)
    grad_x_RG, *_ = act_rows_backward(torch.ones(len(given), 1), *through(given), form_of(mlp))
    truth = activate_backward(torch.ones(len(given), 1, dtype=torch.float64), given.double(), mlp)[:, :, 0]
    size = truth.abs() + (given[:, :, 0].abs() + 1).prod(1, keepdim=True) / 16
    assert float(((grad_x_RG.double() - truth).abs() / size).max()) <= ROUNDINGS * 2**-24
    if not mlp.activation.startswith("gelu"):  # those underflow
        assert torch.equal(grad_x_RG == 0, truth == 0)


WRONG = {
    "limit": {"limit": 1.75}, "limit_at": {"limit_at": "after"}, "sigmoid_scale": {"sigmoid_scale": 1.7},
    "up_offset": {"up_offset": 0.0}, "activation": {"activation": "gelu", "sigmoid_scale": 1.0},
}


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_option_is_seen(option: str) -> None:
    """The comparison notices every option of gpt-oss that another value took the place of."""
    mlp = replace(MLPS["gpt-oss"], limit=1.5)
    given = projections(mlp)
    assert excess(act_rows(*through(given), form_of(replace(mlp, **WRONG[option]))), mlp, given) > 100


def test_a_softcap_of_small_numbers_is_seen() -> None:
    """2 sigmoid(2z) - 1 cancels near 0: as a tanh it would be outside."""
    mlp = MLPS["softcaps"]
    given = projections(mlp)[:, :, 0]
    gate, up = given.unbind(1)

    def coarse(value: torch.Tensor, cap: float) -> torch.Tensor:
        return cap * (2 * torch.sigmoid(2 * value / cap) - 1)

    found = coarse(gate, 1.25) * torch.sigmoid(1.5 * gate) * (coarse(up, 2.5) + 0.5)
    assert excess(found[:, None], mlp, projections(mlp)) > 1


@pytest.mark.parametrize("name", MLPS)
def test_no_form_swallows_a_nan(name: str) -> None:
    """Of gate or of up, by a bias: a comparison that is false for NaN must not make a limit or a zero of it."""
    for part in range(num_parts := MLPS[name].num_projections):
        bias_EGI = torch.ones(1, num_parts, 1)
        bias_EGI[0, part] = math.nan
        given = through(torch.zeros(3, num_parts, 1))
        assert act_rows(*given, form_of(MLPS[name]), None, bias_EGI).isnan().all()


@pytest.mark.parametrize("name", MLPS)
def test_words_are_read_as_they_are_written(name: str) -> None:
    """Every option of an MLP reaches the kernel, defaults without a word."""
    mlp = MLPS[name]
    form = parse_form(form_of(mlp))
    shared = [field for field in vars(Form()) if field != "weight_on_input"]
    assert {field: getattr(form, field) for field in shared} == {field: getattr(mlp, field) for field in shared}
    assert form_of(MLP(activation=mlp.activation)) == mlp.activation


@pytest.mark.parametrize(("words", "message"), [
    ("", "activation='', but should be one of silu"), ("silu cap=1.0", "'cap', but should be one of gated"),
    ("silu limit=inf", "limit='inf', but should be a number"),
    ("silu gated=0", "gated='0', but should be True or False"),
    ("relu limit_at=never limit=x", "limit_at='never', but should be before or after; limit='x'")])
def test_words_that_mean_nothing_are_refused(words: str, message: str) -> None:
    """With what is there and what should be."""
    with pytest.raises(UsageValueError, match=message):
        parse_form(words)


def test_every_option_is_covered_by_a_test() -> None:
    """A new option of an MLP has to be computed, or refused, before it can be declared."""
    spec = MoESpec(hidden_size=4, intermediate_size=4, router=Router(num_experts=2, top_k=1), weight_on="input")
    options = {field for field in vars(spec.experts) if field != "bias"}
    assert options | {"weight_on_input"} == set(vars(Form()))
    for option in options - {"activation", "limit_at"}:
        assert any(getattr(mlp, option) != getattr(MLP(), option) for mlp in MLPS.values()), option
