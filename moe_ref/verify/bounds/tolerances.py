"""tolerances.yaml, read strictly: unknown keys, duplicates and missing reasons are errors."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format

Text = Annotated[str, msgspec.Meta(min_length=1)]
Positive = Annotated[float, msgspec.Meta(gt=0.0, le=1e308)]
"""Finite: a limit of infinity, or of NaN, would let everything pass."""

DEVICES = ("cpu", "cuda")


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    reason: Text
    source: Text


class FormatEntry(_Entry, frozen=True):
    """A floating-point format: significand bits with the hidden one, smallest normal exponent, largest value."""

    significand_bits: int
    min_exponent: int
    max: float


class AccumulatorEntry(_Entry, frozen=True):
    """factor multiplies the unit roundoff of a long sum on one device class."""

    factor: Annotated[float, msgspec.Meta(ge=0.5, le=16.0)]


class EvaluationEntry(_Entry, frozen=True):
    """units of 2^-24 that evaluating a function may cost."""

    units: Positive


class MaximumEntry(_Entry, frozen=True):
    """An upper limit."""

    max: Positive


class MinimumEntry(_Entry, frozen=True):
    """A lower limit."""

    min: Positive


class _Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ratio: MaximumEntry
    power: MinimumEntry


class _Evaluations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    activation: EvaluationEntry
    score: EvaluationEntry
    softcap: EvaluationEntry


class TolerancesFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file; schema 1."""

    schema: int
    formats: dict[Format, FormatEntry]
    accumulators: dict[str, AccumulatorEntry]
    evaluations: _Evaluations
    limits: _Limits


@dataclass(frozen=True)
class Tolerances:
    """The file's content and the digest that a record names it by."""

    file: TolerancesFile
    digest: str


def default_path() -> Path:
    """tolerances.yaml beside the packages in a checkout, inside moe_ref in an installed wheel."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "tolerances.yaml"
    return installed if installed.exists() else package.parent / "tolerances.yaml"


@cache
def load_tolerances(path: Path | None = None) -> Tolerances:
    """Read and check the file; raises UsageValueError that names the file and what is wrong."""
    path = path or default_path()
    try:
        content = path.read_bytes()
        parsed = msgspec.convert(YAML(typ="safe", pure=True).load(content), TolerancesFile)
    except (OSError, YAMLError, msgspec.ValidationError) as error:
        raise UsageValueError(f"{path}: {' '.join(str(error).split())}") from error
    missing = [f"format {name}" for name in Format if name not in parsed.formats]
    missing += [f"accumulator {name}" for name in DEVICES if name not in parsed.accumulators]
    if parsed.schema != 1 or missing:
        raise UsageValueError(f"{path}: schema {parsed.schema}, but should be 1; missing: {', '.join(missing)}")
    return Tolerances(parsed, hashlib.sha256(content).hexdigest()[:16])
