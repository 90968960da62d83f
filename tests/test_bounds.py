"""Protects the rounding model: right low-precision computations never exceed it, and named faults do.

Layers are emulated in fp32 with one order of summation after another and judged by the harness's own
measurement. `python -m tests.test_bounds` prints the table of docs/bounds.md: which fault is seen up to which K.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Data, Dtype, Format, Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.build import GeneratedWeights, Inputs, build_inputs
from moe_ref.oracle import expert as formula
from moe_ref.records.schema import from_number
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.activation import SLOPE, activated
from moe_ref.verify.bounds.rounding import FLUSH, RoundingModel, gamma
from moe_ref.verify.bounds.rows import exact
from moe_ref.verify.measure.stages import measure

SHOWN = (Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED)
BLOCK = 64

Order = Callable[[torch.Tensor], torch.Tensor]
"""A sum over dimension 0 of (K, R, N) fp32 products, rounding to fp32 after every addition."""


def sequential(products: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(products[0])
    for product in products:
        total = total + product
    return total


def backwards(products: torch.Tensor) -> torch.Tensor:
    return sequential(products.flip(0))


def pairwise(products: torch.Tensor) -> torch.Tensor:
    while len(products) > 1:
        rest = products[-1:] if len(products) % 2 else products[:0]
        products = torch.cat([products[:-1:2] + products[1::2], rest])
    return products[0]


def blocks(products: torch.Tensor, size: int) -> torch.Tensor:
    """Sums of consecutive blocks, (number of blocks, R, N), each sequential."""
    return sequential(products.unflatten(0, (-1, size)).transpose(0, 1))


def blocked(products: torch.Tensor) -> torch.Tensor:
    return sequential(blocks(products, BLOCK))


def split_k(products: torch.Tensor) -> torch.Tensor:
    return sequential(blocks(products, len(products) // 8).flip(0))


def permuted(products: torch.Tensor) -> torch.Tensor:
    return sequential(products[torch.randperm(len(products), generator=torch.Generator().manual_seed(3))])


Operand = Callable[[torch.Tensor], torch.Tensor]
"""What happens to both operands of a product, fp32 afterwards."""

ORDERS: dict[str, Order] = {order.__name__: order for order in (sequential, backwards, pairwise, blocked, split_k,
                                                                permuted)}


def bf16_accumulated(products: torch.Tensor) -> torch.Tensor:
    """The fault: the running total is rounded to bf16 after every block of 64."""
    total = torch.zeros_like(products[0])
    for part in blocks(products, BLOCK):
        total = (total + part).bfloat16().float()
    return total


def tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to 11 significant bits, as the tensor core's tf32 operands are."""
    return ((tensor.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 cut off to bf16 instead of rounded; other formats are rounded."""
    if dtype != torch.bfloat16:
        return tensor.to(dtype)
    return (tensor.view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)


@dataclass(frozen=True)
class Emulation:
    """A layer in fp32: how it sums, what it does to operands, how it stores, and what is wrong with it."""

    order: Order = blocked
    order_down: Order | None = None
    operand: Operand = torch.Tensor.float
    operand_down: Operand = torch.Tensor.float
    store: Callable[[torch.Tensor, torch.dtype], torch.Tensor] = torch.Tensor.to
    drop_up: bool = False
    drop_down: bool = False
    swap: bool = False
    activation: str = ""
    weight: float = 1.0

    def product(self, a_RK: torch.Tensor, b_NK: torch.Tensor, drop: bool, order: Order,
                operand: Operand) -> torch.Tensor:
        a_RK, b_NK = operand(a_RK), operand(b_NK)
        if drop:
            a_RK = torch.cat([a_RK[:, :-BLOCK], torch.zeros_like(a_RK[:, -BLOCK:])], dim=1)
        return order((a_RK.T[:, :, None] * b_NK.T[:, None, :]).contiguous())

    def expert(self, x_RH: torch.Tensor, weights: ExpertWeights, weight_R1: torch.Tensor,
               mlp: MLP) -> tuple[torch.Tensor, torch.Tensor]:
        """act and down of one expert, each stored once in x's dtype."""
        gate_up = torch.stack([self.product(x_RH, w_IH, self.drop_up, self.order, self.operand)
                               for w_IH in weights.w13_GIH], 1)
        if weights.w13_bias_GI is not None:
            gate_up = gate_up + weights.w13_bias_GI.float()
        mlp = replace(mlp, activation=self.activation or mlp.activation)  # pyrefly: ignore
        act_RI = self.store(formula.activate(gate_up.flip(1) if self.swap else gate_up, mlp), x_RH.dtype)
        down_RH = self.product(act_RI, weights.w2_HI, self.drop_down, self.order_down or self.order,
                               self.operand_down)
        if weights.w2_bias_H is not None:
            down_RH = down_RH + weights.w2_bias_H.float()
        return act_RI, self.store(down_RH * (weight_R1 * self.weight), x_RH.dtype)

    def run(self, inputs: Inputs) -> list[dict[Stage, torch.Tensor]]:
        """What a single rank shows; routing comes from injected logits, fp32."""
        spec, x_TH = inputs.problem.spec, inputs.x_TH
        ids_TK = torch.sort(inputs.logits_TE, dim=-1, descending=True, stable=True).indices[:, :spec.top_k]
        weights_TK = torch.softmax(inputs.logits_TE, dim=-1).gather(1, ids_TK)
        act = torch.zeros(ids_TK.numel(), spec.intermediate_size, dtype=x_TH.dtype)
        down = torch.zeros(ids_TK.numel(), spec.hidden_size, dtype=x_TH.dtype)
        for e in range(spec.num_experts):
            token_R, slot_R = (ids_TK == e).nonzero(as_tuple=True)
            row_R = token_R * spec.top_k + slot_R
            act[row_R], down[row_R] = self.expert(x_TH[token_R], inputs.weights.expert(e),
                                                  weights_TK[token_R, slot_R, None], spec.experts)
        merged = self.store(sequential(down.float().unflatten(0, (-1, spec.top_k)).transpose(0, 1)), x_TH.dtype)
        return [{Stage.LOGITS: inputs.logits_TE, Stage.IDS: ids_TK, Stage.WEIGHTS: weights_TK, Stage.ACT: act,
                 Stage.DOWN: down, Stage.MERGED: merged, Stage.REDUCED: merged}]


class PositiveWeights(GeneratedWeights):
    """All weights positive: no cancellation, sums as large as the gauge."""

    def expert(self, e: int) -> ExpertWeights:
        return ExpertWeights(*(tensor.abs() for tensor in super().expert(e)[:2]))


def layer(size: int, axis: str, dtype: Dtype, data: str = "unit", seed: int = 1,
          words: str = "") -> tuple[Case, Inputs]:
    """Four tokens, two experts; K = size terms in the up products (axis H) or in the down products (axis I)."""
    widths = f"H{size}.I64" if axis == "H" else f"H64.I{size}"
    word = f"-{data}" if data in (Data.OUTLIER, Data.LARGE) else ""
    case = parse_case(f"v1-T4.{widths}.E4.K2-{dtype}{words}-zipf{word}-s{seed}")
    inputs = build_inputs(case.problem)
    if data == "positive":
        inputs = replace(inputs, x_TH=inputs.x_TH.abs(), weights=PositiveWeights(case.problem))
    return case, inputs


def ratios(case: Case, inputs: Inputs, emulation: Emulation, device: str = "cpu") -> dict[str, float]:
    """error / allowed of every stage, as the harness measures it."""
    stored = Format(case.problem.dtype.value)
    rows = dict.fromkeys((Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED), stored)
    numerics = Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **rows}, reduce=stored)
    capabilities = Capabilities(name="emulation", version="0", numerics={case.problem.dtype: numerics}, stages=SHOWN)
    measurement = measure(case, inputs, emulation.run(inputs), capabilities,
                          RoundingModel(load_tolerances(), device, Format.FP32))
    assert measurement.struct_faults == ()
    return {stage.stage: from_number(stage.ratio) for stage in measurement.stages}


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("data", ["unit", "outlier", "positive"])
@pytest.mark.parametrize(("size", "orders"), [(64, list(ORDERS)), (1024, list(ORDERS)),
                                              (8192, ["sequential", "permuted"])], ids=["64", "1024", "8192"])
