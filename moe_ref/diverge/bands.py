"""Bands that curves have to stay in, and the accepted curves of a baseline."""

import math
from pathlib import Path

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.growth import Growth
from moe_ref.records.growth import DivergeLine, GrowthLine, GrowthRun
from moe_ref.records.schema import Number, from_number, to_number
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.schema import GrowthBand

BASELINE = Path("ci/baselines/growth.json")
_SCHEMA = 1


class AcceptedCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The law that a subject had when it was accepted, at which lengths and on which problem."""

    growth_class: str
    exponent: Number
    bits: tuple[Number, Number]
    lengths: list[int]
    problem: dict[str, Number]


class GrowthBaseline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Accepted curves by "subject, dtype, hardware"."""

    schema: int = _SCHEMA
    curves: dict[str, AcceptedCurve] = {}


def find_band(subject: str, dtype: Format, hardware: str) -> GrowthBand | None:
    """The band of tolerances.yaml for a subject with data of a format on a hardware class; None: it has none."""
    return next((band for band in load_tolerances().file.growth.bands
                 if (band.subject, band.dtype) == (subject, dtype) and hardware in band.hardware), None)


def band_faults(found: Growth, band: GrowthBand) -> list[str]:
    """How a curve leaves its band, in words; what a 16-bit store hides is not judged."""
    faults = []
    if not math.isnan(found.exponent) and found.exponent not in band.exponent:
        faults.append(f"the error grows as K^{found.exponent:.2f}, but should as K^{band.exponent.low:g} to "
                      f"K^{band.exponent.high:g}")
    if found.bits[0] < band.bits.low or found.bits[1] > band.bits.high:
        faults.append(f"{found.bits[0]:.1f} to {found.bits[1]:.1f} effective bits, but should be {band.bits.low:g} to "
                      f"{band.bits.high:g}")
    return faults


def curve_key(subject: str, dtype: str, hardware: str) -> str:
    """What a baseline knows a curve by."""
    return f"{subject}, {dtype}, {hardware}"


def drift(found: Growth, accepted: AcceptedCurve, lengths: list[int], problem: dict[str, Number]) -> list[str]:
    """How a curve moved from the accepted one, in words; curves of other problems are not compared."""
    if (lengths, problem) != (accepted.lengths, accepted.problem):
        return []
    limits, faults = load_tolerances().file.growth.drift, []
    if found.growth_class != accepted.growth_class:
        faults.append(f"class {found.growth_class}, but {accepted.growth_class} was accepted")
    moved = abs(found.exponent - from_number(accepted.exponent))
    if moved > limits.exponent:
        faults.append(f"exponent {found.exponent:.2f}, but {accepted.exponent} was accepted")
    for name, now, then in zip(("least", "most"), found.bits, accepted.bits, strict=True):
        if abs(now - from_number(then)) > limits.bits:
            faults.append(f"{name} effective bits {now:.1f}, but {then} were accepted")
    return faults


def read_growth_baseline(path: Path) -> GrowthBaseline:
    """A baseline file, or an empty one where there is no file; UsageValueError where it cannot be read."""
    if not path.exists():
        return GrowthBaseline()
    try:
        found = msgspec.json.decode(path.read_bytes(), type=GrowthBaseline)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageValueError(f"{path}: {error}") from error
    if found.schema != _SCHEMA:
        raise UsageValueError(f"{path}: schema {found.schema}, but this version reads {_SCHEMA}")
    return found


def accept_curves(path: Path, run: GrowthRun) -> int:
    """Make a run's curves those of the baseline file, others are kept; returns how many changed."""
    kept = read_growth_baseline(path).curves
    curves = {curve_key(line.subject, run.header.dtype, line.hardware): _accepted(line, run.header)
              for line in run.subjects.values() if line.growth_class}
    merged = GrowthBaseline(curves=dict(sorted({**kept, **curves}.items())))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(merged), indent=1) + b"\n")
    return sum(kept.get(key) != curve for key, curve in curves.items())


def _accepted(line: GrowthLine, header: DivergeLine) -> AcceptedCurve:
    low, high = (to_number(round(from_number(bits), 1)) for bits in line.bits)
    return AcceptedCurve(growth_class=line.growth_class, exponent=to_number(round(from_number(line.exponent), 2)),
                         bits=(low, high), lengths=header.lengths, problem=header.sizes)
