"""What a subject shares with the harness in a process: what it replaces there holds for its own calls only."""

import builtins
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import safetensors.torch
import torch

_SHARED = (builtins, os, time, msgspec, msgspec.json, msgspec.msgpack, safetensors.torch, torch, torch.nn.functional)
_Place = tuple[Any, str]
"""A module or class and a name in it, or a default and no name."""


@dataclass(frozen=True)
class _Default:
    """A setting that all code of a process goes by."""

    words: str
    read: Callable[[], Any]
    write: Callable[[Any], None]


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # it has been removed


def _go(folder: str) -> None:
    if folder:
        os.chdir(folder)


def _set_device(device: torch.device) -> None:
    # Its own default is no device at all: a device, even the CPU, costs every operation a look.
    torch.set_default_device(None if device == torch.device("cpu") else device)


class _Streams:
    """Descriptors 0 to 2; copies of them, so that they can be had again."""

    def __init__(self) -> None:
        self._copies = [os.dup(number) for number in range(3)]
        self._ours = self.read()

    def read(self) -> tuple[tuple[int, int] | None, ...]:
        """The file of each, None where it is closed."""
        return tuple(map(_file_of, range(3)))

    def write(self, files: tuple[tuple[int, int] | None, ...]) -> None:
        """What a subject has made of them is its own to make again."""
        if files == self._ours:
            for number, copy in enumerate(self._copies):
                os.dup2(copy, number)


def _file_of(number: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(number)
    except OSError:
        return None
    return found.st_dev, found.st_ino


_DEFAULTS = (
    _Default("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Default("the default device", torch.get_default_device, _set_device),
    _Default("the number of threads", torch.get_num_threads, torch.set_num_threads),
    _Default("the current folder", _folder, _go))


class ReplacedHarness(TypeError):
    """A subject has changed the harness that judges it; the message names what."""


class Surroundings:
    """Functions and defaults as the harness has them, and as the subject has left them.

    Made before the subject is loaded. What its module replaces when it is loaded is its own way to work; what a call
    replaces would be there in the next case too, which would then depend on the cases before it.
    """

    def __init__(self) -> None:
        harness = _harness()
        self._ours: dict[_Place, Any] = {(space, name): value for space in (*_SHARED, *harness)
                                         for name, value in vars(space).items() if _is_code(value)}
        # Most methods are inherited: None stands for those.
        self._ours |= {(torch.Tensor, name): vars(torch.Tensor).get(name) for name in dir(torch.Tensor)}
        streams = _Streams()
        defaults = (*_DEFAULTS, _Default("the standard streams", streams.read, streams.write))
        self._ours |= {(default, ""): default.read() for default in defaults}
        self._harness = frozenset(map(id, harness))
        self._theirs: dict[_Place, Any] = {}
        self._loaded: dict[_Place, Any] = {}
        # Loading counts as a call. Virtual ranks take turns inside theirs.
        self._calls, self._is_lent = 1, True
        self.left: list[str] = []

    def keep_loaded(self) -> None:
        """The subject is loaded: what it has replaced so far is no trace of a case."""
        self._take_back()
        self._calls, self._loaded = 0, dict(self._theirs)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """For a rank's part of a case, outside its calls; then those of ranks that are in a call are lent again."""
        self._take_back()
        try:
            yield
        finally:
            if self._calls:
                self._lend()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For a call of the subject, with its own replacements; raises ReplacedHarness if they are the harness's."""
        process = os.getpid()
        self._calls += 1
        self._lend()
        try:
            yield
        finally:
            self._calls -= 1
            self._take_back()
            if os.getpid() != process:
                # The subject has forked and comes back twice; there is one answer.
                os._exit(0)
            if self._calls == 0:
                self._note()

    def _lend(self) -> None:
        for place, value in self._theirs.items():
            _put(place, value)
        self._is_lent = True

    def _take_back(self) -> None:
        if not self._is_lent:
            return
        taken, self._theirs, self._is_lent = [], {}, False
        for place, ours in self._ours.items():
            theirs = _there(place)
            if theirs is ours or (place[1] == "" and theirs == ours):
                continue
            _put(place, ours)
            if id(place[0]) in self._harness:
                taken.append(_name(place))
            else:
                self._theirs[place] = theirs
        if taken:
            raise ReplacedHarness(f"replaced {', '.join(taken)}, but the harness is not an implementation's to change")

    def _note(self) -> None:
        """What differs, now that no call is under way, from what the subject replaced when it was loaded."""
        self.left += [_name(place) for place, theirs in self._theirs.items() if _name(place) not in self.left
                      and not (place in self._loaded and self._loaded[place] == theirs)
                      and not (place[1] and _is_torch(theirs))]


def _name(place: _Place) -> str:
    return f"{place[0].__name__}.{place[1]}" if place[1] else place[0].words


def _is_torch(value: Any) -> bool:
    """Torch replaces functions of its own, when its compiler is first loaded and with the default dtype."""
    return (getattr(value, "__module__", None) or "").split(".")[0] == "torch"


def _there(place: _Place) -> Any:
    return vars(place[0]).get(place[1]) if place[1] else place[0].read()


def _put(place: _Place, value: Any) -> None:
    if place[1] == "":
        place[0].write(value)
    elif value is None:
        delattr(*place)
    else:
        setattr(*place, value)


def _is_code(value: object) -> bool:
    return callable(value) or isinstance(value, property | staticmethod | classmethod)


def _harness() -> list[Any]:
    """Modules and classes of this package that are loaded."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "moe_ref"]
    classes = [value for module in modules for value in vars(module).values()
               if isinstance(value, type) and value.__module__ == module.__name__]
    return [*modules, *classes]
