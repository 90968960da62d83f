"""Reading a catalogue folder, strictly: YAML that is data only, checked against the schema and for contradictions."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.score.schema import DefectClass, Entry, Mutant, Right, RightFile

_Kind = TypeVar("_Kind")
RIGHT_FILE = "right.yaml"
_OWNERS = frozenset({str(one) for one in (Verdict.STRUCT, Verdict.CRASH, Verdict.HANG, Verdict.NONDETERMINISTIC)}
                    | {f"{Verdict.MISMATCH} {stage}" for stage in Stage} | {str(Verdict.MISMATCH)})


@dataclass(frozen=True)
class Catalogue:
    """All defect classes and right variants of a folder."""

    folder: Path
    classes: tuple[DefectClass, ...]
    right: tuple[Right, ...]

    @property
    def entries(self) -> list[Entry]:
        """In the order of the files."""
        return [entry for one in self.classes for entry in one.entries]

    @property
    def mutants(self) -> list[Mutant]:
        """Of all entries."""
        return [mutant for entry in self.entries for mutant in entry.mutants]


def load_catalogue(folder: Path) -> Catalogue:
    """The catalogue in `folder`; raises UsageValueError that names file and place of what is wrong."""
    files = sorted(path for path in folder.glob("*.yaml") if path.name != RIGHT_FILE)
    if not files:
        raise UsageValueError(f"{folder}: no *.yaml of a defect catalogue; give --catalogue FOLDER")
    classes = tuple(_read(path, DefectClass) for path in files)
    right = folder / RIGHT_FILE
    found = Catalogue(folder, classes, tuple(_read(right, RightFile).variants) if right.exists() else ())
    if faults := [*_faults(found)]:
        raise UsageValueError(f"{folder}: " + "\n  ".join(faults))
    return found


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.convert(YAML(typ="safe", pure=True).load(path.read_bytes()), kind)
    except (msgspec.ValidationError, YAMLError, UnicodeDecodeError) as error:
        raise UsageValueError(f"{path}: {' '.join(str(error).split())}") from error


def _faults(catalogue: Catalogue) -> Iterable[str]:
    ids = Counter([entry.id for entry in catalogue.entries] + [one.id for one in catalogue.mutants]
                  + [one.id for one in catalogue.right])
    yield from (f"{name} is there {count} times" for name, count in ids.items() if count > 1)
    for one in catalogue.classes:
        yield from (f"{entry.id} lies in class {one.letter}" for entry in one.entries if entry.id[0] != one.letter)
    for entry in catalogue.entries:
        if bool(entry.unseeded) == bool(entry.mutants):
            yield f"{entry.id}: needs mutants, or a reason why it is unseeded, and not both"
        for mutant in entry.mutants:
            yield from (f"{mutant.id}: {text}" for text in _mutant_faults(entry, mutant))


def _mutant_faults(entry: Entry, mutant: Mutant) -> Iterable[str]:
    if not mutant.id.startswith(entry.id + "."):
        yield f"should begin with {entry.id}."
    if mutant.equivalent:
        return
    if not mutant.carried_by or not mutant.owner:
        yield "needs carried_by and owner, since it is not equivalent"
    if bool(mutant.silent_on) == bool(mutant.always):
        yield "needs silent_on, or `always`, the reason why there is no such case, and not both"
    yield from (f"owner {owner!r}, but should be a verdict or `mismatch STAGE`"
                for owner in mutant.owner if owner not in _OWNERS)
