"""What a subject allocates and does not write is poisoned wherever it does so."""

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moe_ref.verify.child.guard import poison


@torch.library.custom_op("guard_test::unwritten", mutates_args=())
def unwritten(x: torch.Tensor) -> torch.Tensor:
    """Memory as it comes."""
    return torch.empty_like(x)


unwritten.register_fake(torch.empty_like)
unwritten.register_autograd(lambda ctx, gradient: unwritten(gradient))


@pytest.mark.parametrize(("run", "value"), [(0, torch.nan), (1, 30000.0)])
def test_inside_custom_operators_and_their_gradients(run, value):
    """torch runs a custom operator outside of the mode that sees it, which left all of moe_fast's operators clean."""
    x = torch.ones(5, requires_grad=True)
    with poison(run):
        y = unwritten(x)
        y.backward(torch.ones(5))
    assert x.grad is not None
    for tensor in (y, x.grad):
        torch.testing.assert_close(tensor.detach(), torch.full((5,), value), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("run", "value"), [(0, torch.nan), (1, 448.0)])
def test_codes_in_8_bits(run, value):
    """e4m3 ends at 448, and torch refuses to fill with more."""
    with poison(run):
        codes = torch.empty(5, dtype=torch.float8_e4m3fn)
    torch.testing.assert_close(codes.float(), torch.full((5,), value), rtol=0, atol=0, equal_nan=True)


def test_not_outside():
    """An operator that a poison has reached into runs under no mode once that is left."""
    with poison(0):
        modes_inside(torch.ones(5))
    modes_inside(torch.ones(5))
    assert [len(modes) for modes in _modes] == [1, 0]


_modes: list[list[object]] = []


@torch.library.custom_op("guard_test::modes_inside", mutates_args=())
def modes_inside(x: torch.Tensor) -> torch.Tensor:
    """Keeps the modes that it runs under."""
    _modes.append(_get_current_dispatch_mode_stack())
    return x.clone()
