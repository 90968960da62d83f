"""Protects the comparison of CUDA graphs, which needs a GPU, from passing whatever they do: with pretended graphs."""

from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner

from ci import graphs
from ci.graphs import CASES, Call, Captured, draws, layer_call, main, replay_faults
from moe_ref.contract.case_id import parse_case

PLAIN = "v1-T16.H16.I16.E8.K2-bf16-norm"
SMALL = [PLAIN, "v1-T9.H24.I20.E8.K3-fp32-sigmoid-norm-bias-g4.2-top2sum-scale2.5-cap3-mlpbias-sh10-shgate-outbias"]
"""For the interpreter; a GPU has larger ones."""


def faithful(call: Call) -> Captured:
    """As a graph: results have addresses of their own, which a replay writes anew."""
    results = {name: tensor.clone() for name, tensor in call().items()}

    def replay() -> None:
        for name, tensor in call().items():
            results[name].copy_(tensor)
    return replay, results


def stale(call: Call) -> Captured:
    """A number that the host has read is a constant in the graph."""
    return lambda: None, call()


def with_old_choice(call: Call) -> Captured:
    """The routing of the capture, with the tokens of the replay."""
    replay, results = faithful(call)
    logits_TE = call.__closure__[[*call.__code__.co_freevars].index("given")].cell_contents.logits_TE
    kept_TE = logits_TE.detach().clone()

    def again() -> None:
        logits_TE.data.copy_(kept_TE)
        replay()
    return again, results


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("case_id", SMALL)
def test_what_is_captured_gives_the_same_twice(case_id: str) -> None:
    """The cases by themselves: gradients of all parameters that are not zero, and equal bits in every run."""
    results = layer_call(case_id, "cpu")[1]()
    parameters = {name for name in results if name.startswith("grad_w")}
    assert {"grad_x_TH", "grad_logits_TE", "grad_w13_EGIH", "grad_w2_EHI"} <= results.keys()
    assert all(bool(results[name].any()) for name in parameters)
    assert replay_faults(case_id, "cpu", faithful) == []


@pytest.mark.parametrize("capture", [stale, with_old_choice])
def test_a_graph_that_forgets_is_seen(capture: Callable[[Call], Captured]) -> None:
    found = replay_faults(PLAIN, "cpu", capture)
    assert any("elements of y_TH differ from the eager call" in fault for fault in found)
    assert any("grad_w13_EGIH" in fault for fault in found)


def test_cases_are_cases() -> None:
    """A mistake in an id would show on a GPU alone."""
    assert len({parse_case(case_id) for case_id in CASES}) == len(CASES)


def test_choices_change_from_draw_to_draw() -> None:
    """Some tokens' experts, and how many rows an expert has."""
    ids = [draw.logits_TE.topk(2).indices for draw in draws(PLAIN, "cpu")]
    counts = [torch.bincount(one.flatten(), minlength=8).tolist() for one in ids]
    assert counts[1] == [16, 16, 0, 0, 0, 0, 0, 0]
    assert len({tuple(count) for count in counts}) == 3


def test_without_a_gpu_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 1
    assert "no CUDA device here" in result.output
