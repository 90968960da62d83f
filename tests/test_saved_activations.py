"""Gate and up saved for the backward pass instead of made again: a choice of memory or time that changes no bit."""

import warnings

import pytest
import torch
from torch.library import opcheck

import moe_fast
from moe_fast import memory
from moe_fast.operators import saved_experts as operators
from tests.backward_cases import draw
from tests.test_fast_backward import CASES, gradients, inputs_of
from tests.test_operators import FORMS, arguments

KINDS = ["everything", "every bias", "one choice", "every choice"]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the products that were saved: a choice that nobody listens to would change no bit either."""
    shapes: list[torch.Size] = []
    operator = operators.saved_experts

    def watched(*values: object) -> operators.Three:
        found = operator(*values)
        shapes.append(found[1].shape)
        return found

    monkeypatch.setattr(operators, "saved_experts", watched)
    return shapes


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_saved_or_made_again_the_gradients_have_the_same_bits(name: str, dtype: torch.dtype,
                                                              saved: list[torch.Size]) -> None:
    """Of tokens, routing and every weight."""
    inputs, spec = inputs_of(name, dtype), CASES[name]
    again = gradients(inputs, spec)
    assert not saved
    with moe_fast.saving_activations():
        found = gradients(inputs, spec)
    assert saved == [(len(inputs.x_TH) * spec.router.top_k, 2, spec.intermediate_size)]
    assert found.keys() == again.keys()
    assert [name for name in again if not same(found[name], again[name])] == []


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two gradients have the same bits; the selection bias has none."""
    return one is other if one is None or other is None else torch.equal(one, other)


def test_chunks_of_a_long_prefill_save_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk sorts its rows by itself, and the backward pass sorts all of them."""
    spec = CASES["everything"]
    inputs = draw(spec, num_tokens=37, dtype=torch.float32)
    again = gradients(inputs, spec)
    monkeypatch.setattr(memory, "CHUNK_ROWS", 8)
    with moe_fast.saving_activations():
        found = gradients(inputs, spec)
    # The layer is narrower than a tile, so that a chunk of few rows adds up in the same order.
    assert [name for name in again if not same(found[name], again[name])] == []


def test_nothing_is_saved_where_no_gradient_is_recorded(saved: list[torch.Size]) -> None:
    """Serving pays nothing for a choice that was made for training."""
    inputs = inputs_of("everything")
    with moe_fast.saving_activations(), torch.no_grad():
        moe_fast.moe(inputs.x_TH, inputs.weights, CASES["everything"])
    with moe_fast.saving_activations():
        moe_fast.moe(inputs.x_TH, inputs.weights, CASES["everything"])
    assert not saved


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("name", FORMS)
def test_torch_checks_the_operator(name: str) -> None:
    """Schema, fake, autograd registration and ahead-of-time dispatch, in every form; experts at hand for all rows."""
    given = arguments(num_tokens=4, hosted=(0, 1, 2, 3, 4), shared="gated", forms=FORMS[name], grad=True)
    given[1] = torch.tensor([[0, 4], [2, 1], [3, 4], [1, 0]])
    opcheck(operators.saved_experts, given)


def test_the_layer_compiles_with_saved_activations() -> None:
    """Without a graph break; a function that was compiled without them is compiled again, not used as it is."""
    inputs, spec = inputs_of("everything"), CASES["everything"]
    torch._dynamo.reset()
    compiled = torch.compile(moe_fast.moe, fullgraph=True, backend="aot_eager")
    x_TH = inputs.x_TH.clone().requires_grad_()

    def held_by_graph() -> set[str]:
        names: set[str] = set()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lru_cache.*")  # torch traces through the caches of checks, and says so
            compiled(x_TH, inputs.weights, spec)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: names.add(str(tuple(tensor.shape))),
                                                      lambda packed: packed):
            y_TH = compiled(x_TH, inputs.weights, spec)
        assert torch.equal(y_TH, moe_fast.moe(x_TH, inputs.weights, spec))
        return names

    products = str((len(x_TH) * spec.router.top_k, 2, spec.intermediate_size))
    assert products not in held_by_graph()
    with moe_fast.saving_activations():
        assert products in held_by_graph()


def test_what_is_saved_is_known_before() -> None:
    """The formula, by the operator's own fake at a released size: Mixtral 8x7B on one of 8 ranks, 4096 tokens."""
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found = torch.ops.moe_fast.saved_experts(
        meta(4096, 4096), meta(4096, 2, dtype=torch.int32), meta(4096, 2, dtype=torch.float32),
        meta(8, dtype=torch.int64), meta(8, 2, 1792, 4096), meta(8, 4096, 1792), meta(2, 512, 4096), meta(4096, 512),
        None, "silu", "silu")
    assert sum(one.nbytes for one in found[1:]) == memory.saved_bytes(4096, 2, 1792, shared_size=512)
