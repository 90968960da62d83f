"""Protects the planted faults: each acts where it says and nowhere before, and is what its name says."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.routing import Routing
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.inputs.build import Inputs, build_inputs
from moe_ref.numerics.formats import is_representable, round_to, unit_in_last_place
from moe_ref.numerics.summation import matmul
from moe_ref.simulated.fault import Fault
from moe_ref.simulated.faults import (
    FAULTS,
    AccumulationTruncated,
    ActivationNotRounded,
    ActivationRoundedTwice,
    ColumnsSwapped,
    LastBlockDropped,
    LastBlockDroppedOfOneExpert,
    LastBlockDroppedOfOneTile,
    NeighbouringExpert,
    NotReduced,
    OneWeightOff,
    OperandsCutToTF32,
    OperandsInTF32,
    PartialDropped,
    ReducedOnce,
    StoreTruncated,
    WeightsInBF16,
)
from moe_ref.simulated.layer import RIGHT, SimulatedLayer
from moe_ref.simulated.subjects import usual_numerics
from tests.test_simulated import ratios

CASE_IDS = {dtype: f"v1-T16.H64.I128.E4.K2-{dtype}-norm-tp4" for dtype in Dtype}
NAMES = {fault.name: fault for fault in FAULTS}

WITHIN_THE_BOUND = {ReducedOnce.name: "benign: more accurate than a ring",
                    AccumulationTruncated.name: "grows with the sum, and the bound of 64 terms holds it"}
"""What a bound on any order of summation cannot tell from a right layer in a case this small."""


def case_of(dtype: Dtype) -> Case:
    return parse_case(CASE_IDS[dtype])


def run(case: Case, fault: Fault, inputs: Inputs | None = None) -> list[dict[Stage, torch.Tensor]]:
    """What a layer with this fault shows under the usual contract."""
    return SimulatedLayer(usual_numerics(case.problem.dtype), fault=fault).run(
        case, build_inputs(case.problem) if inputs is None else inputs)


def differing(case: Case, fault: Fault) -> list[Stage]:
    """Stages that are not the right layer's, bit for bit, on some rank."""
    pairs = list(zip(run(case, fault), run(case, RIGHT), strict=True))
    return [stage for stage in pairs[0][1] if any(not torch.equal(own[stage], right[stage]) for own, right in pairs)]


def test_every_fault_has_a_name_of_its_own() -> None:
    """Tables and records tell them apart by it."""
    assert len(NAMES) == len(FAULTS) == 20


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_starts_at_its_stage(name: str, dtype: Dtype) -> None:
    """What comes before is shown as it should be; with 64 terms of 16 bits a truncated sum is still exact."""
    case, fault = case_of(dtype), NAMES[name]
    if fault.acts_on(case, usual_numerics(dtype)) and not (name == AccumulationTruncated.name and dtype != Dtype.FP32):
        assert differing(case, fault)[0] == fault.stage


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_seen_where_it_acts(name: str, dtype: Dtype) -> None:
    """By the rigorous bound of its own stage at 64 terms; what does not act, and the two named above, stay inside."""
    case, fault, numerics = case_of(dtype), NAMES[name], usual_numerics(dtype)
    found = ratios(case, SimulatedLayer(numerics, fault=fault), equal_ranks=fault != NotReduced())
    if fault.acts_on(case, numerics) and name not in WITHIN_THE_BOUND:
        assert found[str(fault.stage)] > 1.0
    else:
        assert max(found.values()) <= 1.0


