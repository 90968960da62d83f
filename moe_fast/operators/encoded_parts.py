"""Encoded matrices as torch operators take them: a list of tensors and a list of numbers each, and the scheme once."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TypeVar

import torch

from moe_fast.form import Form
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Scheme

Tensors = Sequence[torch.Tensor | None]
"""codes, scales, zeros, groups and second scale; none at all where there is no matrix."""
Numbers = Sequence[int]
"""num_columns, row_start and column_start."""

TENSORS = ("codes", "scales", "zeros", "groups", "second_scale")
NUMBERS = ("num_columns", "row_start", "column_start")
MATRICES = ("w13", "w2", "shared_w13", "shared_w2")
"""Fields of arguments that are encoded matrices."""

Arguments = TypeVar("Arguments")


def flattened(scheme: Scheme, arguments: object) -> tuple:
    """What an operator takes: the scheme, and the fields in their order, a matrix as two lists, a form by its words."""
    flat: list[object] = [scheme.value]
    for field in fields(arguments):  # type: ignore[arg-type]
        value = getattr(arguments, field.name)
        if field.name not in MATRICES:
            flat.append(value.words if isinstance(value, Form) else value)
        elif value is None:
            flat += [[], []]
        else:
            flat += [[getattr(value, name) for name in TENSORS], [getattr(value, name) for name in NUMBERS]]
    return tuple(flat)


def restored(kind: type[Arguments], scheme: str, *flat: object) -> Arguments:
    """The arguments from what `flattened` made of them; raises UsageValueError for a scheme that there is not."""
    if scheme not in tuple(Scheme):
        raise UsageValueError(f"scheme {scheme!r}, but should be one of {', '.join(Scheme)}")
    values, held = iter(flat), {}
    for field in fields(kind):  # type: ignore[arg-type]
        held[field.name] = _matrix(Scheme(scheme), values) if field.name in MATRICES else next(values)
    return kind(**held)


def _matrix(scheme: Scheme, values: Iterator) -> Encoded | None:
    tensors, numbers = next(values), next(values)
    if not tensors:
        return None
    held, sizes = (dict(zip(names, given, strict=True)) for names, given in ((TENSORS, tensors), (NUMBERS, numbers)))
    return Encoded(scheme=scheme, **held, **sizes)
