"""Protects relations that no reference is needed for, on cases drawn for the oracle, a torch layer and the fast layer.

test_properties.py has such relations of the oracle over all specifications; here the layers that are judged are asked,
and what a search finds against one of them is a case id. Each relation fails for a defect made for it: the same search
then ends with a small case.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given

import moe_fast
from moe_fast import invariant
from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.oracle.layer import moe as oracle_moe
from tests.case_strategies import cases, searched, smallest_failure
from tests.relations import RELATIONS
from tests.subjects import wrong
from tests.subjects.base import Call, TorchMoE
from tests.subjects.whole import whole_spec

EXACT = Numerics(storage={}, accumulate=Format.FP64, reduce=Format.FP64)
ORACLE = SimpleNamespace(moe=oracle_moe, CAPABILITIES=replace(moe_fast.CAPABILITIES, numerics={Dtype.FP32: EXACT}))
LAYERS = {"oracle": (ORACLE, 8, 6), "torch": (whole_spec, 8, 6), "moe_fast": (moe_fast, 3, 5),
          "moe_fast.invariant": (invariant, 3, 5)}
"""Each layer, how many cases are drawn for it, and of how many tokens at most."""


class LastRowOfTheLastExpert(TorchMoE):
    """The last row of expert 0 meets the last expert's down projection: a block that ends one row too early."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().down(call, act_RI, w2_HI, expert)
        if expert == 0 and len(rows):
            last_HI = call.weights.expert(call.spec.num_experts - 1).w2_HI
            rows[-1:] = super().down(call, act_RI[-1:], last_HI, expert)
        return rows


class LastTokenLost(TorchMoE):
    """The last row of a batch is never added up."""

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        total_TH = super().sum_of_slots(rows_TKH)
        total_TH[-1:] = 0.0
        return total_TH


class ReadsTheNextRow(TorchMoE):
    """The last term of a sum over the activation comes from the next row (A08)."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        act_RI = act_RI.float().clone()
        act_RI[:-1, -1] = act_RI[1:, -1].clone()
        return super().down(call, act_RI, w2_HI, expert)


class RepeatedIdLost(TorchMoE):
    """Of an expert that a token names twice the first slot counts."""

    def routed_rows(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        earlier_TKK = (ids_TK[:, :, None] == ids_TK[:, None, :]).tril(-1)
        return super().routed_rows(call, ids_TK, weights_TK.masked_fill(earlier_TKK.any(-1), 0.0))


DEFECTS = {
    "permuted tokens": LastRowOfTheLastExpert(),
    "a batch cut in two": LastTokenLost(),
    "another token changed": ReadsTheNextRow(),
    "relabelled experts": LastRowOfTheLastExpert(),
    "linear in the weights": wrong.WeightTwice(),
    "an expert named twice": RepeatedIdLost(),
    "exchanged ranks": wrong.AllReduceLeftOut(),
    "four times the factor": wrong.ScalingDropped(),
}


def drawn(layer: Any, name: str, most_tokens: int) -> Any:
    """Cases in fp32 of which a relation says something."""
    return cases(layer.CAPABILITIES, dtypes=(Dtype.FP32,), most_tokens=most_tokens).map(RELATIONS[name].adapted)


@pytest.mark.sampled(every=4, each="name")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", RELATIONS)
def test_a_relation_holds(name: str, layer: str) -> None:
    subject, examples, most_tokens = LAYERS[layer]

    @searched(examples)
    @given(case=drawn(subject, name, most_tokens))
    def holds(case: Case) -> None:
        assert RELATIONS[name].of(subject, case), format_case(case)

    holds()


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("name", RELATIONS)
def test_a_relation_catches_a_defect(name: str) -> None:
    """In a case that fails again when it is replayed by its id, and in which the right layer does not."""
    relation, defect = RELATIONS[name], DEFECTS[name]
    case_id = smallest_failure(drawn(defect, name, 3), lambda case: not relation.of(defect, case), examples=40)
    assert case_id, "not found"
    case = parse_case(case_id)
    assert case.problem.num_tokens <= 3, case_id
    assert case.problem.spec.hidden_size <= 4, case_id
    assert not relation.of(defect, case)
    assert relation.of(TorchMoE(), case)