@pytest.mark.parametrize(("fault", "case_id"), [
    (OperandsInTF32(), CASE_IDS[Dtype.BF16]), (WeightsInBF16(), "v1-T8.H32.I48-fp32"),
    (NotReduced(), "v1-T8.H32.I48.E4.K2-fp32-norm"), (ReducedOnce(), "v1-T8.H32.I48.E4.K2-fp32-norm-tp2"),
    (NeighbouringExpert(), "v1-T8.H32.I48-fp32"), (OneWeightOff(), "v1-T0.H32.I48.E4.K2-fp32-norm"),
])
def test_a_fault_that_cannot_act_changes_nothing(fault: Fault, case_id: str) -> None:
    """A study must not count it as missed."""
    case = parse_case(case_id)
    assert not fault.acts_on(case, usual_numerics(case.problem.dtype))
    assert differing(case, fault) == []


def forced() -> tuple[Case, Inputs]:
    """Injected logits, so that changed tokens keep their experts."""
    case = parse_case("v1-T32.H96.I128.E4.K2-bf16-norm-zipf-tp2")
    return case, build_inputs(case.problem)


def test_lost_terms_are_the_last_ones() -> None:
    """As if those columns of the tokens were zero: half of a narrow layer, in all experts, in one, in one tile."""
    case, inputs = forced()
    cut = inputs.x_TH.clone()
    cut[:, 48:] = 0
    wanted, right = (torch.cat([shown[Stage.GATE_UP] for shown in run(case, RIGHT, one)], -1)
                     for one in (replace(inputs, x_TH=cut), inputs))
    served_R = run(case, RIGHT, inputs)[0][Stage.IDS].flatten()
    of_expert = (served_R == 0)[:, None, None].expand_as(right)
    in_tile = of_expert.clone()
    in_tile[:, 0], in_tile[:, 1, :-16] = False, False
    for fault, lost in ((LastBlockDropped(), torch.ones_like(of_expert)), (LastBlockDroppedOfOneExpert(), of_expert),
                        (LastBlockDroppedOfOneTile(), in_tile)):
        assert lost.any()
        found = torch.cat([shown[Stage.GATE_UP] for shown in run(case, fault, inputs)], -1)
        assert torch.equal(found, torch.where(lost, wanted, right))


def test_one_rank_of_one_expert_is_missing() -> None:
    """Its rows are zero on that rank and right on the other."""
    case, inputs = forced()
    (zeroed, kept), (right, other) = run(case, PartialDropped(), inputs), run(case, RIGHT, inputs)
    lost_R = right[Stage.IDS].flatten() == 0
    assert not zeroed[Stage.DOWN][lost_R].any()
    assert torch.equal(zeroed[Stage.DOWN][~lost_R], right[Stage.DOWN][~lost_R])
    assert torch.equal(kept[Stage.DOWN], other[Stage.DOWN])


def test_the_neighbour_computes_one_slot() -> None:
    """Its row is what that token gets where it is routed there; the ids shown are the right ones."""
    case, inputs = forced()
    layer = SimulatedLayer(usual_numerics(Dtype.BF16))
    right = layer.run(case, inputs)[0]
    ids_TK = right[Stage.IDS].clone()
    ids_TK[0, 0] = (ids_TK[0, 0] + 1) % 4
    wanted = layer.run(case, inputs, Routing(ids_TK, right[Stage.WEIGHTS]))[0]
    found = run(case, NeighbouringExpert(), inputs)[0]
    assert torch.equal(found[Stage.IDS], right[Stage.IDS])
    assert torch.equal(found[Stage.DOWN], wanted[Stage.DOWN])


