"""Protects the search over cases: it finds nothing in right layers, and of a defect the smallest case, by its id."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given

import moe_fast
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.vocabulary import RED_VERDICTS, Schedule, Tokens, Verdict
from tests.case_strategies import cases, searched, smallest_failure
from tests.in_process import verdict
from tests.nightly import examples
from tests.subjects import mistaken_parallel, wrong
from tests.subjects.base import TorchMoE
from tests.subjects.parallel import ParallelMoE, parallel_moe

FAST = replace(moe_fast.CAPABILITIES, schemes={})
"""Weights that are drawn are plain; contracts of encoded ones are longer than what hypothesis prints of an argument."""


def fails(subject: object) -> Callable[[Case], bool]:
    """Whether a case, by its id, accuses the layer."""
    return lambda case: verdict(subject, format_case(case)).verdict in RED_VERDICTS


@searched(100)
@given(case=cases(FAST))
def test_every_drawn_case_is_its_id(case: Case) -> None:
    assert parse_case(format_case(case)) == case


def test_what_is_drawn_is_the_breadth_of_the_contract() -> None:
    """A search over a corner of it would find nothing, too."""
    drawn: list[Case] = []

    @searched(300)
    @given(case=cases(FAST))
    def draw(case: Case) -> None:
        drawn.append(case)

    draw()
    counts = Counter(word for case in drawn for word in format_case(case).split("-")[2:])
    wanted = {"fp32", "fp16", "bf16", "norm", "sigmoid", "bias", "gelu", "nogate", "mlpbias", "sh6", "shgate", "res",
              "tp2", "tp3", "ep2", "gather", "reducescatter", "allreducerows", "tokensep", "roundrobin", "outlier",
              "zipf", "wholeshared", "weightinput", "outbias", "cap2", "zero2", "g2.1", "inout"}
    assert wanted <= counts.keys(), wanted - counts.keys()
    assert {case.problem.num_tokens for case in drawn} >= {0, 1, 2, 5}
    assert {case.parallel.schedule for case in drawn} == set(Schedule)
    assert {case.parallel.tokens for case in drawn} == set(Tokens)


@searched(examples(60))
@given(case=cases(parallel_moe.CAPABILITIES))
def test_a_right_layer_is_never_accused(case: Case) -> None:
    line = verdict(parallel_moe, format_case(case))
    assert line.verdict in (Verdict.PASS, Verdict.NOT_RUN), line.message


@searched(8)
@given(case=cases(FAST, most_tokens=6, fits=lambda case: case.parallel.size <= 2))
def test_the_fast_layer_is_never_accused(case: Case) -> None:
    line = verdict(moe_fast, format_case(case))
    assert line.verdict in (Verdict.PASS, Verdict.NOT_RUN), line.message


@dataclass(frozen=True)
class Found:
    """What the smallest failing case of a defect must still have, and how small the rest of it is."""

    subject: TorchMoE
    words: set[str] = field(default_factory=set)
    tokens: int = 1
    experts: int = 2


DEFECTS = {
    "gate and up exchanged": Found(wrong.GateUpSwapped(), experts=1),
    "residual added by every rank": Found(wrong.ResidualPerRank(), {"tp2", "res"}, experts=1),
    "weights not renormalised": Found(wrong.NotRenormalised(), {"norm"}),
    "a neighbour's down projection": Found(wrong.NeighbourExpert(), experts=4),
    "rows back in reverse": Found(mistaken_parallel.RowsBackReversed(), {"ep2", "tokensep"}, tokens=3),
}


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_and_shrinks_to_a_small_case(name: str) -> None:
    """What is left of the case is the defect's trigger; it fails again when it is replayed by its id."""
    found = DEFECTS[name]
    case_id = smallest_failure(cases(found.subject.CAPABILITIES), fails(found.subject))
    assert case_id, "not found"
    case = parse_case(case_id)
    assert found.words <= set(case_id.split("-")), case_id
    assert case.problem.num_tokens <= found.tokens, case_id
    assert case.problem.spec.num_experts <= found.experts, case_id
    assert max(case.problem.spec.hidden_size, case.problem.spec.intermediate_size) <= 4, case_id
    again = verdict(found.subject, case_id)
    assert again.verdict in RED_VERDICTS
    assert verdict(ParallelMoE(), case_id).verdict == Verdict.PASS


@pytest.mark.nightly("right layers are drawn by default too")
def test_a_right_layer_has_no_smallest_failure() -> None:
    """The same search that finds the defects."""
    assert smallest_failure(cases(TorchMoE().CAPABILITIES), fails(TorchMoE()), examples=60) == ""
