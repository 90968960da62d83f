"""The safetensors files of a checkpoint: which file holds which tensor, and slices of it.

Nothing is executed or unpickled, and no file outside the checkpoint's folder is named by its index. Links are
followed: a download cache keeps a folder of links to its files.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from moe_ref.checkpoints.name_ranges import name_ranges
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
    .safetensors file. Raises UsageValueError for pickled files, broken or unreadable files, keys that stand twice
    in an index or a header, and an index that leaves the folder.
    """

    def __init__(self, path: str | Path) -> None:
        with _readable(path):
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
            with _readable(file):
                if not file.is_file():
                    raise UsageValueError(f"{file}: no such file")
                try:
                    handle = safe_open(file, framework="pt")
                except SafetensorError as error:
                    raise UsageValueError(f"{file}: not a safetensors file: {error}") from error
                _check_header(file)
            self._handles[file] = handle
        return self._handles[file]


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """A path that the system refuses, by its length or by permissions, is the caller's mistake."""
    try:
        yield
    except OSError as error:
        raise UsageValueError(f"{path}: cannot be read: {error.strerror or error}") from error


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
    with _readable(path):
        text = path.read_bytes()
    try:
        weight_map = msgspec.convert(_decode(text), type=_Index).weight_map
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise UsageValueError(f"{path}: not an index of safetensors files: {error}") from error
    faults = [f"{name} is in {file!r}, but should be in a .safetensors file inside the folder of the index"
              for name, file in weight_map.items() if not _is_inside(file)]
    raise_faults(str(path), faults)
    return {name: path.parent / file for name, file in weight_map.items()}


def _check_header(file: Path) -> None:
    """Refuse keys that stand twice.

    The format forbids them, but safetensors 0.8 takes the last one, so that F16 may become BF16
    (https://github.com/safetensors/safetensors/issues/401). Delete this when safe_open refuses such a file.
    """
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    try:
        _decode(header)
    except (ValueError, RecursionError) as error:
        raise UsageValueError(f"{file}: not a safetensors file: {error}") from error


def _decode(text: bytes) -> object:
    """JSON in which a key that stands twice in one object is an error: parsers differ in which one they take."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(found := dict(pairs)) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = name_ranges(name for name, count in counts.items() if count > 1)
        raise ValueError(f"keys that stand there more than once, but should once: {', '.join(twice)}")
    return found


def _is_inside(file: str) -> bool:
    """A relative path without a step upwards, under the rules of either kind of system."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    steps = {*posix.parts, *windows.parts}
    return (file.endswith(".safetensors") and not posix.is_absolute() and not windows.drive and not windows.root
            and ".." not in steps and "\0" not in file)
