"""Layers past 2^31 elements, here past 2^13: exact, larger than asked for, and one wrong element is enough."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ci import large_shapes
from ci.large_layers import SHAPES


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("name", SHAPES)
def test_large_shapes_are_past_the_limit_and_exact(name: str) -> None:
    """In the small: every element of rows, results and gradients, in the interpreter."""
    sizes = SHAPES[name].sizes(2**13, True)
    counts = {"rows": sizes.tokens * sizes.top_k * sizes.hidden, "tokens": sizes.tokens * sizes.hidden,
              "act": sizes.tokens * sizes.top_k * sizes.intermediate / 2,
              "experts": sizes.experts * 2 * sizes.intermediate * sizes.hidden / 2}
    assert 2**13 < counts[name] < 2**14
    assert large_shapes.run_shape(sizes, "cpu") == []


@pytest.mark.parametrize("name", ["down", "result without a trace", "grad_w13", "grad_x"])
def test_one_wrong_element_of_a_large_shape_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one of a tensor, off by one, as the layer shows it."""
    fast = large_shapes.moe_fast.experts

    def experts(x_TH: torch.Tensor, routing: Any, weights: Any, spec: Any, trace: Any = None) -> torch.Tensor:
        y_TH = fast(x_TH, routing, weights, spec, trace=trace)
        if trace is not None and name in trace.tensors:
            trace.tensors[name][-1, -1] += 1
        if not torch.is_grad_enabled() and trace is None and name.startswith("result"):
            y_TH[-1, -1] += 1
        return y_TH

    def gradients(*arguments: Any) -> list[torch.Tensor]:
        found = dict(zip(("grad_x", "grad_weights", "grad_w13", "grad_w2"), grad(*arguments), strict=True))
        if name in found:
            found[name].view(-1)[-1] += 1
        return list(found.values())

    grad = torch.autograd.grad
    monkeypatch.setattr(large_shapes, "moe_fast", SimpleNamespace(experts=experts))
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    words = large_shapes.run_shape(SHAPES["tokens"].sizes(2**12, True), "cpu")
    assert any(text.startswith(f"{name}: 1 of ") for text in words), words


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_shapes, "free_bytes", lambda device: 2**30)
    done = CliRunner().invoke(large_shapes.main, ["tokens", "--device", "cpu"])
    assert done.exit_code == 4
    assert "NOT RUN" in done.output
    assert "GiB, and 1.0 GiB are free" in done.output
