"""Protects the simulated layer: right in every order and contract, the same bits by both ways in, refusals in words."""

from dataclasses import replace
from functools import partial
from itertools import cycle

import pytest
import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import Groups
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.routing import Routing
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage, Verdict
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_shards
from moe_ref.numerics.formats import is_representable
from moe_ref.numerics.summation import ORDERS, Order, matmul
from moe_ref.records.schema import from_number
from moe_ref.simulated import subjects
from moe_ref.simulated.layer import SimulatedLayer, capabilities
from moe_ref.simulated.reduction import Reduction, reduce_parts
from moe_ref.simulated.subjects import usual_numerics
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.measure.stages import measure
from tests.in_process import judged
from tests.test_imports import forbidden

BF16_ROWS = usual_numerics(Dtype.BF16)
CONTRACTS: dict[str, Numerics] = {
    "rows in bf16": BF16_ROWS,
    "gate and up stored": replace(BF16_ROWS, storage={**BF16_ROWS.storage, Stage.GATE_UP: Format.BF16}),
    "only the output stored": Numerics(storage={Stage.REDUCED: Format.BF16}),
    "every step rounded": replace(BF16_ROWS, activation=Format.BF16, merge=Format.BF16, weight_at="merge"),
    "weights at the merge": replace(BF16_ROWS, weight_at="merge"),
    "weights at the activation": replace(BF16_ROWS, weight_at="act"),
    "every step rounded, weights at the activation": replace(BF16_ROWS, activation=Format.BF16, weight_at="act"),
    "router in bf16": replace(BF16_ROWS, storage={**BF16_ROWS.storage, Stage.LOGITS: Format.BF16,
                                                  Stage.WEIGHTS: Format.BF16}),
    "fp32 between ranks": replace(BF16_ROWS, reduce=Format.FP32,
                                  storage={**BF16_ROWS.storage, Stage.MERGED: Format.FP32}),
}
CASES = ("v1-T33.H64.I96.E4.K2-bf16-norm-tp3", "v1-T17.H80.I72.E5.K3-bf16-norm-tp2-split60.40",
         "v1-T21.H48.I40.E8.K2-bf16-sigmoid-norm-gelu-mlpbias-res-tp2", "v1-T17.H80.I72.E5.K3-bf16-gelutanh-outlier",
         "v1-T21.H64.I80.E8.K2-bf16-norm-ties-tp8", "v1-T40.H72.I90-bf16-res-tp4")
REDUCTIONS: tuple[Reduction, ...] = ("ring", "tree", "once", "rank_order")


def ratios(case: Case, layer: SimulatedLayer, equal_ranks: bool = True) -> dict[str, float]:
    """error / allowed of every stage that a simulated layer shows, by the harness's own measurement."""
    declared, inputs = capabilities("simulated", {case.problem.dtype: layer.numerics}), build_inputs(case.problem)
    found = measure(case, inputs, layer.run(case, inputs), declared,
                    RoundingModel(load_tolerances(), "cpu", layer.numerics.accumulate))
    assert found.struct_faults == ()
    assert (found.differing_ranks == ()) is equal_ranks
    return {stage.stage: from_number(stage.ratio) for stage in found.stages}


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize(("order", "reduction"), list(zip(ORDERS, cycle(REDUCTIONS), strict=False)))
@pytest.mark.parametrize("dtype", list(Dtype))
def test_a_right_layer_passes_in_every_order(order: Order, reduction: Reduction, dtype: Dtype) -> None:
    """The judge must not care who sums how, long sums and sums between ranks alike."""
    layer = SimulatedLayer(usual_numerics(dtype), partial(matmul, order=order, block=16, seed=3), reduction)
    found = ratios(parse_case(f"v1-T33.H96.I160.E4.K2-{dtype}-norm-tp3"), layer)
    assert max(found.values()) <= 1.0, found


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("case_id", CASES)
@pytest.mark.parametrize("name", CONTRACTS)
def test_a_right_layer_passes_under_every_contract(name: str, case_id: str) -> None:
    """Where rows are stored and where weights join is read from the declaration alone."""
    found = ratios(parse_case(case_id), SimulatedLayer(CONTRACTS[name]))
    assert max(found.values()) <= 1.0, found


