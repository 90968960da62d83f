"""Protects the verdict: a pure function of numbers, and a message of at most ten lines that says how to repeat it."""

import copy

import msgspec
import pytest

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.records.schema import CaseLine, Implementation, StageResult, Worst
from moe_ref.verify.explain import explain
from moe_ref.verify.judge import Judgement, RunFacts, WantedCalls, judge
from moe_ref.verify.measure.measurement import Measurement

REDUCE = (("tp.all_reduce", 40),)
FACTS = RunFacts(calls=(REDUCE, REDUCE), wanted_calls=(WantedCalls(REDUCE),) * 2, same_bits=True, differing_stages=(),
                 promised_deterministic=True, promised_equal_ranks=True, changed_inputs=())

NOTHING = (("tp.all_reduce", 0),)
DISPATCH = WantedCalls((("ep.all_to_all", 400), ("ep.all_to_all", 360)), (("ep.all_to_all", 10), ("ep.all_to_all", 10)))
SENT = (("ep.all_to_all", 400), ("ep.all_to_all", 20), ("ep.all_to_all", 360))
"""Rows to their experts and back; ids and weights in one message of both."""


def facts(**changes: object) -> RunFacts:
    """What is known of a run in which all went well, with these changes."""
    return RunFacts(**{**FACTS.__dict__, **changes})


def stage(name: Stage, ratio: float | str = 0.5, **fields: object) -> StageResult:
    """The numbers of one stage."""
    return StageResult(**{"stage": name, "ratio": ratio, "num_checked": 80, "num_bad": 0, **fields})


GOOD = (stage(Stage.IDS, 0.0, exact=True), stage(Stage.ACT), stage(Stage.REDUCED), stage(Stage.OUTPUT))
BAD_ACT = stage(Stage.ACT, 3.0, num_bad=1, num_bad_tokens=1, bad_tokens=[3], bad_experts=[1], bad_ranks=[0])


def verdict(measurement: Measurement, run: RunFacts = FACTS) -> tuple[Verdict, Stage | None]:
    """Verdict and first stage under limits of 1 and 2."""
    judgement = judge(measurement, run, 1.0, 2.0)
    return judgement.verdict, judgement.first_stage


@pytest.mark.parametrize(("stages", "expected"), [
    (GOOD, (Verdict.PASS, None)),
    ((), (Verdict.PASS, None)),
    # The bound itself is allowed; the next number above it is not.
    ((stage(Stage.ACT, 1.0),), (Verdict.PASS, None)),
    ((stage(Stage.ACT, 1.0000000000000002),), (Verdict.MISMATCH, Stage.ACT)),
    ((stage(Stage.ACT, "inf"),), (Verdict.MISMATCH, Stage.ACT)),
    ((stage(Stage.IDS, "inf", exact=True, num_bad=1),), (Verdict.MISMATCH, Stage.IDS)),
    # The first in data order counts, whatever the order in which stages were measured.
    ((stage(Stage.OUTPUT, 9.0), stage(Stage.MERGED, 2.0), BAD_ACT), (Verdict.MISMATCH, Stage.ACT)),
])
def test_numbers_decide(stages: tuple[StageResult, ...], expected: tuple[Verdict, Stage | None]) -> None:
    """Ratio above the limit: mismatch, at the first such stage."""
    assert verdict(Measurement(stages)) == expected


@pytest.mark.parametrize(("changes", "expected", "words"), [
    ({"changed_inputs": ("x_TH",)}, Verdict.STRUCT, "changed its inputs x_TH"),
    ({"calls": (REDUCE, REDUCE * 2)}, Verdict.STRUCT, "collectives of rank 1"),
    ({"calls": (REDUCE, ())}, Verdict.STRUCT, "tp.all_reduce of 40 elements missing"),
    ({"calls": (REDUCE, (("tp.all_reduce", 41),))}, Verdict.STRUCT, "all_reduce of 41 elements"),
    ({"calls": (REDUCE, (("ep.all_reduce", 40),))}, Verdict.STRUCT, "ep.all_reduce of 40 elements, but should be tp."),
    ({"calls": (REDUCE, ()), "wanted_calls": ()}, Verdict.PASS, ""),
    # Without tokens a call moves nothing, and may be left out.
    ({"calls": (NOTHING, ()), "wanted_calls": (WantedCalls(NOTHING),) * 2}, Verdict.PASS, ""),
    ({"calls": (SENT, SENT), "wanted_calls": (DISPATCH,) * 2}, Verdict.PASS, ""),
    ({"calls": ((*SENT, ("ep.all_to_all", 20)), SENT), "wanted_calls": (DISPATCH,) * 2}, Verdict.PASS, ""),
    ({"calls": ((*SENT, ("tp.all_gather", 2)), SENT), "wanted_calls": (DISPATCH,) * 2}, Verdict.PASS, ""),
    ({"calls": ((*SENT, ("ep.all_reduce", 20)), SENT), "wanted_calls": (DISPATCH,) * 2}, Verdict.STRUCT, "ep.all_red"),
    ({"calls": ((*SENT, ("ep.all_to_all", 400)), SENT), "wanted_calls": (DISPATCH,) * 2}, Verdict.STRUCT, "of 400"),
    ({"calls": (SENT[1:], SENT), "wanted_calls": (DISPATCH,) * 2}, Verdict.STRUCT, "rank 0"),
    ({"same_bits": False, "differing_stages": ("act",)}, Verdict.NONDETERMINISTIC, "act differ"),
    ({"same_bits": False, "differing_stages": ("act",), "promised_deterministic": False}, Verdict.PASS, ""),
    ({"same_bits": None}, Verdict.PASS, ""),
])
def test_promises_decide_when_numbers_are_right(changes: dict, expected: Verdict, words: str) -> None:
    """Only what was declared is held against a subject."""
    judgement = judge(Measurement(GOOD), facts(**changes), 1.0, 2.0)
    assert judgement.verdict is expected
    assert words in judgement.reason


