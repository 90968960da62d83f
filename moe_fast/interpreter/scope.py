"""triton.language as the interpreter needs it, swapped in for a launch and swapped out exactly."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction

from moe_fast.interpreter import memo

_MISSING = object()
_SPACES = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base, tl.dtype)
Change = tuple[object, str, object, object]


def restore(changes: list[Change]) -> None:
    """Put every changed attribute back, or take it away where there was none."""
    for space, name, old, _ in changes:
        if old is _MISSING:
            delattr(space, name)
        else:
            setattr(space, name, old)


@contextmanager
def swapped(changes: list[Change]) -> Iterator[None]:
    """The changed attributes inside the block, the original ones after it, also when the block raises."""
    for space, name, _, new in changes:
        setattr(space, name, new)
    try:
        yield
    finally:
        restore(changes)


def language_changes(semantic: object, overrides: dict[str, Callable], call: Callable) -> list[Change]:
    """All changes that interpretation needs, computed once: builtins bound to `semantic`, upstream's
    stand-ins for the rest, `overrides` for names of tl and tl.core, `call` for jit functions called inside a
    kernel.

    Upstream patches again for every nested device function and leaves its patches behind after a launch, so
    that a later triton.compile in the same process fails (seen in Triton 3.6 to 3.8); here a launch swaps
    once.
    """
    changes = []
    for space, name, old, new in _upstream_changes():
        original = getattr(space, name, None)
        if space in (tl, tl.core) and name in overrides:
            new = overrides[name]
        elif tl.core.is_builtin(original):
            new = _bound(original, semantic)
        elif space is tl.tensor and name == "__index__":
            new = _index
        elif space is tl.dtype and name == "to_ir":
            new = _to_ir
        changes.append((space, name, old, new))
    methods = [(name, value) for name, value in vars(tl.tensor).items() if isinstance(value, JITFunction)]
    changes += [(tl.tensor, name, value, _method(value, call)) for name, value in methods]
    memoised = [(upstream, "_get_np_dtype", memo.np_dtype), (tl.block_type, "__init__", memo.init_block_type),
                (tl.tensor, "__init__", memo.init_tensor), (upstream.TensorHandle, "__init__", memo.init_handle),
                (tl.core, "_unwrap_if_constexpr", memo.unwrapped), (tl.dtype, "__eq__", memo.equal)]
    changes += [(space, name, getattr(space, name), new) for space, name, new in memoised]
    return [*changes, (JITFunction, "__call__", JITFunction.__call__, call)]


def _upstream_changes() -> list[Change]:
    before = [dict(vars(space)) for space in _SPACES]
    # the only thing upstream reads from the kernel is which names of its module are tl and tl.core
    upstream._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    changes = [(space, name, old.get(name, _MISSING), value)
               for space, old in zip(_SPACES, before, strict=True)
               for name, value in list(vars(space).items())
               if old.get(name, _MISSING) is not value]
    restore(changes)
    return changes


def _bound(builtin: Callable, semantic: object) -> Callable:
    inner = getattr(builtin, "__wrapped__", builtin)

    def call(*args: object, **kwargs: object) -> object:
        kwargs["_semantic"] = semantic
        return inner(*args, **kwargs)

    return call


def _method(function: JITFunction, call: Callable) -> Callable:
    """x.sum(1) for tl.sum(x, 1): a JITFunction is no descriptor, so as a class attribute it would lose x."""

    def bound(self: object, *args: object, **kwargs: object) -> object:
        return call(function, self, *args, **kwargs)

    return bound


def _to_ir(self: tl.dtype, builder: object) -> tl.dtype:
    """A dtype is its own representation; upstream's table lacks the fnuz formats before Triton 3.8."""
    return self


def _index(self: tl.tensor) -> int:
    """Triton 3.6 calls int() on a 1-element array, a TypeError from NumPy 2.4 on; delete with Triton 3.6."""
    return int(self.handle.data.item())
