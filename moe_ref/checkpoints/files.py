"""The safetensors files of a checkpoint: which file holds which tensor, and slices of it.

Nothing is executed or unpickled, and no file outside the checkpoint's folder is named by its index. Links are
followed: a download cache keeps a folder of links to its files.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from moe_ref.contract.errors import UsageValueError, raise_faults

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class StoredSlice:
    """A tensor in a file: shape and dtype name from the header; a tuple of slices reads that part alone."""

    def __init__(self, handle: Any, name: str) -> None:
        self._slice = handle.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype: str = self._slice.get_dtype()

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        return self._slice[index]


class CheckpointFiles:
    """Names of all tensors of a checkpoint; files are mapped once, when a tensor is asked for.

    path: a folder with model.safetensors or model.safetensors.index.json, one of the two files, or any other
    .safetensors file. Raises UsageValueError for pickled files, broken files and an index that leaves the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _find(Path(path))
        self._handles: dict[Path, Any] = {}
        if self.path.name.endswith(".json"):
            self._files = _read_index(self.path)
        else:
            self._files = dict.fromkeys(self._open(self.path).keys(), self.path)

    @property
    def names(self) -> list[str]:
        """Every tensor."""
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def stored(self, name: str) -> StoredSlice:
        """One tensor by name; raises UsageValueError where its file is missing, broken or does not hold it."""
        file = self._files[name]
        handle = self._open(file)
        if name not in handle.keys():  # noqa: SIM118 (a file handle is no mapping)
            raise UsageValueError(f"{name}: the index says {file.name}, but that file does not hold it")
        return StoredSlice(handle, name)

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            if not file.is_file():
                raise UsageValueError(f"{file}: no such file")
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UsageValueError(f"{file}: not a safetensors file: {error}") from error
        return self._handles[file]


def _find(path: Path) -> Path:
    """The file to begin with."""
    if path.is_file():
        if path.suffix in PICKLED:
            raise UsageValueError(f"{path}: {_refusal(path)}")
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            raise UsageValueError(f"{path}: should end with .safetensors or .safetensors.index.json")
        return path
    if not path.is_dir():
        raise UsageValueError(f"{path}: no such file or folder")
    found = [path / name for name in (SINGLE, INDEX) if (path / name).is_file()]
    if len(found) > 1:
        raise UsageValueError(f"{path}: holds both {SINGLE} and {INDEX}; give the path of one of them")
    if not found:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
        raise UsageValueError(f"{path}: " + (f"only {', '.join(pickled)}: {_refusal(path / pickled[0])}" if pickled
                                             else f"neither {SINGLE} nor {INDEX}"))
    return found[0]


def _refusal(path: Path) -> str:
    return (f"{path.suffix} files are pickled, and reading one can run any code that it holds; "
            "convert the checkpoint to safetensors")


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise UsageValueError(f"{path}: not an index of safetensors files: {error}") from error
    faults = [f"{name} is in {file!r}, but should be in a .safetensors file inside the folder of the index"
              for name, file in weight_map.items() if not _is_inside(file)]
    raise_faults(str(path), faults)
    return {name: path.parent / file for name, file in weight_map.items()}


def _is_inside(file: str) -> bool:
    """A relative path without a step upwards, under the rules of either kind of system."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    steps = {*posix.parts, *windows.parts}
    return (file.endswith(".safetensors") and not posix.is_absolute() and not windows.drive and not windows.root
            and ".." not in steps and "\0" not in file)
