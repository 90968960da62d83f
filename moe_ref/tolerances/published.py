"""When other projects call two results equal: descriptions, for comparison only; no verdict here depends on them."""

from dataclasses import dataclass

from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.tolerances.base import Entry, NotNegative, Positive, Struct, Text


class Elementwise(Struct, frozen=True):
    """Every |got - want| <= absolute + relative |want|."""

    absolute: NotNegative
    relative: NotNegative


class RelativeRms(Struct, frozen=True):
    """d = |got - want| / max(|want|, rms(want)): the largest is at most max, and rms(d) at most rms."""

    max: Positive
    rms: Positive


class Cosine(Struct, frozen=True):
    """1 - 2 <got, want> / (|got|^2 + |want|^2) is below max: about half the squared relative error of the whole."""

    max: Positive


Criterion = Elementwise | RelativeRms | Cosine


class ElementwiseEntry(Entry, frozen=True, tag_field="kind", tag="elementwise"):
    """A project's numbers by format of the layer's inputs; applies_to: what of the project."""

    applies_to: Text
    numbers: dict[Format, Elementwise]


class RelativeRmsEntry(Entry, frozen=True, tag_field="kind", tag="relative_rms"):
    """The same."""

    applies_to: Text
    numbers: dict[Format, RelativeRms]


class CosineEntry(Entry, frozen=True, tag_field="kind", tag="cosine"):
    """The same."""

    applies_to: Text
    numbers: dict[Format, Cosine]


PublishedEntry = ElementwiseEntry | RelativeRmsEntry | CosineEntry


@dataclass(frozen=True)
class Published:
    """The criterion of a project for one format."""

    project: str
    criterion: Criterion


def published(entries: dict[str, PublishedEntry], stored: Dtype | Format) -> tuple[Published, ...]:
    """The criteria of all projects that publish one for a format, in the order of the file."""
    return tuple(Published(name, entry.numbers[Format(stored)]) for name, entry in entries.items()
                 if Format(stored) in entry.numbers)
