"""Protects the exact data: proven in integers that any order of summation is exact, so one wrong bit is a defect."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from itertools import cycle, product
from types import SimpleNamespace

import pytest
import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case import Problem
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.exact import LARGEST_HIDDEN, SLOT_WEIGHTS, STORED_LIMIT, UNIT, down_terms
from moe_ref.contract.features import Feature
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage, Verdict
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.build import build_inputs
from moe_ref.simulated import subjects as simulated
from moe_ref.tiers.tiers import tier
from tests.in_process import judged, verdict
from tests.subjects import right, wrong
from tests.subjects.base import Call, TorchMoE
from tests.subjects.mistaken_parallel import WRONG
from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_variants import RIGHT

GATES = {"relu_squared": (8, 16)}
"""Of all other activations 64 and 128."""


DIGESTS = {"T33.H96.I160.E8.K2-bf16-norm-sh83-res-exact": "bbb81ab5f09fca7d",
           "T40.H72.I90-fp32-relu2-exact": "e70fa1ae124ab4c9"}
"""Never edited: a record of another machine or year is about these bits."""


def problem(text: str) -> Problem:
    """The problem of an id."""
    return parse_case(f"v1-{text}").problem


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in fp64, where sums of integers are exact up to 2^53; they must be integers that bf16 holds."""
    whole = tensor.double()
    assert torch.equal(whole, tensor.bfloat16().double())
    assert torch.equal(whole, whole.round())
    return whole