@pytest.mark.parametrize(("fault", "changed"), [
    (WeightsInBF16(), lambda weights_TK: round_to(weights_TK, Format.BF16)),
    (OneWeightOff(token=5, slot=1), lambda weights_TK: weights_TK.index_put(
        (torch.tensor(5), torch.tensor(1)), weights_TK[5, 1] + unit_in_last_place(weights_TK[5, 1], Format.BF16))),
])
def test_wrong_weights_are_used_and_right_ones_shown(
        fault: Fault, changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As a kernel that reads them wrongly does: down is what the changed weights make it."""
    case, inputs = forced()
    layer = SimulatedLayer(replace(usual_numerics(Dtype.BF16), storage={
        **usual_numerics(Dtype.BF16).storage, Stage.WEIGHTS: Format.FP32}))
    right = layer.run(case, inputs)[0]
    wanted = layer.run(case, inputs, Routing(right[Stage.IDS], changed(right[Stage.WEIGHTS].double())))[0]
    found = run(case, fault, inputs)[0]
    assert torch.equal(found[Stage.WEIGHTS], right[Stage.WEIGHTS])
    assert torch.equal(found[Stage.DOWN], wanted[Stage.DOWN])


def operands(fault: Fault, dtype: Dtype) -> list[torch.Tensor]:
    """What the products of the experts are handed."""
    seen = []

    def watching(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        seen.extend((a_MK, b_KN))
        return matmul(a_MK, b_KN, "sequential")

    case = parse_case(f"v1-T8.H32.I48.E4.K2-{dtype}-norm-zipf")  # injected logits: no product of the router
    SimulatedLayer(usual_numerics(dtype), watching, fault=fault).run(case, build_inputs(case.problem))
    assert seen
    return seen


@pytest.mark.parametrize("fault", [OperandsInTF32(), OperandsCutToTF32()])
def test_operands_are_made_tf32(fault: Fault) -> None:
    """All of them, the activation too; fp32 operands are not by themselves."""
    assert all(is_representable(one, Format.TF32).all() for one in operands(fault, Dtype.FP32))
    assert not any(is_representable(one, Format.TF32).all() for one in operands(RIGHT, Dtype.FP32))


def test_the_down_product_takes_what_was_not_stored() -> None:
    """Every other operand is bf16, and so is what is shown."""
    plain = [bool(is_representable(one, Format.BF16).all()) for one in operands(ActivationNotRounded(), Dtype.BF16)]
    assert plain == [True, True, False, True] * (len(plain) // 4)


def test_columns_change_places() -> None:
    """The middle ones, the same on every rank."""
    case, inputs = forced()
    for found, right in zip(run(case, ColumnsSwapped(), inputs), run(case, RIGHT, inputs), strict=True):
        order_H = torch.arange(96)
        order_H[47], order_H[48] = 48, 47
        assert torch.equal(found[Stage.REDUCED], right[Stage.REDUCED][:, order_H])


def test_ranks_keep_their_own_parts() -> None:
    """Without an all-reduce the output of a rank is its sum."""
    case, inputs = forced()
    for found in run(case, NotReduced(), inputs):
        assert torch.equal(found[Stage.REDUCED], found[Stage.MERGED])


def test_a_truncating_store_never_grows() -> None:
    """Every row is the right one or its neighbour towards zero."""
    case, inputs = forced()
    found, right = (run(case, fault, inputs)[0][Stage.DOWN].double().abs() for fault in (StoreTruncated(), RIGHT))
    smaller = found < right
    assert (found <= right).all()
    assert 0.3 < smaller.double().mean() < 0.7


def test_truncated_sums_shrink_with_their_length() -> None:
    """1024 terms of 16 bits: gate and up are nearer to zero more often than not, which rounding to nearest is not."""
    case = parse_case("v1-T8.H1024.I32.E4.K2-bf16-norm-zipf")
    found, right = (run(case, fault)[0][Stage.GATE_UP].double().abs() for fault in (AccumulationTruncated(), RIGHT))
    assert (found < right).sum() > 1.5 * (found > right).sum()


def test_an_activation_stored_twice_is_rounded_in_between() -> None:
    """From the gate and up that are shown: silu is bf16 before it meets up, and the product once more."""
    case, inputs = forced()
    shown = run(case, ActivationRoundedTwice(), inputs)[1]
    gate_RI, up_RI = shown[Stage.GATE_UP].double().unbind(1)
    wanted = round_to(round_to(torch.nn.functional.silu(gate_RI), Format.BF16) * up_RI, Format.BF16)
    assert torch.equal(shown[Stage.ACT].double(), wanted)
