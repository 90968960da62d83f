"""Subjects of `moe-ref diverge` by name: what computes a grouped product, and what is declared of it.

torch:loop, torch:grouped and module:attr run here. moe_fast:* runs on CUDA where it has a kernel; on a CPU tl.dot is
NumPy's, so the declared accumulator of a hardware class takes its place and the curve is PREDICTED, as that of
model:ACCUMULATOR:OPERANDS.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.diverge.accumulators import Accumulator, Declared, accumulator, hardware_declared, three_products
from moe_ref.diverge.conversion import AS_THEY_ARE, Conversion
from moe_ref.diverge.grouped import fast_grouped, torch_grouped, torch_loop
from moe_ref.diverge.problem import GroupedProblem, Operands
from moe_ref.numerics.formats import Mode, round_to
from moe_ref.tolerances.load import load_tolerances

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_RK, w_ENK, ends_E) -> y_RN, rows sorted by expert; ends_E (int32): the row after each expert's last."""

FAST = {"ieee": Format.FP32, "tf32": Format.TF32, "tf32x3": Format.FP32, "fp16": Format.FP16, "bf16": Format.BF16,
        "fp8": Format.E4M3}
"""Operands of moe_fast:* and model:*."""

_KERNELS = ("ieee", "fp16", "bf16")
"""Of those, what moe_fast has a kernel for."""

