"""The memory of one launch: every tensor argument in an address range of its own, every access checked and
direct.

A kernel sees virtual addresses: argument number i starts in the middle of slot i, slots are 2**44 bytes
apart. So a pointer that runs out of its tensor never falls into another one, and the message can name the
argument. Loads and stores index a NumPy view of the tensor, which also is several times faster than
upstream's loop over lanes.
"""

import numpy as np
import torch

from moe_fast.interpreter.errors import OutOfBoundsError
from moe_fast.interpreter.races import StoreLog

_SLOT_BITS = 44
_MIDDLE = 1 << (_SLOT_BITS - 1)
_PAGE_MASK = 4095  # the virtual address keeps the alignment of the real one up to a page


class _Bytes:
    """`count` bytes at `address` for np.asarray, by NumPy's array interface protocol, version 3."""

    def __init__(self, address: int, count: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (count,), "typestr": "|u1",
                                    "version": 3}


class Region:
    """The bytes one tensor argument spans, from its first to its last element, at a virtual address."""

    def __init__(self, index: int, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.tensor = tensor  # keeps the memory alive
        self.itemsize = tensor.element_size()
        self.real = tensor.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.size = (reach + 1) * self.itemsize if tensor.numel() else 0
        self.low = (index << _SLOT_BITS) + _MIDDLE + (self.real & _PAGE_MASK)
        self.high = self.low + self.size
        self._arrays: dict[np.dtype, np.ndarray] = {}

    def array(self, dtype: np.dtype) -> np.ndarray:
        """The bytes as one-dimensional array of `dtype`, trailing bytes that fill no element left out."""
        if dtype not in self._arrays:
            whole = self.size - self.size % dtype.itemsize
            self._arrays[dtype] = np.asarray(_Bytes(self.real, whole)).view(dtype)
        return self._arrays[dtype]


class Memory:
    """All regions of one launch, with the checks of every access."""

    def __init__(self, kernel: str, races: bool) -> None:
        self.kernel = kernel
        self.program: tuple[int, int, int] = (0, 0, 0)
        self.regions: list[Region] = []
        self.stores = StoreLog(kernel) if races else None

    def address(self, name: str, tensor: torch.Tensor) -> int:
        """Take `tensor` in and return its virtual address."""
        region = Region(len(self.regions), name, tensor)
        self.regions.append(region)
        return region.low

    def load(self, pointers: np.ndarray, mask: np.ndarray | None, other: np.ndarray | None,
             dtype: np.dtype) -> np.ndarray:
        """The values at `pointers`; where not `mask`, `other` or zero."""
        found = self._inside(pointers, mask, dtype.itemsize, "load")
        if found is None:
            return self._load_split(pointers, mask, other, dtype)
        region, inside = found
        offsets = pointers - np.uint64(region.low) if inside else \
            np.where(mask, pointers, np.uint64(region.low)) - np.uint64(region.low)
        loaded = region.array(dtype).take(self._elements(region, offsets, dtype))
        if mask is None:
            return loaded
        return np.where(mask, loaded, dtype.type(0) if other is None else other)

    def store(self, pointers: np.ndarray, data: np.ndarray, mask: np.ndarray | None, dtype: np.dtype) -> None:
        """Write `data` to `pointers` where `mask`."""
        if mask is not None and not mask.all():
            pointers, data = pointers[mask], np.broadcast_to(data, pointers.shape)[mask]
        for region, lanes in self._split(pointers, dtype.itemsize, "store"):
            offsets = pointers[lanes] - np.uint64(region.low)
            if self.stores is not None:
                self.stores.record(region, offsets, dtype.itemsize, self.program)
            elements = self._elements(region, offsets, dtype)
            region.array(dtype)[elements] = np.broadcast_to(data, pointers.shape)[lanes]

    def real_pointers(self, pointers: np.ndarray, mask: np.ndarray | None, itemsize: int,
                      action: str) -> np.ndarray:
        """Real addresses for upstream's atomics; lanes outside `mask` keep their virtual one."""
        real = pointers.copy()
        active = pointers if mask is None else pointers[mask]
        moved = active.copy()
        for region, lanes in self._split(active, itemsize, action):
            moved[lanes] = active[lanes] - np.uint64(region.low) + np.uint64(region.real)
        if mask is None:
            return moved
        real[mask] = moved
        return real

    def _inside(self, pointers: np.ndarray, mask: np.ndarray | None, itemsize: int,
                action: str) -> tuple[Region, bool] | None:
        """The region of all active lanes, and whether the others lie in it too; None if there are several."""
        region = self._common(pointers, itemsize)
        if region is not None:
            return region, True
        active = pointers if mask is None else pointers[mask]
        if mask is not None and active.size:
            region = self._common(active, itemsize)
            if region is not None:
                return region, False
        return None

    def _common(self, pointers: np.ndarray, itemsize: int) -> Region | None:
        single = pointers.size == 1
        low, high = (pointers.item(),) * 2 if single else (int(pointers.min()), int(pointers.max()))
        index = low >> _SLOT_BITS
        if index < len(self.regions):
            region = self.regions[index]
            if region.low <= low and high + itemsize <= region.high:
                return region
        return None

    def _split(self, pointers: np.ndarray, itemsize: int, action: str) -> list[tuple[Region, object]]:
        """(region, its lanes) for every region that `pointers` touch; raises OutOfBoundsError."""
        if not pointers.size:
            return []
        region = self._common(pointers, itemsize)
        if region is not None:
            return [(region, ...)]
        slots = pointers >> np.uint64(_SLOT_BITS)
        parts = []
        for slot in np.unique(slots).tolist():
            lanes = slots == slot
            if slot >= len(self.regions):
                self._raise_foreign(pointers[lanes], action)
            if self._common(pointers[lanes], itemsize) is None:
                self._raise_outside(self.regions[slot], pointers[lanes], itemsize, action)
            parts.append((self.regions[slot], lanes))
        return parts

    def _load_split(self, pointers: np.ndarray, mask: np.ndarray | None, other: np.ndarray | None,
                    dtype: np.dtype) -> np.ndarray:
        loaded = np.zeros(pointers.shape, dtype) if other is None else \
            np.broadcast_to(other, pointers.shape).astype(dtype)
        active = np.ones(pointers.shape, bool) if mask is None else mask
        chosen = pointers[active]
        gathered = np.empty(chosen.shape, dtype)
        for region, lanes in self._split(chosen, dtype.itemsize, "load"):
            offsets = chosen[lanes] - np.uint64(region.low)
            gathered[lanes] = region.array(dtype)[self._elements(region, offsets, dtype)]
        loaded[active] = gathered
        return loaded

    def _elements(self, region: Region, offsets: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Byte offsets as element numbers; only a pointer cast to a wider type can be misaligned."""
        shift = dtype.itemsize.bit_length() - 1
        if dtype.itemsize > region.itemsize and (offsets & np.uint64(dtype.itemsize - 1)).any():
            raise OutOfBoundsError(f"{self._where()}: argument {region.name} is accessed as "
                                   f"{dtype.itemsize}-byte elements at offsets that are no multiples of it")
        return (offsets >> np.uint64(shift)).view(np.int64) if shift else offsets.view(np.int64)

    def _where(self) -> str:
        return f"kernel {self.kernel}, program {self.program}"

    def _raise_outside(self, region: Region, pointers: np.ndarray, itemsize: int, action: str) -> None:
        offsets = pointers.astype(np.int64) - region.low
        wrong = (offsets < 0) | (offsets + itemsize > region.size)
        raise OutOfBoundsError(
            f"{self._where()}: {action} out of bounds of argument {region.name}: {int(wrong.sum())} lanes, "
            f"the first at byte offset {int(offsets[wrong][0])}, but {itemsize} bytes should fit in the "
            f"{region.size} bytes of shape {tuple(region.tensor.shape)}, strides {region.tensor.stride()}")

    def _raise_foreign(self, pointers: np.ndarray, action: str) -> None:
        raise OutOfBoundsError(
            f"{self._where()}: {action} out of bounds: {pointers.size} lanes, the first at address "
            f"{int(pointers.flat[0]):#x}, in none of the arguments "
            f"{', '.join(region.name for region in self.regions) or '(there are no tensor arguments)'}; "
            "addresses that do not come from an argument need checking(bounds=False, ...)")
