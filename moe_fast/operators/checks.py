"""Shapes and dtypes of operators' arguments, compared before any kernel starts, on fake tensors too."""

from collections.abc import Mapping

import torch

from moe_ref.contract.errors import UsageTypeError, raise_faults

Tensors = Mapping[str, torch.Tensor | None]


def check_shapes(operator: str, tensors: Tensors, sizes: dict[str, int]) -> None:
    """Raise UsageValueError unless every tensor has the axes of its name: x_TH is (sizes["T"], sizes["H"]).

    An axis that `sizes` leaves out gets the size that the first tensor with it has.
    """
    sizes, faults = dict(sizes), []
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        axes = name.rpartition("_")[2]
        if tensor.dim() == len(axes):
            for axis, size in zip(axes, tensor.shape, strict=True):
                sizes.setdefault(axis, size)
        wanted = tuple(sizes.get(axis, axis) for axis in axes)
        if tuple(tensor.shape) != wanted:
            shown = ", ".join(map(str, wanted)) + ("," if len(wanted) == 1 else "")
            faults.append(f"{name}: shape {tuple(tensor.shape)}, but should be ({shown})")
    raise_faults(operator, faults)


def check_dtypes(operator: str, tensors: Tensors, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise UsageTypeError unless every tensor is of one of the dtypes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise UsageTypeError(f"{operator}: {name}: dtype {tensor.dtype}, but should be "
                                 f"{' or '.join(map(str, allowed))}")


def check_one_device(operator: str, tensors: Tensors) -> None:
    """Raise UsageTypeError unless all tensors lie where the first does."""
    (first, leader), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != leader.device:
            raise UsageTypeError(f"{operator}: {name}: device {tensor.device}, but should be {leader.device} as "
                                 f"{first}")


def check_words(operator: str, words: Mapping[str, str], allowed: tuple[str, ...]) -> None:
    """Raise UsageValueError unless every word is one of those that the kernels know."""
    raise_faults(operator, [f"{name}={word!r}, but should be one of {', '.join(allowed)}"
                            for name, word in words.items() if word not in allowed])
