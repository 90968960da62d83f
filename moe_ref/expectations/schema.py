"""What an expectations file holds, as frozen structures."""

import re
from datetime import date
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import msgspec

from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.tolerances.base import Struct, Text

Link = Annotated[int, msgspec.Meta(ge=1)] | Annotated[str, msgspec.Meta(pattern=r"^https?://\S+\Z")]
TO_FILL_IN = "..."
"""What stands for a reason in an entry that was printed to be pasted."""


def covers(cases: str, case_id: str) -> bool:
    """Whether the case is one of `cases`, an id or a pattern in which * and ? alone have a meaning."""
    return fnmatchcase(case_id, cases.replace("[", "[[]"))


class KnownFailure(Struct, frozen=True, kw_only=True):
    """One entry.

    cases: a case id, or a pattern with * and ?. verdict: how they end. stage: where a mismatch starts. contains: what
    the reason of any other verdict must contain. reason: why, in a sentence. link: where it is tracked, an address or
    the number of an issue. expires: the last day on which it counts. owner: who looks after it.
    """

    cases: Text
    verdict: Literal["mismatch", "crash", "struct", "hang", "nondeterministic"] = "mismatch"
    stage: Stage | None = None
    contains: Text | None = None
    reason: Text
    link: Link
    expires: date
    owner: Text | None = None

    def __post_init__(self) -> None:
        if self.verdict == Verdict.MISMATCH and self.stage is None:
            raise ValueError("stage is missing, but a mismatch should name the stage where it starts")
        if self.verdict == Verdict.MISMATCH and self.contains is not None:
            raise ValueError("contains is given, but a mismatch is told by its stage")
        if self.verdict != Verdict.MISMATCH and self.stage is not None:
            raise ValueError(f"stage is given, but a {self.verdict} starts in none; contains tells it from others")
        if self.reason.strip() in ("", TO_FILL_IN):
            raise ValueError(f"reason is {self.reason!r}, but should say why the cases fail")
        if re.search(r"[*?]", self.cases) is None and (known := format_case(parse_case(self.cases))) != self.cases:
            raise ValueError(f"cases is {self.cases}, but the id of that case is {known}")

    @property
    def words(self) -> str:
        """As a record names it."""
        link = f"issue {self.link}" if isinstance(self.link, int) else self.link
        what = f"mismatch at {self.stage}" if self.stage else self.verdict
        owner = f" ({self.owner})" if self.owner else ""
        return f"{link}, {what} expected until {self.expires}: {self.reason}{owner}"

    def covers(self, case_id: str) -> bool:
        """Whether the case is one of `cases`."""
        return covers(self.cases, case_id)

    def excuses(self, verdict: Verdict, stage: Stage | None, reason: str) -> bool:
        """Whether a covered case may end so; stage: of a mismatch."""
        return verdict == self.verdict and stage == self.stage and (self.contains or "") in reason


class ExpectationsFile(Struct, frozen=True):
    """The whole file; schema 1. implementation: the name that it is verified by."""

    schema: Literal[1]
    implementation: Text
    entries: tuple[KnownFailure, ...]
