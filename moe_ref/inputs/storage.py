"""Memory in another order than the canonical one, seen through a canonical view."""

from collections.abc import Sequence

import torch

from moe_ref.contract.vocabulary import Storage

_ORDERS = {
    Storage.IN_OUT: {"GIH": "HGI", "HI": "IH"},
    Storage.INTERLEAVED: {"GIH": "IGH", "GI": "IG"},
    Storage.IN_OUT_INTERLEAVED: {"GIH": "HIG", "HI": "IH", "GI": "IG"},
}
"""Axis letters of one expert's parameter -> their order in memory; what is not named lies as it is."""

_BEFORE, _AFTER = 3, 2
"""Columns around a padded tensor: odd together and apart, so that neither rows nor the first element are aligned."""
_AROUND = {True: float("nan"), False: 2**30}
"""What a kernel reads that leaves a padded tensor, by whether it is of floats."""


def empty_padded(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A part of a larger tensor: rows wider than it, a row before it, and before each matrix of several."""
    before = [_BEFORE if axis == len(shape) - 1 else int(axis < 2) for axis in range(len(shape))]
    after = [_AFTER if axis == len(shape) - 1 else 0 for axis in range(len(shape))]
    whole = torch.full([sum(sizes) for sizes in zip(before, shape, after, strict=True)],
                       _AROUND[dtype.is_floating_point], dtype=dtype, device=device)
    return whole[tuple(slice(start, start + size) for start, size in zip(before, shape, strict=True))]


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is a part of a larger tensor; see empty_padded."""
    return empty_padded(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def empty_stored(name: str, shape: tuple[int, ...], storage: Storage, *, dtype: torch.dtype,
                 device: torch.device | str) -> torch.Tensor:
    """Uninitialised parameter `name` of canonical `shape`, its memory in the order of `storage`."""
    if storage is Storage.PADDED:
        return empty_padded(shape, dtype=dtype, device=device)
    letters = name.rpartition("_")[2]
    order = _ORDERS.get(storage, {}).get(letters.removeprefix("E"))
    if order is None:
        return torch.empty(shape, dtype=dtype, device=device)
    order = letters[:len(letters) - len(order)] + order
    stored = torch.empty([shape[letters.index(axis)] for axis in order], dtype=dtype, device=device)
    return stored.permute([order.index(axis) for axis in letters])
