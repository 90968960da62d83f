"""Failures that are known and excused, each until a date."""

from datetime import date
from fnmatch import fnmatchcase
from typing import Annotated

import msgspec

from moe_ref.contract.vocabulary import Stage
from moe_ref.tolerances.base import Struct, Text

Issue = Annotated[int, msgspec.Meta(ge=1)] | Annotated[str, msgspec.Meta(pattern=r"^https?://\S+$")]


class Waiver(Struct, frozen=True):
    """One excuse.

    cases: a case id, or a pattern with * and ?. implementation: the name it is verified by. stage: where the case fails
    first. issue: number or address of where it is tracked. expiry: the last day on which it counts. cause: what the
    failure was attributed to.
    """

    cases: Text
    implementation: Text
    stage: Stage
    issue: Issue
    expiry: date
    cause: Text

    @property
    def words(self) -> str:
        """As a record names it."""
        issue = f"issue {self.issue}" if isinstance(self.issue, int) else self.issue
        return f"{issue}, waived until {self.expiry}, cause: {self.cause}"


def find(waivers: tuple[Waiver, ...], case_id: str, implementation: str, stage: Stage | None,
         today: date) -> Waiver | None:
    """The first waiver of a failure at `stage`, of any where it is None, that has not expired."""
    return next((one for one in waivers if fnmatchcase(case_id, one.cases) and one.implementation == implementation
                 and stage in (None, one.stage) and today <= one.expiry), None)