def test_ranks_that_differ_count_where_equality_was_promised() -> None:
    """Inside the bound, but not the same bits on every rank."""
    measurement = Measurement(GOOD, differing_ranks=(1, 2))
    judgement = judge(measurement, FACTS, 1.0, 2.0)
    assert (judgement.verdict, judgement.first_stage) == (Verdict.MISMATCH, Stage.REDUCED)
    assert "rank 1, 2 differ from those of the first that holds the same" in judgement.reason
    assert verdict(measurement, facts(promised_equal_ranks=False)) == (Verdict.PASS, None)


def test_the_order_of_accusations() -> None:
    """Structure before numbers, numbers before promises, and power last: a wrong number stays wrong without power."""
    everything = facts(changed_inputs=("x_TH",), same_bits=False)
    assert verdict(Measurement((BAD_ACT,), ("act: shape",), 0.0), everything) == (Verdict.STRUCT, None)
    assert verdict(Measurement((BAD_ACT,), power=0.0), everything) == (Verdict.MISMATCH, Stage.ACT)
    assert verdict(Measurement(GOOD, power=0.0), everything)[0] is Verdict.STRUCT
    assert verdict(Measurement(GOOD, power=1.999)) == (Verdict.NOT_RUN, None)
    assert verdict(Measurement(GOOD, power=2.0)) == (Verdict.PASS, None)
    assert verdict(Measurement(GOOD, power=0.0, unjudged_tokens=3)) == (Verdict.NOT_RUN, None)


def test_a_mismatch_mentions_wrong_calls() -> None:
    """A forgotten all_reduce is both; the cause stands beside the symptom."""
    judgement = judge(Measurement((BAD_ACT,)), facts(calls=((), ())), 1.0, 2.0)
    assert judgement.verdict is Verdict.MISMATCH
    assert "expert 1, rank 0, 1 token" in judgement.reason
    assert "tp.all_reduce of 40 elements missing" in judgement.reason


def test_the_judge_is_pure() -> None:
    """The same numbers give the same judgement, and stay as they are."""
    measurement, run = Measurement((BAD_ACT, *GOOD[2:]), power=5.0), facts(calls=((), ()))
    kept = copy.deepcopy((measurement, run))
    first = judge(measurement, run, 1.0, 2.0)
    assert first == judge(measurement, run, 1.0, 2.0) == judge(*copy.deepcopy(kept), 1.0, 2.0)
    assert (measurement, run) == kept


WORST = Worst(rank=1, token=3, slot=1, expert=5, column=130, got=1.0, want=2.0, allowed=0.25)
CASE_ID = "v1-T33.H96.I160.E8.K2-bf16-norm-tp2"
MANY = {"num_bad": 9999, "num_bad_tokens": 33, "bad_tokens": list(range(8)), "bad_experts": list(range(8)),
        "bad_ranks": [0, 1], "bad_tiles": [0, 1, 2], "num_tiles": 3, "worst": WORST}


def message(judgement: Judgement, stages: tuple[StageResult, ...] = (), case_id: str = CASE_ID) -> str:
    """The message of a record line with this judgement."""
    line = CaseLine(run="r", case=case_id, purpose="p", implementation=Implementation(name="moe_fast", version="1"),
                    ranks="local", device="cpu", verdict=judgement.verdict, reason=judgement.reason,
                    first_stage=judgement.first_stage, stages=list(stages), runs=2, same_bits=True,
                    replay=f"moe-ref replay {case_id} --impl moe_fast --ranks local --device cpu")
    return explain(line, parse_case(case_id))


