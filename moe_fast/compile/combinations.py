"""A launch as the compiler sees it: types, constants and hints that Triton's own rules derive from its arguments."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import groupby

import torch
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from moe_fast.compile.recorder import Launch, record
from moe_fast.compile.targets import ARCHITECTURES
from moe_fast.form import Form
from moe_ref.contract.case import Case

Constant = bool | int | float | str | None
_CONSTANT = "constexpr"


@dataclass(frozen=True)
class Combination:
    """What makes one compiled kernel: kernel as "module:name", each argument's type, constant or hint, and options.

    types: "constexpr" for constants, among them every integer argument that is 1. hints: "D" where an integer or an
    address is divisible by 16, "S" where a tensor is within 2 GiB (AMD).
    """

    kernel: str
    architecture: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    hints: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.partition(":")[2]

    @cached_property
    def key(self) -> str:
        """One line that tells it from every other; odd: not divisible by 16; wide: 2 GiB or more, where that counts."""
        options = "".join(f" {name.removeprefix('num_')}={value}" for name, value in self.options)
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        runs = groupby(kind for _, kind in self.types if kind != _CONSTANT)
        types = " ".join(f"{len(list(run))}{kind}" for kind, run in runs)
        kinds = dict(self.types)
        odd = [name for name, hint in self.hints if "D" not in hint and not kinds[name].startswith("fp")]
        wide = [] if ARCHITECTURES[self.architecture].is_nvidia else [
            name for name, hint in self.hints if "S" not in hint and kinds[name].startswith("*")]
        return (f"{self.architecture} {self.name}{options} | {constants} | {types}"
                + f" | odd {' '.join(odd)}" * bool(odd) + f" | wide {' '.join(wide)}" * bool(wide))

    @property
    def document(self) -> dict[str, object]:
        """Plain data, for another process."""
        return asdict(self)


def combinations_of(cases: Iterable[Case], architectures: Iterable[str], in_fp8: bool = False) -> list[Combination]:
    """Every distinct combination that these cases launch on these architectures, in order of first appearance.

    in_fp8: of layers that train in 8 bits.
    """
    found: dict[str, Combination] = {}
    cases = list(cases)
    for architecture in architectures:
        for case in cases:
            for launch in record(case, architecture, in_fp8):
                combination = combination_of(launch, architecture)
                found.setdefault(combination.key, combination)
    return list(found.values())


def combination_of(launch: Launch, architecture: str) -> Combination:
    """By the binder that a real launch runs: triton.runtime.jit (3.6 and 3.7)."""
    kernel = launch.kernel
    given = {name: _as_on_gpu(value) for name, value in launch.arguments.items()}
    bound, derived, options = _binder(kernel, architecture)(**given)
    types = tuple((name, kind) for name, (kind, _) in zip(bound, derived, strict=True))
    constants = tuple((name, _plain(bound[name])) for name, kind in types if kind == _CONSTANT)
    hints = tuple((name, hint or "") for name, (kind, hint) in zip(bound, derived, strict=True) if kind != _CONSTANT)
    return Combination(f"{kernel.fn.__module__}:{kernel.fn.__name__}", architecture, types, constants, hints,
                       tuple(sorted(options.items())))


def _plain(constant: Constant | Form) -> Constant:
    """What a line of JSON can hold; resources.py reads the words of a form back."""
    return constant.words if isinstance(constant, Form) else constant


def _as_on_gpu(argument: object) -> object:
    return _Pointer(argument) if isinstance(argument, torch.Tensor) else argument


@cache
def _binder(kernel: JITFunction, architecture: str):
    backend = make_backend(ARCHITECTURES[architecture].target)
    return create_function_from_signature(kernel.signature, kernel.params, backend)


class _Pointer:
    """What Triton asks of a tensor; meta tensors have no address, a real allocation starts at a multiple of 16."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.element_size()
        self._size = int(tensor.untyped_storage().size())

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return self._size
