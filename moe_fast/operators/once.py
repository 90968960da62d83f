"""Operators without gradients: those that are gradients themselves, and those over codes."""

from moe_ref.contract.errors import UsageTypeError, UsageValueError


def refuse_second_gradients(ctx: object, *gradients: object) -> None:
    """Raise UsageValueError: what a backward operator's autograd formula is."""
    raise UsageValueError("moe_fast: a gradient of a gradient, but only first gradients are implemented")


def refuse_gradients_of_codes(ctx: object, *gradients: object) -> None:
    """Raise UsageTypeError: layers refuse gradients before they compute, operators by themselves when they are asked.
    """
    raise UsageTypeError("moe_fast: a gradient through encoded experts, but codes have none: the forward pass alone is "
                         "implemented")
