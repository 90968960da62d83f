"""Wrong implementations must be caught where they are wrong: a harness is as good as the defects it names.

Each entry says which case shows a defect and what the message must name: the first failing stage in the order
of data, the experts and ranks at fault. A case that a defect cannot change is no use here, so each was chosen
with the defect in mind: gelu for a wrong activation, several groups with K above the number kept, and so on.
"""

import shlex
from dataclasses import dataclass
from functools import cache

import pytest

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.records.schema import CaseLine
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.verify.run.session import Session
from tests.command_line import command
from tests.in_process import judged
from tests.subjects import wrong

PLAIN = "v1-T33.H96.I160.E8.K2"
ALL = tuple(range(8))


@dataclass(frozen=True)
class Caught:
    """How a defect must be reported; experts and ranks as the first failing stage lists them."""

    case: str
    stage: Stage | None
    experts: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0,)
    verdict: Verdict = Verdict.MISMATCH
    words: str = ""


DEFECTS = {
    # Experts.
    "last_block_of_k_dropped": Caught(PLAIN + "-bf16-norm-tp2", Stage.ACT, (3,), (0, 1)),
    "gate_up_swapped": Caught(PLAIN + "-fp32-norm", Stage.ACT, ALL),
    "silu_for_gelu": Caught("v1-T17.H80.I72.E5.K3-bf16-norm-gelu", Stage.ACT, ALL[:5]),
    "truncating_store": Caught(PLAIN + "-bf16-norm", Stage.ACT, ALL),
    "neighbour_expert": Caught(PLAIN + "-bf16-norm-tp2", Stage.DOWN, (2,), (0, 1), words="1 token"),
    "columns_swapped": Caught(PLAIN + "-bf16-norm-tp2", Stage.DOWN, ALL, (1,)),
    "stride_wraps": Caught(PLAIN + "-bf16-norm", Stage.DOWN, (5, 6, 7)),
    "bf16_accumulation": Caught(PLAIN + "-bf16-norm", Stage.DOWN, ALL),
    # 160 columns over 3 ranks are 54, 53 and 53, so only rank 0 loses one.
    "even_split_assumed": Caught(PLAIN + "-bf16-norm-tp3", Stage.DOWN, ALL),
    "weight_twice": Caught(PLAIN + "-bf16-norm-tp2", Stage.DOWN, ALL, (0, 1)),
    # Router; its stages belong to no single expert.
    "not_renormalised": Caught(PLAIN + "-bf16-norm-tp2", Stage.WEIGHTS, (), (0, 1)),
    "scaling_dropped": Caught("v1-T17.H80.I72.E5.K3-bf16-norm-scale2.5", Stage.WEIGHTS),
    "bias_in_weights": Caught("v1-T17.H80.I72.E8.K3-bf16-sigmoid-norm-bias", Stage.WEIGHTS),
    "group_limit_ignored": Caught("v1-T33.H96.I160.E8.K4-fp32-norm-g4.2", Stage.IDS),
    "ties_to_higher_id": Caught(PLAIN + "-fp32-norm-ties-tp2", Stage.IDS, (), (0, 1), words="lower id"),
    # Merge and ranks.
    "shared_per_rank": Caught("v1-T17.H80.I72.E5.K3-bf16-norm-sh39-tp2", Stage.MERGED, (), (0, 1)),
    "all_reduce_left_out": Caught(PLAIN + "-bf16-norm-tp3", Stage.REDUCED, (), (0, 1, 2),
                                  words="missing"),
    "all_reduce_twice": Caught(PLAIN + "-bf16-norm-tp2", Stage.REDUCED, (), (0, 1)),
    "residual_per_rank": Caught("v1-T40.H72.I90-bf16-res-tp4", Stage.REDUCED, (), (0, 1, 2, 3)),
    # Memory, promises, structure.
    "uninitialised_tail": Caught(PLAIN + "-bf16-norm", Stage.MERGED, words="1 token"),
    "second_run_only": Caught(PLAIN + "-bf16-norm", Stage.MERGED),
    "nondeterministic": Caught("v1-T17.H80.I72.E5.K3-fp32-norm", None, verdict=Verdict.NONDETERMINISTIC,
                               words="merged"),
    "input_changed": Caught(PLAIN + "-bf16-norm", None, verdict=Verdict.STRUCT, words="x_TH"),
    "one_stage_missing": Caught(PLAIN + "-bf16-norm-tp2", None, verdict=Verdict.STRUCT, words="rank 1"),
}

REPLAYED = ("neighbour_expert", "all_reduce_left_out", "nondeterministic", "second_run_only")
"""One of each kind: runs and replays are processes of their own, so not all of them."""


@cache
def line_of(name: str) -> CaseLine:
    """What a run in this process says of a defect, with the same request, measurement and verdict as any other."""
    return judged(getattr(wrong, name), DEFECTS[name].case)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_caught_where_it_is(name: str) -> None:
    line, caught = line_of(name), DEFECTS[name]
    assert (line.verdict, line.first_stage) == (caught.verdict, caught.stage), line.message
    assert caught.words in line.message
    if caught.stage is not None:
        stage = next(one for one in line.stages if one.stage == caught.stage)
        assert tuple(stage.bad_experts) == caught.experts, line.message
        assert tuple(stage.bad_ranks) == caught.ranks, line.message


@pytest.mark.parametrize("name", DEFECTS)
def test_the_message_is_short_and_ends_with_the_replay(name: str) -> None:
    lines = line_of(name).message.splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 200
    assert lines[0].startswith(DEFECTS[name].verdict)
    assert lines[-1].startswith("  replay  moe-ref replay ")


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("name", REPLAYED)
def test_the_replay_line_gives_the_same_verdict(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The replay line of a run is a command; in a child of its own, its message begins as that of every other run."""
    session = Session.start(f"tests.subjects.wrong:{name}", "cpu")
    try:
        line = session.run(PlannedCase(case=parse_case(DEFECTS[name].case), purpose="defects"))
    finally:
        session.close()
    program, *replay = shlex.split(line.replay)
    assert (program, replay[0]) == ("moe-ref", "replay")
    assert command(*replay) == 1
    [first, *_] = capsys.readouterr().out.splitlines()
    assert first == line.message.splitlines()[0] == line_of(name).message.splitlines()[0]
