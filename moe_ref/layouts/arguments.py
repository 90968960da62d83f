"""Checks of the arguments that readers and writers of layouts share: types, and the place among the ranks."""

from types import NoneType, UnionType

from moe_ref.contract.errors import UsageTypeError
from moe_ref.contract.parallel import Parallel


def type_faults(**arguments: tuple[object, type | UnionType]) -> list[str]:
    """One fault for each argument, given as (value, type), of another type; a bool is no int here."""
    faults = []
    for name, (value, kind) in arguments.items():
        kinds = kind.__args__ if isinstance(kind, UnionType) else (kind,)
        if not isinstance(value, kind) or isinstance(value, bool):
            words = " or ".join("None" if one is NoneType else one.__name__ for one in kinds)
            faults.append(f"{name}: {type(value).__name__}, but should be {words}")
    return faults


def raise_type_faults(subject: str, faults: list[str]) -> None:
    """Raise UsageTypeError that lists every fault of `subject` at once; do nothing without faults."""
    if faults:
        raise UsageTypeError(f"{subject}: " + "; ".join(faults))


def check_place(parallel: Parallel | None, rank: int) -> Parallel:
    """The degrees to work with; raises UsageValueError for a rank that they do not have."""
    parallel = parallel or Parallel()
    parallel.check_rank(rank)
    return parallel
