"""The catalogue as data: real defects, the mutants that seed them, and right layers that must not be accused."""

from typing import Annotated, Literal

import msgspec

Text = Annotated[str, msgspec.Meta(min_length=1)]
_Id = Annotated[str, msgspec.Meta(pattern=r"^[A-Z][0-9]{2}$")]
_MutantId = Annotated[str, msgspec.Meta(pattern=r"^[A-Z][0-9]{2}\.[a-z0-9-]+$")]
_RightId = Annotated[str, msgspec.Meta(pattern=r"^right\.[a-z0-9-]+$")]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Unknown fields are errors: a misspelt option would be silently left out."""


class Patch(_Strict, frozen=True):
    """`old` becomes `new` in `file`, which is relative to the folder above its package; `old` must be there once."""

    file: Text
    old: Text
    new: str


class Mutant(_Strict, frozen=True):
    """A subject with a defect: patches of its sources, never of an output tensor.

    form: `faithful`, or a `twin` that has the same defect at a smaller size or another precision. carried_by: patterns
    of case ids of the default tiers, the most telling first. owner: what must be said of it, each a verdict, or
    `mismatch STAGE`. silent_on: a case without the trigger, where every bit is that of the right subject; always: why
    there is none. equivalent: why no case can tell it from the right subject; it counts as neither caught nor missed.
    """

    id: _MutantId
    form: Literal["faithful", "twin"]
    subject: Text
    what: Text
    patches: Annotated[list[Patch], msgspec.Meta(min_length=1)]
    carried_by: list[Text] = []
    owner: list[Text] = []
    silent_on: str = ""
    always: str = ""
    runs_on: Literal["cpu", "gpu"] = "cpu"
    equivalent: str = ""


class Entry(_Strict, frozen=True):
    """One real defect. equivalent: when it changes nothing; unseeded: why no mutant seeds it."""

    id: _Id
    name: Text
    does: Text
    effect: Text
    trigger: Text
    status: Text
    sources: list[Text]
    equivalent: str = ""
    unseeded: str = ""
    mutants: list[Mutant] = []


class DefectClass(_Strict, frozen=True):
    """A file of the catalogue."""

    letter: Annotated[str, msgspec.Meta(pattern="^[A-Z]$")]
    title: Text
    entries: list[Entry]


class Right(_Strict, frozen=True):
    """A right subject that must pass everything it supports; control: the report that it answers, if it is one.

    cases: patterns of case ids beside the usual ones.
    """

    id: _RightId
    subject: Text
    what: Text
    patches: list[Patch] = []
    control: str = ""
    cases: list[Text] = []


class RightFile(_Strict, frozen=True):
    """The file of right variants and negative controls."""

    variants: list[Right]