@pytest.mark.parametrize("name", CONTRACTS)
def test_stages_are_stored_as_declared(name: str) -> None:
    """In the declared format where there is one, else in fp32, and no number has more bits than that."""
    case, numerics = parse_case(CASES[0]), CONTRACTS[name]
    for shown in SimulatedLayer(numerics).run(case, build_inputs(case.problem)):
        for stage, tensor in shown.items():
            if stage is not Stage.IDS:
                stored = numerics.storage.get(stage, Format.FP32)
                assert tensor.dtype is TORCH_DTYPES[stored]
                assert is_representable(tensor.double(), stored).all()


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize(("one", "other"), [(a, b) for a in CONTRACTS for b in CONTRACTS if a < b])
def test_contracts_differ_in_bits(one: str, other: str) -> None:
    """A declared rounding that changed nothing would not have been made."""
    case = parse_case(CASES[0])
    inputs = build_inputs(case.problem)
    first, second = (SimulatedLayer(CONTRACTS[name]).run(case, inputs)[0][Stage.REDUCED] for name in (one, other))
    assert not torch.equal(first, second)


def test_without_a_rounding_it_is_the_formula() -> None:
    """Exact products and fp64 everywhere: nothing is left but the mathematics, to fp64's own accuracy."""
    case = parse_case("v1-T21.H48.I40.E8.K2-fp32-sigmoid-norm-gelu-mlpbias-res-tp2")
    numerics = Numerics(storage={}, accumulate=Format.FP64, reduce=Format.FP64)
    found = ratios(case, SimulatedLayer(numerics, torch.matmul))
    assert max(found.values()) <= 1.0, found


@pytest.mark.parametrize("case_id", CASES)
def test_ranks_on_their_own_get_the_same_bits(case_id: str) -> None:
    """The direct form plays all ranks at once; by the contract's entry point each has its own shard."""
    case = parse_case(case_id)
    layer, inputs = SimulatedLayer(BF16_ROWS, rotation=1), build_inputs(case.problem)
    shards = build_shards(case.problem, case.parallel)

    def rank(comm: LocalComm) -> dict[Stage, torch.Tensor]:
        trace = Trace()
        output = layer.moe(inputs.x_TH, shards[comm.rank], case.problem.spec, case.parallel, Groups(tp=comm),
                           logits_TE=inputs.logits_TE, residual_TH=inputs.residual_TH, trace=trace)
        assert torch.equal(output, trace.tensors[Stage.REDUCED])
        return trace.tensors

    for own, played in zip(run_virtual_ranks(case.parallel.tp, rank), layer.run(case, inputs), strict=True):
        assert own.keys() == played.keys()
        assert all(torch.equal(own[stage], played[stage]) for stage in own)


def test_a_routing_can_be_injected() -> None:
    """Ids and weights as they are handed in, whatever the router would have chosen."""
    case = parse_case("v1-T9.H32.I24.E4.K2-fp32-norm")
    layer, inputs = SimulatedLayer(usual_numerics(Dtype.FP32)), build_inputs(case.problem)
    weights = build_shards(case.problem, case.parallel)[0]
    routing = Routing(torch.tensor([[3, -1]]).repeat(9, 1), torch.tensor([[1.0, 1.0]]).repeat(9, 1))
    trace = Trace()
    layer.moe(inputs.x_TH, weights, case.problem.spec, routing=routing, trace=trace)
    assert torch.equal(trace.tensors[Stage.IDS], routing.ids_TK)
    assert torch.equal(trace.tensors[Stage.MERGED], trace.tensors[Stage.DOWN][::2])
    assert not trace.tensors[Stage.DOWN][1::2].any()


