"""Which hardware class a device belongs to, found by measurement: its matrix products are asked, not its name."""

from dataclasses import dataclass
from functools import cache, partial

import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics import tensor_core
from moe_ref.numerics.fingerprint import UNKNOWN, Fingerprint, Matmul, classify, fingerprint, matching
from moe_ref.tolerances.load import load_tolerances

_DTYPES = {Format.FP32: torch.float32, Format.FP16: torch.float16, Format.BF16: torch.bfloat16,
           Format.E4M3: torch.float8_e4m3fn}

_SIMULATED = (Format.FP32, Format.FP16, Format.BF16, Format.E4M3)


@dataclass(frozen=True)
class Hardware:
    """A class of tolerances.yaml, the fingerprints that named it, and why it is that one."""

    name: str
    fingerprints: tuple[Fingerprint, ...]
    reason: str

    def words(self) -> dict[str, str]:
        """For the environment of a record."""
        shown = "; ".join(fingerprint_words(one) for one in self.fingerprints)
        return {"hardware": self.name, "hardware_reason": self.reason, "fingerprint": shown}


def fingerprint_words(found: Fingerprint) -> str:
    """One line: operands, accumulator, cuts."""
    operands = f"{found.operand.value} operands"
    if found.operand is Format.FP32:
        operands += " whole" if found.operand_rounding == "none" else (
            f" of {found.operand_bits} bits ({found.operand_rounding})")
    step = f", {found.products_per_step} products at once" if found.products_per_step else ""
    kept = f" with {found.kept_bits} bits kept" if found.kept_bits else ""
    return f"{operands}: sums of {found.significand_bits} bits ({found.rounding}){step}{kept}"


@cache
def hardware_class(device: str) -> Hardware:
    """Measure what torch.matmul does on a device ("cpu", "cuda"), as the process has configured it by then; once.

    Where no class, or more than one, fits all fingerprints the result is the entry of unknown devices, and says why.
    UsageValueError where the device is not there.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UsageValueError(f"device {device!r}, but should be {'cpu or cuda' if device != 'cuda' else 'there'}")
    found = []
    for operand in _formats(device):
        try:
            found.append(fingerprint(partial(_on_device, device=device, operand=operand), operand))
        except RuntimeError:
            # Not every build of torch multiplies 8-bit numbers on every device that could; the others always work.
            if operand is not Format.E4M3:
                raise
    return _classified(tuple(found))


@cache
def simulated_class(name: str) -> Hardware:
    """The same for the simulated tensor core of a hardware class; fp32 operands are made tf32 as it makes them.

    UsageValueError for a class that is not in tolerances.yaml or has no tensor core.
    """
    known = load_tolerances().file.hardware
    simulated = [one for one, hardware in known.items() if hardware.truncates and one != UNKNOWN]
    if name not in simulated:
        raise UsageValueError(f"hardware class {name!r}, but should be one of {', '.join(simulated)}")
    return _classified(tuple(fingerprint(_simulated(name, one), one) for one in _SIMULATED))


def _formats(device: str) -> tuple[Format, ...]:
    """What the device multiplies; 8-bit operands came with compute capability 8.9."""
    has_fp8 = device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
    return (Format.FP32, Format.FP16, Format.BF16) + (Format.E4M3,) * has_fp8


def _simulated(name: str, operand: Format) -> Matmul:
    hardware = load_tolerances().file.hardware[name]
    if operand is Format.FP32:
        core = tensor_core.tensor_core(hardware, Format.TF32)
        return partial(tensor_core.tf32_matmul, core=core, operands=hardware.tf32_operands)
    return partial(tensor_core.matmul, core=tensor_core.tensor_core(hardware, operand))


def _classified(found: tuple[Fingerprint, ...]) -> Hardware:
    known = load_tolerances().file.hardware
    if name := classify(found, known):
        return Hardware(name, found, "the only class that leaves these fingerprints")
    fitting = [matching(one, known) for one in found]
    both = [name for name in known if all(name in names for names in fitting)]
    if both:
        return Hardware(UNKNOWN, found, f"{' and '.join(both)} leave the same fingerprints, so the worst of all counts")
    words = [f"{one.operand.value}: {', '.join(names) or 'none'}" for one, names in zip(found, fitting, strict=True)]
    return Hardware(UNKNOWN, found, f"no class fits all operands ({'; '.join(words)}), so the worst of all counts")


def _on_device(a_MK: torch.Tensor, b_KN: torch.Tensor, device: str, operand: Format) -> torch.Tensor:
    a_MK, b_KN = (tensor.to(device=device, dtype=_DTYPES[operand]) for tensor in (a_MK, b_KN))
    if operand is not Format.E4M3:
        return (a_MK @ b_KN).double().cpu()
    one = torch.ones((), device=device)
    # The second operand of this product lies column by column; the fast accumulator is the tensor core's own.
    c_MN = torch._scaled_mm(a_MK, b_KN.T.contiguous().T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return c_MN.double().cpu()