def ids_note(top_k: int) -> str:
    """What the measurement says of a wrong choice of K experts."""
    return ("exact tie not given to the lower id; outside the experts that the scores allow; ranks disagree; "
            f"token 31 took experts {list(range(50, 50 + top_k))}, the oracle takes {list(range(40, 40 + top_k))}")


MESSAGES = {
    "one element": (BAD_ACT, *GOOD[2:]),
    "everything": tuple(stage(name, 123456.789, **MANY) for name in (Stage.ACT, Stage.DOWN, Stage.OUTPUT)),
    "infinite": (stage(Stage.DOWN, "inf", **MANY),),
    "two ids": (stage(Stage.IDS, "inf", exact=True, num_bad=3, worst=WORST, note=ids_note(2)),),
    "eight ids": (stage(Stage.IDS, "inf", exact=True, num_bad=3, worst=WORST, note=ids_note(8)),),
}


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("calls", [(REDUCE, REDUCE), ((), ())], ids=["right calls", "no calls"])
def test_a_message_is_short_and_can_be_replayed(name: str, calls: tuple) -> None:
    """At most ten lines, the verdict in a first line below 180 characters, the replay command in the last."""
    judgement = judge(Measurement(MESSAGES[name]), facts(calls=calls), 1.0, 2.0)
    lines = message(judgement, MESSAGES[name]).splitlines()
    assert len(lines) <= 10
    assert lines[0].startswith("mismatch: ")
    assert len(lines[0]) < 180
    assert lines[-1] == f"  replay  moe-ref replay {CASE_ID} --impl moe_fast --ranks local --device cpu"
    assert any(CASE_ID in line and "moe_fast 1" in line for line in lines[1:])


@pytest.mark.parametrize("judgement", [
    judge(Measurement((), tuple(f"{name}: shape (33, 96), but should be (66, 96) [rank 0]" for name in Stage)), FACTS,
          1.0, 2.0),
    Judgement(Verdict.CRASH, "RuntimeError: " + "the kernel says a lot " * 20 + "\n" + "trace\n" * 40),
    Judgement(Verdict.HANG, "no answer within 300 s\n" + "\n".join(f"stack line {n}" for n in range(200))),
], ids=["struct", "crash", "hang"])
def test_long_reasons_do_not_flood_the_terminal(judgement: Judgement) -> None:
    """The first line still fits a screen; details are the last three lines; the record has the rest."""
    lines = message(judgement).splitlines()
    assert len(lines) <= 10
    assert len(lines[0]) < 180
    assert lines[0].startswith(f"{judgement.verdict}: ")
    assert lines[-1].startswith("  replay  moe-ref replay ")


def test_even_a_reason_of_many_lines_beside_stages_keeps_to_ten() -> None:
    """The most that a record can hold: details, stages, place, worst element, bound, runs and replay."""
    judgement = Judgement(Verdict.MISMATCH, "act: 3x\none\ntwo\nthree\nfour", Stage.ACT)
    culprit = msgspec.structs.replace(BAD_ACT, worst=WORST)
    assert len(message(judgement, (culprit,)).splitlines()) <= 10


def test_a_broken_promise_names_no_bound() -> None:
    """A reduction that was never called is no question of rounding: all numbers are within their bounds."""
    judgement = judge(Measurement(GOOD, power=5.0), facts(calls=(REDUCE, ())), 1.0, 2.0)
    assert (judgement.verdict, judgement.first_stage) == (Verdict.STRUCT, Stage.REDUCED)
    assert Stage.REDUCED in [one.stage for one in GOOD]
    assert "bound" not in message(judgement, GOOD)


def test_a_pass_is_one_line() -> None:
    """And so is a case that was not run, with its reason."""
    assert message(Judgement(Verdict.PASS), GOOD) == "pass"
    assert message(Judgement(Verdict.UNSUPPORTED, "not declared: tp 8 above 4")) == \
           "unsupported: not declared: tp 8 above 4"


def test_the_place_of_the_worst_element_is_spelled_out() -> None:
    """Everything needed to look at it: token, slot, expert, rank, column, both values and the bound."""
    culprit = msgspec.structs.replace(BAD_ACT, worst=WORST)
    text = message(judge(Measurement((culprit,)), FACTS, 1.0, 2.0), (culprit,))
    assert "act[token 3, slot 1, expert 5, rank 1, column 130] got 1.0, want 2.0, allowed 0.25" in text
    assert "1 of 33 tokens (3), experts 1 of 8, ranks 0 of 2" in text
    assert "two sums of K = 96, silu, one store" in text
    assert "act 3 FAIL" in text
    assert "again   2 runs, same bits" in text
