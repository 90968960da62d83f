"""Operators that are gradients themselves have none."""

from moe_ref.contract.errors import UsageValueError


def refuse_second_gradients(ctx: object, *gradients: object) -> None:
    """Raise UsageValueError: what a backward operator's autograd formula is."""
    raise UsageValueError("moe_fast: a gradient of a gradient, but only first gradients are implemented")