def test_the_same_arguments_give_the_same_bits() -> None:
    """Studies are repeated from their seeds; another seed of atomics is another order."""
    case = parse_case("v1-T33.H96.I160.E8.K2-fp32-norm-tp2")
    inputs = build_inputs(case.problem)

    def output(seed: int, rotation: int = 0) -> torch.Tensor:
        drawn = partial(matmul, order="split_k", seed=seed)
        return SimulatedLayer(usual_numerics(Dtype.FP32), drawn, rotation=rotation).run(case, inputs)[0][Stage.REDUCED]

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))


@pytest.mark.parametrize(("case_id", "words"), [
    ("v1-T9.H32.I24.E4.K2-fp32-norm-sh8", "a shared expert"),
    ("v1-T9.H32.I24.E4.K2-fp32-norm-tp2-reducescatter", "schedule reduce_scatter"),
    ("v1-T9.H32.I24.E4.K2-fp32-norm-ep2", "ep 2"),
    ("v1-T9.H32.I24.E4.K2-fp32-norm-relu", "activation relu"),
])
def test_what_it_does_not_know_is_refused(case_id: str, words: str) -> None:
    """In the words that a subject's refusal has."""
    case = parse_case(case_id)
    with pytest.raises(UsageValueError, match=f"not declared: .*{words}"):
        SimulatedLayer(usual_numerics(Dtype.FP32)).run(case, build_inputs(case.problem))


def test_orders_between_ranks_by_hand() -> None:
    """1 + 2^-8 is half an ulp of bf16 above 1 and is rounded to 1: what is left of small parts tells the order."""
    small = 2.0**-8
    parts = torch.tensor([1.0, small, small, small], dtype=torch.float64)[:, None, None].expand(4, 1, 4)
    in_turn = partial(reduce_parts, parts, stored=Format.BF16)
    assert in_turn("rank_order").tolist() == [[1.0] * 4]
    assert in_turn("tree").tolist() == [[1 + 2 * small] * 4]
    assert in_turn("once").tolist() == [[1 + 4 * small] * 4]  # 1 + 3/256 is half-way, and goes to the even one
    # The ring's column c starts at rank c + 1: the one of rank 0 comes last, third, second, first.
    above = 1 + 4 * small
    assert in_turn("ring").tolist() == [[above, above, 1.0, 1.0]]
    assert in_turn("ring", rotation=3).tolist() == [[1.0, above, above, 1.0]]


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("name", ["sequential", "pairwise", "split_k", "hopper"])
def test_a_rank_may_have_no_columns(name: str) -> None:
    """Its sums have no terms, and are zero."""
    line = judged(getattr(subjects, name), "v1-T5.H32.I24.E4.K2-bf16-norm-tp2-split0.1")
    assert line.verdict == Verdict.PASS, line.message


def test_a_subject_needs_no_answers() -> None:
    """Subjects run where the oracle and the judge must not be imported."""
    assert forbidden(("moe_ref/simulated", "moe_ref/numerics"), ("moe_ref.oracle", "moe_ref.verify")) == []


def test_an_unknown_reduction_is_named() -> None:
    """With those that there are."""
    with pytest.raises(UsageValueError, match="reduction='star', but should be one of ring, tree"):
        reduce_parts(torch.zeros(2, 1, 1), "star", Format.BF16)  # pyrefly: ignore


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("name", ["sequential", "backwards", "blocked", "pairwise", "split_k", "shuffled", "hopper",
                                  "ampere"])
@pytest.mark.parametrize("case_id", ["v1-T17.H48.I56.E4.K2-bf16-norm-ties-tp3", "v1-T17.H48.I40.E4.K2-fp16-gelu-tp2",
                                     "v1-T9.H48.I32.E4.K2-fp32-res-tp2"])
def test_subjects_of_the_command_line_pass(name: str, case_id: str) -> None:
    """By the whole flow of a case: request, two runs, measurement and verdict."""
    line = judged(getattr(subjects, name), case_id)
    assert line.verdict == Verdict.PASS, line.message


def test_subjects_run_on_processes_too() -> None:
    """They add up between ranks themselves, so that gloo's order does not show."""
    declared = subjects.sequential.CAPABILITIES
    assert declared.refusal(parse_case("v1-T33.H96.I160.E8.K2-bf16-norm-tp3"), Ranks.GLOO, "cpu") is None