def gates_and_ups(x_TH: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
    """(T, G, I); no sum of absolute products, so no partial sum of any order, reaches 2^23.

    With 23 bits below the leading one, fixed-point accumulators that truncate what they align keep them all too.
    """
    w13_NH, shape = integers(expert.w13_GIH).flatten(0, 1), expert.w13_GIH.shape[:2]
    assert float((x_TH.abs() @ w13_NH.abs().T).max()) < 2**23
    return (x_TH @ w13_NH.T).unflatten(1, shape)


def activated(gate_up_TGI: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """(T, I) in units of UNIT; gates and ups must be those in whose region the activation is exact."""
    gate_TI = gate_up_TGI[:, 0]
    assert set(gate_TI.unique().tolist()) <= set(GATES.get(mlp.activation, (64, 128)))
    act_TI = gate_TI**2 if mlp.activation == "relu_squared" else gate_TI
    if mlp.gated:
        assert set(gate_up_TGI[:, 1].unique().tolist()) <= {-1, 1}
        act_TI = act_TI * gate_up_TGI[:, 1]
    assert bool((act_TI % UNIT == 0).all())
    assert float(act_TI.abs().max()) <= 4 * UNIT
    return act_TI // UNIT


@pytest.mark.parametrize("text", DIGESTS)
def test_the_same_bits_everywhere(text: str) -> None:
    assert build_inputs(problem(text)).digest() == DIGESTS[text]


SMALL = [f"T9.H{hidden}.I{intermediate}.E6.K3" for hidden, intermediate in product((16, 17, 64, 250), (16, 33, 160))]
LARGE = ["T2.H16384.I64.E3.K2", "T2.H64.I16384.E3.K2", "T2.H4096.I1024.E2.K1", "T2.H512.I7168.E3.K3",
         "T2.H7168.I512.E3.K3", "T2.H128.I64.E9.K8", "T3.H1.I1.E2.K1", "T3.H2.I3.E40.K32"]
LAYERS = ("", "-gelu", "-gelutanh", "-nogate", "-relu", "-relu2", "-relu2-nogate")
WORDS = ("bf16{}", "fp16{}-res", "fp32{}-sh40", "bf16{}-sh40-res", "fp16{}")
PROBLEMS = [f"{sizes}-{words.format(layer)}-exact"
            for (sizes, layer), words in zip(product(SMALL, LAYERS), cycle(WORDS))]
PROBLEMS += [f"{sizes}-bf16{words}-exact" for sizes, words in product(LARGE, ("", "-sh24-res"))]


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("text", PROBLEMS)
def test_every_sum_of_any_order_is_exact(text: str) -> None:
    """Sums of absolute integers, which bound every partial sum of every order, split and rank."""
    inputs = build_inputs(problem(text))
    spec, x_TH = inputs.problem.spec, integers(inputs.x_TH)
    assert inputs.routing is not None
    # Everything after the activation in units of UNIT / 2.
    halves_TK = integers(2 * inputs.routing.weights_TK)
    total_TH = torch.zeros_like(x_TH)
    for e in inputs.routing.ids_TK.unique().tolist():
        expert = inputs.weights.expert(e)
        token_R, slot_R = (inputs.routing.ids_TK == e).nonzero(as_tuple=True)
        act_RI = activated(gates_and_ups(x_TH[token_R], expert), spec.experts)
        rows_RH = act_RI.abs() @ integers(expert.w2_HI).abs().T
        total_TH.index_add_(0, token_R, halves_TK[token_R, slot_R, None] * rows_RH)
    if shared := inputs.weights.shared_expert():
        assert spec.shared is not None
        act_TI = activated(gates_and_ups(x_TH, shared), spec.shared.mlp)
        total_TH += 2 * act_TI.abs() @ integers(shared.w2_HI).abs().T
    if inputs.residual_TH is not None:
        residual_TH = integers(inputs.residual_TH)
        assert bool((residual_TH % (UNIT // 2) == 0).all())
        total_TH += residual_TH.abs() // (UNIT // 2)
    assert float(total_TH.max()) <= STORED_LIMIT
    # fp16 has more bits than bf16, and less range.
    assert torch.finfo(torch.float16).max >= STORED_LIMIT * UNIT // 2


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu_squared"])
def test_the_number_of_terms_fits_whatever_the_layer(activation: str) -> None:
    """The budget itself for all top-k, by the worst run of weights: what the inputs above are drawn by."""
    largest, reached = 4 if activation == "relu_squared" else 2, 0
    for top_k, shared, residual in product(range(1, 70), (False, True), (False, True)):
        mlp = MLP(activation=activation)
        spec = MoESpec(hidden_size=4096, intermediate_size=4096, experts=mlp,
                       router=Router(num_experts=128, top_k=top_k),
                       shared=SharedExpert(intermediate_size=512, mlp=mlp) if shared else None)
        worst = max(sum(2 * SLOT_WEIGHTS[(first + slot) % 3] for slot in range(top_k)) for first in range(3))
        per_term, fixed = largest * (worst + 2 * shared), 2 * residual
        terms = down_terms(spec, residual)
        assert (terms >= 1) == (per_term + fixed <= STORED_LIMIT)
        assert max(terms, 0) * per_term + fixed <= STORED_LIMIT
        reached = max(reached, top_k * (terms >= 1))
    assert reached >= 20
    assert 4 * LARGEST_HIDDEN + 128 < 2**23


def test_activations_are_exact_there() -> None:
    """silu and gelu of 64 and 128 differ from the gate by far less than half a unit in the last place of fp64."""
    with localcontext(prec=80):
        for gate in (64, 128):
            half_ulp = Decimal(math.ulp(float(gate))) / 2
            assert gate * Decimal(-gate).exp() < half_ulp / 1000
            # 1 - Phi(g) < exp(-g^2 / 2); 1 - (1 + tanh z) / 2 < exp(-2 z), z = sqrt(2 / pi) g (1 + ...) > 0.79 g.
            assert gate * (-Decimal(gate) ** 2 / 2).exp() < half_ulp / 1000
            assert gate * (-2 * Decimal("0.79") * gate).exp() < half_ulp / 1000


EVALUATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "by sigmoid": lambda g: g * torch.sigmoid(g),
    "by a quotient": lambda g: g / (1 + torch.exp(-g)),
    "by exp2": lambda g: g / (1 + torch.exp2(-1.4426950408889634 * g)),
    "by tanh": lambda g: g * (0.5 * (1 + torch.tanh(g / 2))),
    "by torch": torch.nn.functional.silu,
    "gelu by erf": lambda g: 0.5 * g * (1 + torch.erf(g * 0.7071067811865476)),
    "gelu by erfc": lambda g: 0.5 * g * torch.erfc(-g * 0.7071067811865476),
    "gelu by tanh": lambda g: 0.5 * g * (1 + torch.tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))),
}


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_however_they_are_evaluated(name: str, dtype: torch.dtype) -> None:
    """The oracle in fp64, kernels in fp32 and layers that round every step to bf16 give the gate itself."""
    gate = torch.tensor([64.0, 128.0], dtype=dtype)
    assert torch.equal(EVALUATIONS[name](gate), gate)


@pytest.mark.parametrize("text", ["T40.H64.I32.E16.K2-bf16-exact", "T6.H32.I16.E64.K8-bf16-exact",
                                  "T9.H8.I8.E5.K5-fp32-exact"])
def test_every_expert_is_hit_and_slots_differ(text: str) -> None:
    """As far as there are slots for them; each token has different experts, and neighbouring slots other weights."""
    routing, spec = build_inputs(problem(text)).routing, problem(text).spec
    assert routing is not None
    ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
    assert len(ids_TK.unique()) == min(spec.num_experts, ids_TK.numel())
    assert all(len(row.unique()) == spec.top_k for row in ids_TK)
    assert set(weights_TK.unique().tolist()) <= set(SLOT_WEIGHTS)
    assert bool((weights_TK[:, 1:] != weights_TK[:, :-1]).all())


@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 160), (257, 129), (1024, 64), (64, 1024)])
def test_no_part_of_an_axis_is_spare(hidden: int, intermediate: int) -> None:
    """Any 16 channels left out change nearly every gate and up, any 16 columns some outputs of every expert."""
    inputs = build_inputs(problem(f"T8.H{hidden}.I{intermediate}.E4.K2-bf16-exact"))
    x_TH, columns = inputs.x_TH.double(), 16
    for e in range(4):
        w13_GIH, w2_HI, _, _ = inputs.weights.expert(e)
        for start in range(0, hidden, columns):
            lost = torch.einsum("th,gih->tgi", x_TH[:, start:start + columns],
                                w13_GIH[..., start:start + columns].double())
            # The last channels of an odd axis may be one alone.
            assert (lost != 0).double().mean() > (0.75 if start + columns < hidden else 0.0)
        for start in range(0, intermediate, columns):
            assert bool(w2_HI[:, start:start + columns].any())