def test_right_computations_stay_inside(size: int, orders: list[str], data: str, dtype: Dtype) -> None:
    """Every stage and the whole layer, in any order of summation: not one element above 1."""
    for seed, name in enumerate(orders, 1):
        for axis in ("H", "I") if size < 8192 else ("HI"[seed % 2],):
            found = ratios(*layer(size, axis, dtype, data, seed), Emulation(order=ORDERS[name]))
            assert max(found.values()) <= 1.0, (name, axis, found)


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("size", [64, 2048])
@pytest.mark.parametrize("words", ["-relu", "-relu2-nogate", "-gelutanh-nogate", "-limit1-alpha1.702-up1",
                                   "-limit1-limitafter", "-gatecap2-upcap2", "-relu2-mlpbias-upm0.5"])
def test_right_computations_of_every_option_stay_inside(words: str, size: int, dtype: Dtype) -> None:
    """Activations, clamps, caps and biases behind short and long sums, values beyond the clamps among them."""
    for axis, data, order in (("H", "unit", permuted), ("H", "large", sequential), ("I", "unit", blocked)):
        found = ratios(*layer(size, axis, dtype, data, 1, words), Emulation(order=order))
        assert max(found.values()) <= 1.0, (axis, data, found)


def tensor_core(a_MK: torch.Tensor, b_NK: torch.Tensor, products: int, kept: int) -> torch.Tensor:
    """Truncating fused dot-add, in fp64: MMA-Sim (arXiv 2511.10909).

    Every addend, the accumulator among them, is cut to `kept` bits below the largest exponent; the exact sum
    is cut to 24 significant bits.
    """
    total = torch.zeros(len(a_MK), len(b_NK), dtype=torch.float64)
    for k in range(0, a_MK.shape[1], products):
        addends = torch.cat([a_MK[:, None, k:k + products] * b_NK[None, :, k:k + products], total[..., None]], -1)
        exponent = torch.frexp(addends).exponent.where(addends != 0, torch.tensor(-2000)).amax(-1, keepdim=True) - 1
        step = torch.exp2(exponent.double() - kept)
        cut = (torch.trunc(addends / step) * step).sum(-1)
        last = torch.exp2(torch.frexp(cut).exponent.double() - 24)
        total = torch.trunc(cut / last) * last
    return total


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("hardware", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("data", ["unit", "outlier", "positive", "alternating"])
@pytest.mark.parametrize("size", [1, 2, 3, 9, 17, 64, 1024, 4096])
def test_tensor_cores_stay_inside_their_factor(size: int, data: str, hardware: str) -> None:
    """Truncation errs to one side and grows with K; the factor of the class holds it, tails of a step too."""
    _, inputs = layer(4096, "H", Dtype.BF16, data if data != "alternating" else "positive")
    a, b = inputs.x_TH[:, :size].double(), inputs.weights.expert(0).w13_GIH[0, :, :size].double()
    if data == "alternating":
        a = a * torch.tensor([1.0, -1.0]).repeat(2048)[:size]
    model = RoundingModel(load_tolerances(), hardware, Format.FP32)
    entry = load_tolerances().file.hardware[hardware]
    error = (tensor_core(a, b, entry.products_per_step, entry.kept_bits) - a @ b.T).abs()
    assert (error <= model.summed(a.abs() @ b.abs().T, size)).all()


@pytest.mark.parametrize("stored", [Format.FP16, Format.BF16])
def test_rounding_is_bounded_exactly(stored: Format) -> None:
    """All numbers of the format and all midpoints: the error of a midpoint IS the bound, of a number it is 0.

    Beyond that FLUSH is added, which counts only where subnormals may be flushed to zero.
    """
    dtype = TORCH_DTYPES[stored]
    infinity = torch.tensor(torch.inf, dtype=dtype).view(torch.int16).item()
    every = torch.arange(0, infinity, dtype=torch.int16).view(dtype)
    numbers = every.double()
    middles = (numbers[1:] + numbers[:-1]) / 2
    model = RoundingModel(load_tolerances(), "cpu", Format.FP32)
    for signed in (middles, -middles):
        error = (signed - signed.to(dtype).double()).abs()
        assert torch.equal(model.rounded(middles, stored), error + FLUSH)
    assert torch.equal(numbers.to(dtype).double(), numbers)
    assert numbers[0] == 0.0
    assert model.rounded(numbers[:1], stored) == (middles[0] + FLUSH)
    # Anything between a number and a midpoint is nearer than the bound.
    inside = ((numbers[:-1] + 3 * numbers[1:]) / 4).float().double()
    assert ((inside - inside.to(dtype).double()).abs() <= model.rounded(inside, stored)).all()


def test_rounding_to_fp32_is_bounded() -> None:
    """Random fp64 numbers of all sizes down to subnormals, and midpoints of neighbours."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-150, 127, (20000,), generator=generator).double()
    numbers = (1 + torch.rand(20000, generator=generator, dtype=torch.float64)) * torch.exp2(exponents)
    model = RoundingModel(load_tolerances(), "cpu", Format.FP32)
    assert ((numbers - numbers.float().double()).abs() <= model.rounded(numbers, Format.FP32)).all()
    low = numbers.float()
    middles = (low.double() + torch.nextafter(low, torch.tensor(torch.inf)).double()) / 2
    error = (middles - middles.float().double()).abs()
    assert torch.equal(model.rounded(middles, Format.FP32), error + FLUSH)


def test_rounding_of_what_is_not_a_number_or_not_stored() -> None:
    """Registers do not round; of inf and NaN nothing is claimed."""
    model = RoundingModel(load_tolerances(), "cpu", Format.FP32)
    odd = torch.tensor([torch.inf, torch.nan], dtype=torch.float64)
    assert torch.equal(model.rounded(odd, Format.BF16), torch.full((2,), torch.inf, dtype=torch.float64))
    assert torch.equal(model.rounded(torch.ones(2), None), torch.zeros(2))


@pytest.mark.parametrize(("activation", "options"), [
    *((name, {}) for name in SLOPE), ("silu", {"sigmoid_scale": 1.702}), ("silu", {"sigmoid_scale": 0.3}),
    ("silu", {"gate_softcap": 30.0}), ("silu", {"gate_softcap": 2.0}),
    ("silu", {"gate_softcap": 0.5, "sigmoid_scale": 3.0}),
], ids=str)
def test_slopes_are_the_largest(activation: str, options: dict[str, float]) -> None:
    """By autograd in fp64 on a fine grid; without a cap the constant is no more than 1 % above."""
    gate = torch.linspace(-20, 20, 400001, dtype=torch.float64, requires_grad=True)
    formula.activation(gate, MLP(activation=activation, **options)).sum().backward()
    steepest = float(gate.grad.abs().max())
    assert steepest <= SLOPE[activation]
    assert SLOPE[activation] < 1.01 * steepest or "gate_softcap" in options


FORMS = {
    "silu": [lambda g: g * torch.sigmoid(g), lambda g: g / (1 + torch.exp(-g)),
             lambda g: torch.nn.functional.silu(g)],
    "gelu": [lambda g: 0.5 * g * (1 + torch.erf(g * 0.7071067811865476)), lambda g: torch.nn.functional.gelu(g)],
    "gelu_tanh": [lambda g: g * torch.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)),
                  lambda g: torch.nn.functional.gelu(g, approximate="tanh")],
}


def activation_ratio(activation: str, low: float, high: float) -> float:
    """Largest error / allowed of all fp32 forms of an activation times up, on a grid of gates."""
    gate = torch.linspace(low, high, 20001)
    up = torch.tensor([2.0**-20, -0.7, 1.0, 3.3, 900.0])[:, None]
    model = RoundingModel(load_tolerances(), "cpu", Format.FP32)
    gate_up = torch.stack(torch.broadcast_tensors(gate.double(), up.double()), 1)
    want = activated(model, exact(gate_up), MLP(activation=activation), None)
    return max(float(((form(gate) * up).double() - want.value).abs().div(want.bound).max())
               for form in FORMS[activation])


@pytest.mark.parametrize("activation", list(FORMS))
def test_activations_in_fp32_stay_inside(activation: str) -> None:
    """Every usual way to write them, gates from -80 to 80 and ups from 2^-20 to 900."""
    assert activation_ratio(activation, -80.0, 80.0) <= 1.0


@pytest.mark.parametrize("activation", list(FORMS))
def test_activations_stay_inside_where_exp_overflows(activation: str) -> None:
    """exp(89) is infinite in fp32, so g / (1 + exp(-g)) is 0 where the value is still 2e-37; that is right."""
    assert activation_ratio(activation, -130.0, -80.0) <= 1.0


def test_gamma_refuses_sums_without_a_bound() -> None:
    """n u must stay below 1: bf16 accumulation of 256 terms has no bound at all."""
    assert gamma(4, 2.0**-8) == (4 / 256) / (1 - 4 / 256)
    assert math.isfinite(gamma(255, 2.0**-8))
    with pytest.raises(OverflowError, match="256 terms"):
        gamma(256, 2.0**-8)


FAULTS: dict[str, tuple[str, Emulation]] = {
    "gate and up swapped": ("H", Emulation(swap=True)),
    "gelu instead of silu": ("H", Emulation(activation="gelu")),
    "64 terms of gate and up dropped": ("H", Emulation(drop_up=True)),
    "64 terms of down dropped": ("I", Emulation(drop_down=True)),
    "gate and up accumulated in bf16": ("H", Emulation(order=bf16_accumulated, order_down=blocked)),
    "down accumulated in bf16": ("I", Emulation(order_down=bf16_accumulated)),
    "tf32 operands of gate and up": ("H", Emulation(operand=tf32)),
    "tf32 operands of down": ("I", Emulation(operand_down=tf32)),
    "rows cut off to bf16, not rounded": ("H", Emulation(store=truncated)),
    "weight off by 2^-8": ("I", Emulation(weight=1 + 2.0**-8)),
}
"""Each fault on the axis whose length is K."""

SIZES = (64, 256, 1024, 4096, 16384)
UNCHANGED = {("tf32 operands of gate and up", Dtype.BF16), ("tf32 operands of down", Dtype.BF16),
             ("rows cut off to bf16, not rounded", Dtype.FP32)}
"""Pairs in which the fault changes nothing: bf16 operands are tf32 numbers, and fp32 rows are not cut."""


def detection(name: str, size: int, dtype: Dtype) -> tuple[str, float]:
    """First stage above the bound and its ratio; without one, the largest ratio."""
    axis, emulation = FAULTS[name]
    found = ratios(*layer(size, axis, dtype), emulation)
    order = [stage for stage in Stage if stage in found]
    stage = next((stage for stage in order if found[stage] > 1), max(order, key=lambda stage: found[stage]))
    return stage, found[stage]


def table() -> list[str]:
    """The table of docs/bounds.md: first stage and error / allowed; at most 1 means that the fault is not seen."""
    heads = " | ".join(f"K = {size}" for size in SIZES)
    lines = [f"| fault | dtype | {heads} |", "|---|---|" + "---|" * len(SIZES)]
    for name in FAULTS:
        for dtype in (Dtype.FP32, Dtype.BF16):
            if (name, dtype) not in UNCHANGED:
                cells = (f"{stage} {ratio:.2g}" for stage, ratio in (detection(name, size, dtype) for size in SIZES))
                lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    return lines


def test_the_table_of_detection_is_what_the_document_says() -> None:
    """docs/bounds.md is honest: it lists the same faults, and each is seen or missed as it says."""
    document = (Path(__file__).resolve().parents[1] / "docs" / "bounds.md").read_text().splitlines()
    heading, _, *rows = table()
    assert heading in document
    for line in rows:
        mine = [cell.strip() for cell in line.split("|")[1:-1]]
        theirs = [row for row in document if row.startswith(f"| {mine[0]} | {mine[1]} |")]
        assert len(theirs) == 1, f"docs/bounds.md has {len(theirs)} rows for {mine[:2]}"
        for one, other in zip(mine[2:], (cell.strip() for cell in theirs[0].split("|")[3:-1]), strict=True):
            assert (float(one.split()[-1]) > 1) is (float(other.split()[-1]) > 1), (line, theirs[0])


if __name__ == "__main__":
    print("\n".join(table()))
