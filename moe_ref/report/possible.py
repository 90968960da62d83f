"""Whether the contract lets two values of axes meet in a case: a recorded case with one value is given the other."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from moe_ref.contract.case import Case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Data, Direction, Dtype, Hosting, Pattern, Schedule, Storage, Tokens
from moe_ref.report.axes import read_case

_KEPT = 3
"""Cases of a value that are tried, those with the shortest ids: plain ones refuse little."""


class Examples:
    """Short case ids by (axis, value)."""

    def __init__(self) -> None:
        self._cases: dict[tuple[str, str], list[str]] = {}

    def add(self, case: str, values: Iterable[tuple[str, str]]) -> None:
        """Keep a case if it is among the shortest of one of its values."""
        for value in values:
            kept = self._cases.setdefault(value, [])
            if len(kept) < _KEPT or len(case) < len(kept[-1]):
                kept[:] = sorted([*kept, case], key=lambda text: (len(text), text))[:_KEPT]

    def may_meet(self, first: tuple[str, str], second: tuple[str, str]) -> bool:
        """Whether some case of one value can have the other too; True where one of them has no case to try."""
        if first not in self._cases or second not in self._cases:
            return True
        return any(_accepts(case, value) for has, value in ((first, second), (second, first))
                   for case in self._cases[has])


def _accepts(text: str, value: tuple[str, str]) -> bool:
    case, change = read_case(text), _CHANGES.get(value[0])
    if case is None or change is None:
        return False
    try:
        change(case, value[1])
    except UsageValueError:
        return False
    return True


def _with_problem(case: Case, **fields: object) -> Case:
    return replace(case, problem=replace(case.problem, **fields))  # pyrefly: ignore


def _with_activation(case: Case, name: str) -> Case:
    spec = case.problem.spec
    return _with_problem(case, model="", spec=replace(spec, experts=replace(spec.experts, activation=name)))  # pyrefly: ignore


def _with_score(case: Case, name: str) -> Case:
    spec = case.problem.spec
    if spec.router is None:
        raise UsageValueError("a layer without a router has no score")
    return _with_problem(case, model="", spec=replace(spec, router=replace(spec.router, score=name)))  # pyrefly: ignore


def _with_parallel(case: Case, **fields: object) -> Case:
    """Shares are of one degree, so they become equal ones."""
    parallel = replace(case.parallel, **({"splits": None} | fields))  # pyrefly: ignore
    return replace(case, parallel=parallel, token_shares=None)


def _with_tp(case: Case, degree: str) -> Case:
    changed = _with_parallel(case, tp=int(degree))
    return _with_split(changed, "uneven") if case.parallel.splits else changed


def _with_split(case: Case, words: str) -> Case:
    tp = case.parallel.tp
    if words == "uneven" and tp == 1:
        raise UsageValueError("one rank has no uneven split")
    return _with_parallel(case, splits=tuple(range(1, tp + 1)) if words == "uneven" else None)


_CHANGES: dict[str, Callable[[Case, str], Case]] = {
    "dtype": lambda case, value: _with_problem(case, dtype=Dtype(value)),
    "direction": lambda case, value: replace(case, direction=Direction(value)),
    "tp": _with_tp,
    "ep": lambda case, value: _with_parallel(case, ep=int(value), splits=case.parallel.splits),
    "split": _with_split,
    "schedule": lambda case, value: _with_parallel(case, schedule=Schedule(value), splits=case.parallel.splits),
    "tokens on": lambda case, value: _with_parallel(case, tokens=Tokens(value), splits=case.parallel.splits),
    "hosting": lambda case, value: _with_parallel(case, hosting=Hosting(value), splits=case.parallel.splits),
    "storage": lambda case, value: replace(case, storage=Storage(value)),
    "pattern": lambda case, value: _with_problem(case, pattern=Pattern(value)),
    "data": lambda case, value: _with_problem(case, data=Data(value)),
    "activation": _with_activation,
    "score": _with_score,
    "residual": lambda case, value: _with_problem(case, residual=value == "yes"),
    "tokens": lambda case, value: _with_problem(case, num_tokens=int(value.split()[0]))}
"""How a case is given a value of an axis; a shared expert is not given."""
