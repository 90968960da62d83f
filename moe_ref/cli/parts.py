"""Packages of an implementation that verbs work with beside its layer: compile, roofline, tune."""

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from moe_ref.contract.errors import UsageValueError
from moe_ref.verify.run.subjects import ENTRY_POINT_GROUP, load_subject


def part_of(implementation: str, part: str, why: str) -> Any:
    """The module `part` of the implementation's package; UsageValueError where it has none, `why` what follows."""
    load_subject(implementation)
    points = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    package = points.get(implementation, implementation).partition(":")[0]
    try:
        return import_module(f"{package}.{part}")
    except ImportError as error:
        raise UsageValueError(f"implementation {implementation!r} has no {package}.{part} that could be imported "
                              f"({error}), so {why}") from error