MACHINES = ("sequential", "backwards", "blocked", "pairwise", "split_k", "shuffled", "hopper", "ampere")
"""Simulated bit by bit: fp32 additions in an order, and tensor cores that truncate what they align."""


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize(("machine", "dtype"), [(name, Dtype.BF16) for name in MACHINES]
                         + [(name, Dtype.FP16) for name in ("hopper", "ampere")] + [("shuffled", Dtype.FP32)])
def test_any_order_and_any_tensor_core_give_the_same_bits(machine: str, dtype: Dtype) -> None:
    subject = getattr(simulated, machine)
    takes_routing = SimpleNamespace(moe=subject.moe,
                                    CAPABILITIES=replace(subject.CAPABILITIES, injected_routing=True))
    line = judged(takes_routing, f"v1-T9.H96.I64.E4.K3-{dtype}-norm-res-exact-tp2", runs=1)
    assert line.verdict == Verdict.PASS, line.message


LOCAL_RIGHT = (right.GateUpStored, right.FP32Partials, right.BF16Weights, right.HiddenBF16Weights,
               right.TopkReversed, right.SplitK, right.Batched, right.BlackBox)


@pytest.mark.sampled(every=3, each="subject")
@pytest.mark.parametrize("subject", LOCAL_RIGHT)
@pytest.mark.parametrize("dtype", Dtype)
def test_other_orders_and_contracts_give_the_same_bits(subject: type[TorchMoE], dtype: Dtype) -> None:
    """Split sums, other orders, more or fewer stores: nothing is allowed, and nothing is off."""
    line = judged(subject(), f"v1-T9.H48.I40.E4.K3-{dtype}-norm-sh24-res-exact-tp2")
    assert line.verdict == Verdict.PASS, line.message
    assert all(stage.exact and stage.ratio == 0 for stage in line.stages)
    assert {stage.stage for stage in line.stages} >= {Stage.REDUCED, Stage.OUTPUT}


SPREAD = ("tp3-split3.0.1", "tp8", "tp2-ep2-copy0.5", "tp2-allreducerows", "tp3-reducescatter-tokenstp", "tp3-gather",
          "tp2-ep2-reducescatter-tokensboth-roundrobin", "ep3-tokensep-wholeshared")


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize(("name", "spread"), [(name, SPREAD[n % len(SPREAD)]) for n, name in enumerate(RIGHT)]
                         + [(next(iter(RIGHT)), spread) for spread in SPREAD])
def test_however_a_layer_is_spread(name: str, spread: str) -> None:
    line = judged(RIGHT[name](), f"v1-T17.H24.I20.E6.K3-bf16-norm-sh9-res-exact-{spread}")
    assert line.verdict == Verdict.PASS, line.message


# Power: each of these is caught at every seed, where the stage is shown and from the output alone.


class AllBlocksOfKDropped(TorchMoE):
    """The last 16 columns of the hidden axis are left out by every expert."""

    def gate_up(self, call: Call, x_RH: torch.Tensor, w13_GIH: torch.Tensor, expert: int) -> torch.Tensor:
        return super().gate_up(call, x_RH[:, :-16], w13_GIH[..., :-16], expert)


