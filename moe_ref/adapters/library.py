"""A package that somebody else makes: its name, the versions an adapter was written for, and what is installed."""

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, kw_only=True)
class Library:
    """One distribution.

    distribution: its name on PyPI. module: what is imported. least, below: versions from the first up to, but not
    including, the second. hint: how it is installed where `pip install` of its name is not it.
    """

    distribution: str
    module: str
    least: str
    below: str
    hint: str = ""

    @property
    def versions(self) -> str:
        """The range as pip writes it."""
        return f"{self.distribution}>={self.least},<{self.below}"

    def found(self) -> str | None:
        """The version that is installed, or None; nothing is imported."""
        try:
            if importlib.util.find_spec(self.module) is None:
                return None
            return version(self.distribution)
        except (PackageNotFoundError, ImportError, ValueError):
            return None

    def lacking(self) -> str | None:
        """What is wrong with what is installed, in words; None where it is within the range."""
        found = self.found()
        if found is None:
            hint = f" ({self.hint})" if self.hint else ""
            return f"{self.distribution} is not installed; should be {self.versions}{hint}"
        if not release(self.least) <= release(found) < release(self.below):
            return f"{self.distribution} {found} is installed, but should be {self.versions}"
        return None


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version: 2.11 of 2.11.0+cu130 and of 2.11rc1 alike; trailing zeros do not count."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        digits = part[:next((at for at, letter in enumerate(part) if not letter.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
