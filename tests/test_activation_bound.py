"""Protects the bound of the activation: its clamps, caps, offsets, and formats that round every step inside.

Two kinds of proof by example: inputs moved anywhere inside their errors stay inside the bound, and so does every
evaluation that rounds each of its steps.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Format
from moe_ref.oracle import expert as formula
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.activation import activated
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact

MODEL = RoundingModel(load_tolerances(), "cpu", Format.FP32)

MLPS = {
    "silu": MLP(), "gelu": MLP(activation="gelu"), "gelu_tanh": MLP(activation="gelu_tanh"),
    "relu": MLP(activation="relu"), "relu2": MLP(activation="relu_squared"),
    "relu2 not gated": MLP(activation="relu_squared", gated=False), "silu not gated": MLP(gated=False),
    "gpt-oss": MLP(limit=7.0, sigmoid_scale=1.702, up_offset=1.0), "limit": MLP(limit=1.3),
    "limit after": MLP(limit=1.3, limit_at="after"), "relu2 limit": MLP(activation="relu_squared", limit=0.7),
    "caps": MLP(gate_softcap=2.0, up_softcap=1.5), "wide caps": MLP(gate_softcap=30.0, up_softcap=30.0),
    "offset": MLP(activation="gelu", up_offset=-0.3), "scaled": MLP(sigmoid_scale=0.5),
}


def grid(low: float, high: float) -> torch.Tensor:
    """(R, 2, I): gates on a fine grid against ups of several sizes and both signs."""
    gate = torch.linspace(low, high, 4001, dtype=torch.float64)[:, None]
    up = torch.tensor([2.0**-20, -0.7, 1.0, 1.31, -3.3, 60.0], dtype=torch.float64)
    return torch.stack(torch.broadcast_tensors(gate, up), 1)


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("error", [1e-7, 0.01, 0.5, 4.0])
def test_errors_of_gate_and_up_stay_inside(name: str, error: float) -> None:
    """All corners of the box of errors and points between, across every clamp."""
    mlp, gate_up = MLPS[name], grid(-12.0, 12.0)
    want = activated(MODEL, Rows(gate_up, torch.full_like(gate_up, error)), mlp, None)
    for gate_step in (-1.0, -0.5, 0.0, 0.3, 1.0):
        for up_step in (-1.0, 0.4, 1.0):
            moved = gate_up + error * torch.tensor([gate_step, up_step], dtype=torch.float64)[None, :, None]
            assert ((formula.activate(moved, mlp) - want.value).abs() <= want.bound).all(), (gate_step, up_step)


def test_the_bound_is_no_larger_than_it_must_be() -> None:
    """relu(gate) * up moves by exactly d_gate |up| + gate d_up + d_gate d_up in the worst corner."""
    gate_up = torch.tensor([[[2.0], [3.0]]], dtype=torch.float64)
    bound = activated(MODEL, Rows(gate_up, torch.full_like(gate_up, 0.25)), MLP(activation="relu"), None).bound
    assert 2.25 * 3.25 - 6.0 <= float(bound) < 1.001 * (2.25 * 3.25 - 6.0)


@pytest.mark.parametrize("mlp", [MLP(limit=1.0), MLP(activation="gelu", limit=1.0, limit_at="after")])
def test_beyond_a_clamp_errors_are_forgotten(mlp: MLP) -> None:
    """Gate and up clear of the clamp: nothing of their errors is left but the rounding."""
    gate_up = torch.tensor([[[9.0], [-9.0]]], dtype=torch.float64)
    wide, none = (activated(MODEL, Rows(gate_up, torch.full_like(gate_up, error)), mlp, None).bound
                  for error in (1.0, 0.0))
    assert float(wide) < 2 * float(none) + 1.2 * (mlp.limit_at == "after") * 1e-3


Step = Callable[[torch.Tensor], torch.Tensor]


def stepwise(gate_up: torch.Tensor, mlp: MLP, step: Step) -> torch.Tensor:
    """The activation with every elementwise result passed through `step`, which rounds it."""
    gate, limit = step(gate_up[:, 0]), None if mlp.limit is None else step(torch.tensor(mlp.limit))
    if limit is not None and mlp.limit_at == "before":
        gate = torch.minimum(gate, limit)
    act = activation_by_steps(gate, mlp, step)
    if limit is not None and mlp.limit_at == "after":
        act = torch.minimum(act, limit)
    if not mlp.gated:
        return act
    up = step(gate_up[:, 1])
    if limit is not None:
        up = torch.maximum(torch.minimum(up, limit), -limit)
    if mlp.up_softcap:
        up = softcap_by_steps(up, mlp.up_softcap, step)
    if mlp.up_offset:
        up = step(up + mlp.up_offset)
    return step(act * up)


def activation_by_steps(gate: torch.Tensor, mlp: MLP, step: Step) -> torch.Tensor:
    """Written with as many steps as anyone writes it."""
    if mlp.activation == "silu":
        factor = softcap_by_steps(gate, mlp.gate_softcap, step) if mlp.gate_softcap else gate
        return step(factor * step(torch.sigmoid(step(gate * mlp.sigmoid_scale))))
    if mlp.activation == "gelu":
        return step(step(0.5 * gate) * step(1 + step(torch.erf(step(gate * 0.7071067811865476)))))
    if mlp.activation == "gelu_tanh":
        cubed = step(0.044715 * step(gate**3))
        return step(step(0.5 * gate) * step(1 + step(torch.tanh(step(0.7978845608028654 * step(gate + cubed))))))
    relu = torch.relu(gate)
    return relu if mlp.activation == "relu" else step(relu * relu)


def softcap_by_steps(value: torch.Tensor, cap: float, step: Step) -> torch.Tensor:
    return step(cap * step(torch.tanh(step(value / cap))))


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("inner", [Format.BF16, Format.FP16, Format.FP32])
def test_steps_rounded_to_a_format_stay_inside(name: str, inner: Format) -> None:
    """Every step computed in fp32 and rounded; where a format overflows nothing is claimed."""
    mlp, dtype = MLPS[name], TORCH_DTYPES[inner]
    gate_up = grid(-60.0, 60.0).float()
    got = stepwise(gate_up, mlp, lambda value: value.float().to(dtype).float()).double()
    want = activated(MODEL, exact(gate_up), mlp, None if inner is Format.FP32 else inner)
    judged = torch.isfinite(want.bound)
    assert judged.double().mean() > 0.5
    assert ((got - want.value).abs() <= want.bound)[judged].all()


@pytest.mark.parametrize("name", ["caps", "wide caps"])
def test_a_softcap_made_of_a_sigmoid_stays_inside(name: str) -> None:
    """2 sigmoid(2 x) - 1 cancels near zero: its error is absolute in the cap, and right all the same."""
    mlp, gate_up = MLPS[name], grid(-20.0, 20.0).float()

    def cap(value: torch.Tensor, limit: float) -> torch.Tensor:
        return limit * (2 * torch.sigmoid(2 * (value / limit)) - 1)

    got = cap(gate_up[:, 0], mlp.gate_softcap) * torch.sigmoid(gate_up[:, 0]) * cap(gate_up[:, 1], mlp.up_softcap)
    want = activated(MODEL, exact(gate_up), mlp, None)
    assert ((got.double() - want.value).abs() <= want.bound).all()


def test_a_coarse_format_allows_what_fp32_does_not() -> None:
    """gelu in bf16 steps: refused under fp32 evaluation, accepted where the contract says bf16."""
    gate_up = grid(-6.0, 6.0).float()
    got = F.gelu(gate_up[:, 0].bfloat16()).float() * gate_up[:, 1]
    fine, coarse = (activated(MODEL, exact(gate_up), MLPS["gelu"], inner) for inner in (None, Format.BF16))
    assert not ((got.double() - fine.value).abs() <= fine.bound).all()
    assert ((got.double() - coarse.value).abs() <= coarse.bound).all()