class OneTileDropped(TorchMoE):
    """Expert 1 leaves out one block of K in one tile of 16 columns."""

    def gate_up(self, call: Call, x_RH: torch.Tensor, w13_GIH: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().gate_up(call, x_RH, w13_GIH, expert)
        if expert == 1:
            rows[..., :16] = super().gate_up(call, x_RH[:, 16:], w13_GIH[:, :16, 16:], expert)
        return rows


class TwoColumnsSwapped(TorchMoE):
    """Neighbouring columns of the output change places."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().down(call, act_RI, w2_HI, expert)
        return torch.cat([rows[:, 1:2], rows[:, :1], rows[:, 2:]], 1)


class PartialSumDropped(TorchMoE):
    """The partial sum of rank 1 is lost."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        return super().all_reduce(call, torch.zeros_like(merged_TH) if call.rank == 1 else merged_TH)


class OneUlpOfAWeight(TorchMoE):
    """The routing weight that rows meet is one unit in the last place of the dtype too large."""

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return super().routed_rows(call, ids_TK, weights_TK * (1 + torch.finfo(call.x_TH.dtype).eps))


class NextSlotsWeight(TorchMoE):
    """Every row meets the weight of the next slot."""

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return super().routed_rows(call, ids_TK, weights_TK.roll(1, 1))


class LastRowOfAnExpertLost(TorchMoE):
    """The mask of a tile ends one row too early."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().down(call, act_RI, w2_HI, expert)
        return torch.cat([rows[:-1], torch.zeros_like(rows[-1:])])


POWER: dict[type[TorchMoE], Stage] = {
    AllBlocksOfKDropped: Stage.ACT, wrong.LastBlockOfKDropped: Stage.ACT, OneTileDropped: Stage.ACT,
    wrong.GateUpSwapped: Stage.ACT, wrong.ColumnsSwapped: Stage.DOWN, TwoColumnsSwapped: Stage.DOWN,
    wrong.NeighbourExpert: Stage.DOWN, wrong.WeightTwice: Stage.DOWN, OneUlpOfAWeight: Stage.DOWN,
    NextSlotsWeight: Stage.DOWN, LastRowOfAnExpertLost: Stage.DOWN, wrong.UninitialisedTail: Stage.MERGED,
    PartialSumDropped: Stage.REDUCED, wrong.AllReduceLeftOut: Stage.REDUCED, wrong.AllReduceTwice: Stage.REDUCED,
    wrong.ResidualPerRank: Stage.REDUCED,
}
SEEDS = 2


@pytest.mark.sampled(every=3, each="subject")
@pytest.mark.parametrize("subject", POWER)
@pytest.mark.parametrize("dtype", Dtype)
def test_a_wrong_layer_is_caught_where_it_is(subject: type[TorchMoE], dtype: Dtype) -> None:
    for seed in range(1, SEEDS + 1):
        line = verdict(subject(), f"v1-T12.H96.I64.E4.K3-{dtype}-norm-res-exact-s{seed}-tp2")
        assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, POWER[subject]), line.message
        assert f"{POWER[subject]}: exact probe, " in line.reason
        assert " elements differ, first at token " in line.reason


@pytest.mark.sampled(every=3, each="subject")
@pytest.mark.parametrize("subject", POWER)
@pytest.mark.parametrize("dtype", Dtype)
def test_a_wrong_layer_is_caught_by_its_output(subject: type[TorchMoE], dtype: Dtype) -> None:
    """Nothing but the result is shown: a defect must not round or cancel away on its way there."""
    hidden = type(f"Hidden{subject.__name__}", (subject,), {"shows": ()})
    for seed in range(1, SEEDS + 1):
        line = verdict(hidden(), f"v1-T12.H96.I64.E4.K3-{dtype}-norm-res-exact-s{seed}-tp2")
        assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.REDUCED), line.message


@pytest.mark.parametrize("subject", [wrong.BF16Accumulation, wrong.TruncatingStore])
def test_what_rounds_too_much_is_not_seen(subject: type[TorchMoE]) -> None:
    """By design: where nothing is rounded, nobody can round wrongly; the bounds on other data see it."""
    assert judged(subject(), "v1-T12.H96.I64.E4.K3-bf16-norm-exact").verdict == Verdict.PASS


@dataclass(frozen=True)
class Mistake:
    """A layer spread wrongly, and the spread that shows it."""

    name: str
    spread: str


MISTAKES = (
    Mistake("GateOfOneRankUpOfAnother", "tp2"), Mistake("MergedAxisCutNaively", "tp2"),
    Mistake("EvenSplitAssumed", "tp2-split60.40"), Mistake("PartialSumReturned", "tp2"), Mistake("MeanForSum", "tp2"),
    Mistake("NeighboursSlice", "tp2-reducescatter-tokenstp"), Mistake("GatheredInReverse", "tp2-gather"),
    Mistake("ColumnsInterleaved", "tp2-gather"), Mistake("WeightsInReverse", "tp3-reducescatter-tokenstp"),
    Mistake("RowsBackReversed", "ep2-tokensep"), Mistake("WeightTwice", "ep2-tokensep"),
    Mistake("HiddenEveryCopyServes", "ep2-copy0"), Mistake("WholeSharedInEverySum", "tp2-wholeshared"),
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_layer_spread_wrongly_is_caught(mistake: Mistake) -> None:
    case = f"v1-T32.H32.I24.E8.K2-bf16-norm-sh20-exact-{mistake.spread}"
    line = verdict(WRONG[mistake.name](), case)
    assert line.verdict == Verdict.MISMATCH, line.message
    assert "exact probe" in line.reason
    assert verdict(ParallelMoE(), case).verdict == Verdict.PASS


def test_the_message_says_where_and_that_nothing_is_allowed() -> None:
    line = judged(TwoColumnsSwapped(), "v1-T33.H96.I64.E8.K3-bf16-norm-exact")
    head, *rest = line.message.splitlines()
    assert head.startswith("mismatch: down: exact probe, ")
    assert " of 9504 elements differ, first at token " in head
    assert "  bound   none: sums are exact in any order, so right results agree to the bit" in rest
    assert len(rest) < 10


REFUSED = {
    "K2-bf16-zipf-exact": "pattern zipf with data exact, but its routing is injected whole",
    "K2-bf16-sh20-shgate-exact": "a gate of the shared expert, but a score is exact nowhere",
    "K2-bf16-sh20-shmean-exact": "a mean, but sums alone are exact",
    "K2-bf16-mlpbias-exact": "but only plain activations have a region in which they are exact",
    "K2-bf16-limit7-exact": "but only plain activations have a region in which they are exact",
    "K2-bf16-outbias-exact": "an output bias, but biases are not drawn exactly",
    "K2-bf16-zero2-exact": "identity experts, but tokens need more bits",
    "K2-bf16-cap5-exact": "a capacity, but the routing is injected",
    "K2-bf16-sigmoid-weightinput-exact": "weights on the input, but gates would leave the region",
    "K60-bf16-exact": "top_k=60, but sums over so many slots do not fit 8 bits",
    "K2-bf16-exact-bwd": "direction bwd with data exact, but gradients are exact in no order",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_layer_without_exact_inputs_is_refused_in_words(words: str) -> None:
    with pytest.raises(UsageValueError, match=REFUSED[words]):
        parse_case(f"v1-T8.H32.I24.E64.{words}")


@pytest.mark.parametrize(("changes", "words"), [
    ({"injected_routing": False}, "an injected routing"),
    ({"numerics": {Dtype.BF16: Numerics(storage={}, accumulate=Format.BF16)}}, "exact data with sums in bf16"),
    ({"numerics": {Dtype.BF16: Numerics(storage={Stage.ACT: Format.E4M3})}}, "exact data with rows in e4m3"),
])
def test_a_contract_that_rounds_more_is_not_judged_exactly(changes: dict, words: str) -> None:
    """Not declared, or declared in formats with too few bits: unsupported, never a mismatch."""
    options = {"numerics": {Dtype.BF16: Numerics(storage={})}, "injected_routing": True, **changes}
    capabilities = Capabilities(name="one", version="1", features=(Feature.DENSE,), **options)
    refusal = capabilities.refusal(parse_case("v1-T8.H32.I24.E8.K2-bf16-exact"), Ranks.LOCAL, "cpu")
    assert refusal == f"not declared: {words}"
    if "injected_routing" in changes:
        assert capabilities.refusal(parse_case("v1-T8.H32.I24-bf16-exact"), Ranks.LOCAL, "cpu") is None


def test_tiers_hold_exact_cases() -> None:
    """Every dtype in smoke; in quick one rank and many, experts apart, every schedule, tokens on either axis."""
    exact = {name: [one.case for one in tier(name).cases if one.case_id.count("-exact")] for name in ("smoke", "quick")}
    assert {case.problem.dtype for case in exact["smoke"]} == set(Dtype)
    assert {case.parallel.tp for case in exact["quick"]} >= {1, 2, 3, 4, 8}
    assert {case.parallel.ep for case in exact["quick"]} >= {1, 2, 3}
    assert len({case.parallel.schedule for case in exact["quick"]}) == 4
    assert len({case.parallel.tokens for case in exact["quick"]}) >= 4