_FORMATS = {dtype: Format(name) for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Subject:
    """predicted: a model in place of the thing itself. conversion, declared, stored: what it says that it does to its
    operands, in its sums and with its result. run(problem, operands) -> (y_RN in fp64, the format of its numbers).
    """

    name: str
    predicted: bool
    conversion: Conversion
    declared: Declared
    run: Callable[[GroupedProblem, Operands], tuple[torch.Tensor, Format]]
    note: str = ""


@dataclass(frozen=True)
class Place:
    """Where subjects run, and the hardware class whose accumulators are declared for it; `hardware` where predicted."""

    device: str = "cpu"
    hardware: str = "sm90"

    def __post_init__(self) -> None:
        known = [name for name, one in load_tolerances().file.hardware.items() if one.truncates]
        if self.hardware not in known:
            raise UsageValueError(f"hardware {self.hardware!r}, but should be one of {', '.join(known)}")

    @property
    def measured(self) -> str:
        """The class of the device itself; an unknown CUDA device is the worst of all."""
        if self.device == "cpu":
            return "cpu"
        name = "sm" + "".join(map(str, torch.cuda.get_device_capability()))
        return name if name in load_tolerances().file.hardware else "cuda"


def find_subject(name: str, dtype: Format, place: Place) -> Subject:
    """The subject of that name for operands drawn in `dtype`; UsageValueError that says what names there are."""
    family, _, rest = name.partition(":")
    if family == "moe_fast" and rest in FAST:
        return _fast(name, rest, place)
    if family == "torch" and rest.partition(":")[0] in ("loop", "grouped"):
        kind, _, named = rest.partition(":")
        return _torch(name, kind, named, dtype, place)
    if family == "model" and rest.count(":") == 1:
        return _model(name, *rest.split(":"))
    if family in ("moe_fast", "torch", "model") or not rest:
        raise UsageValueError(f"subject {name!r}, but should be moe_fast:{{{','.join(FAST)}}}, torch:loop[:DTYPE], "
                              "torch:grouped[:DTYPE], model:ACCUMULATOR:OPERANDS or module:attr")
    return _measured(name, _import(name), dtype, place)


def _fast(name: str, operands: str, place: Place) -> Subject:
    if place.device == "cuda" and operands in _KERNELS:
        return _measured(name, fast_grouped, FAST[operands], place)
    why = "tl.dot is NumPy's on a CPU" if operands in _KERNELS else f"moe_fast has no {operands} kernel"
    stored = FAST[operands] if operands in ("fp16", "bf16") else Format.FP32
    hardware = place.hardware if place.device == "cpu" else place.measured
    found, conversion = _accumulates(hardware, operands)
    return Subject(name, True, conversion, found.declared, _simulated(conversion, found, stored),
                   f"{why}: {found.declared.words}")


def _torch(name: str, kind: str, dtype_name: str, dtype: Format, place: Place) -> Subject:
    if dtype_name and dtype_name not in list(Dtype):
        raise UsageValueError(f"subject {name!r}: dtype {dtype_name!r}, but should be one of {', '.join(Dtype)}")
    return _measured(name, torch_loop if kind == "loop" else torch_grouped, Format(dtype_name or dtype), place)


def _model(name: str, summed: str, operands: str) -> Subject:
    found, conversion = _accumulates(summed, operands)
    return Subject(name, True, conversion, found.declared, _simulated(conversion, found, Format.FP32),
                   found.declared.words)


def _accumulates(summed: str, operands: str) -> tuple[Accumulator, Conversion]:
    """The accumulator and what is made of the operands before it; tf32 as the hardware makes it, or by a suffix."""
    base, _, made = operands.partition("-")
    modes: dict[str, Mode] = {"rounded": "nearest", "cut": "truncate"}
    if base not in FAST or (made and (base != "tf32" or made not in modes)):
        raise UsageValueError(f"operands {operands!r}, but should be one of {', '.join(FAST)}, tf32-rounded, tf32-cut")
    known = load_tolerances().file.hardware
    mode: Mode = modes.get(made) or (known[summed.partition("-")[0]].tf32_operands if summed.partition("-")[0] in known
                                     else "nearest")
    if base == "tf32x3":
        if summed not in known or not known[summed].truncates:
            raise UsageValueError(f"tf32x3 with accumulator {summed!r}, but should be a class with tensor cores")
        return three_products(summed, mode), AS_THEY_ARE
    stored = FAST[base]
    conversion = AS_THEY_ARE if base == "ieee" else Conversion(stored, mode if base == "tf32" else "nearest",
                                                               scaled=base == "fp8")
    return accumulator(summed, stored), conversion


def _simulated(conversion: Conversion, found: Accumulator,
               stored: Format) -> Callable[[GroupedProblem, Operands], tuple[torch.Tensor, Format]]:
    """Converted operands, summed by the accumulator on every rank, stored, and added in rank order."""
    def run(problem: GroupedProblem, operands: Operands) -> tuple[torch.Tensor, Format]:
        codes_RK, scale_R1 = conversion.codes(operands.x_RK.double())
        codes_ENK, scale_EN1 = conversion.codes(operands.w_ENK.double())
        y_RN = torch.zeros(len(codes_RK), codes_ENK.shape[1], dtype=torch.float64)
        for first, last in problem.cuts:
            for e, start, stop in operands.groups():
                part_RN = found.matmul(codes_RK[start:stop, first:last], codes_ENK[e, :, first:last].T.contiguous())
                part_RN = round_to(torch.ldexp(part_RN, scale_R1[start:stop] + scale_EN1[e].T), stored)
                y_RN[start:stop] = round_to(y_RN[start:stop] + part_RN, stored)
        return y_RN, stored
    return run


def _measured(name: str, call: Call, operands: Format, place: Place) -> Subject:
    """What runs on the device: operands in the dtype of that format, results added in rank order in their own dtype."""
    dtype = torch.bfloat16 if operands is Format.E4M3 else TORCH_DTYPES[operands]

    def run(problem: GroupedProblem, handed: Operands) -> tuple[torch.Tensor, Format]:
        total_RN: torch.Tensor | None = None
        for first, last in problem.cuts:
            part = handed.rank_part(first, last)
            y_RN = call(part.x_RK.to(place.device, dtype), part.w_ENK.to(place.device, dtype),
                        part.ends_E.to(place.device))
            _check_result(name, y_RN, (problem.rows, problem.columns))
            total_RN = y_RN if total_RN is None else total_RN + y_RN
        assert total_RN is not None
        return total_RN.detach().cpu().double(), _FORMATS[total_RN.dtype]
    conversion = AS_THEY_ARE if operands in (Format.FP32, Format.E4M3) else Conversion(operands)
    return Subject(name, False, conversion, hardware_declared(place.measured, operands), run)


def _check_result(name: str, y_RN: object, shape: tuple[int, int]) -> None:
    if not isinstance(y_RN, torch.Tensor):
        raise UsageTypeError(f"subject {name!r} returned {type(y_RN).__name__}, but should return a tensor")
    if y_RN.dtype not in _FORMATS:
        raise UsageTypeError(f"subject {name!r} returned {y_RN.dtype}, but should return one of "
                             f"{', '.join(str(one) for one in _FORMATS)}")
    if tuple(y_RN.shape) != shape:
        raise UsageValueError(f"subject {name!r} returned shape {tuple(y_RN.shape)}, but should return {shape}")


def _import(name: str) -> Call:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageValueError(f"subject {name!r} cannot be found ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise UsageTypeError(f"subject {name!r} is {type(found).__name__}, but should be a callable "
                             "(x_RK, w_ENK, ends_E) -> y_RN")
    return found
