"""Memory in another order than the canonical one, seen through a canonical view."""

import torch

from moe_ref.contract.vocabulary import Storage

_ORDERS = {
    Storage.IN_OUT: {"GIH": "HGI", "HI": "IH"},
    Storage.INTERLEAVED: {"GIH": "IGH", "GI": "IG"},
    Storage.IN_OUT_INTERLEAVED: {"GIH": "HIG", "HI": "IH", "GI": "IG"},
}
"""Axis letters of one expert's parameter -> their order in memory; what is not named lies as it is."""


def empty_stored(name: str, shape: tuple[int, ...], storage: Storage, *, dtype: torch.dtype,
                 device: torch.device | str) -> torch.Tensor:
    """Uninitialised parameter `name` of canonical `shape`, its memory in the order of `storage`."""
    letters = name.rpartition("_")[2]
    order = _ORDERS.get(storage, {}).get(letters.removeprefix("E"))
    if order is None:
        return torch.empty(shape, dtype=dtype, device=device)
    order = letters[:len(letters) - len(order)] + order
    stored = torch.empty([shape[letters.index(axis)] for axis in order], dtype=dtype, device=device)
    return stored.permute([order.index(axis) for axis in letters])
