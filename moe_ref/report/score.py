"""A recorded run of `moe-ref score` as tables, one line of summary, and one JSON document."""

import json
from collections import Counter

import msgspec

from moe_ref.records.score import MutantOutcome, ScoreRun
from moe_ref.report.tables import NamedTable

_OUTCOMES = ("caught", "missed", "equivalent", "not_runnable", "broken")


def score_document(run: ScoreRun) -> dict[str, object]:
    """Keys: run (as its first line), totals, mutants and right (by id, as recorded)."""
    return {"run": _plain(run.header), "totals": totals(run),
            "mutants": {name: _plain(one) for name, one in sorted(run.mutants.items())},
            "right": {name: _plain(one) for name, one in sorted(run.right.items())}}


def _plain(line: msgspec.Struct) -> object:
    return json.loads(msgspec.json.encode(line))


def totals(run: ScoreRun) -> dict[str, int]:
    """Entries, mutants by outcome, those caught by their check, those silent off their trigger, right variants."""
    found = Counter(one.outcome for one in run.mutants.values())
    return {"entries": len(run.header.entries), "unseeded": len(run.header.unseeded), "mutants": len(run.mutants),
            **{name: found[name] for name in _OUTCOMES},
            "owned": sum(one.owned for one in run.mutants.values()),
            "silent": sum(one.silent is True for one in run.mutants.values()),
            "not_silent": sum(one.silent is False for one in run.mutants.values()),
            "right": len(run.right), "right_cases": sum(one.executed for one in run.right.values()),
            "accused": sum(bool(one.red or one.reason) for one in run.right.values())}


def summary(run: ScoreRun) -> str:
    """The score in one line."""
    found = totals(run)
    killable = found["caught"] + found["missed"] + found["broken"]
    return (f"{found['caught']} of {killable} mutants caught, {found['owned']} by the check that owns them; "
            f"{found['equivalent']} equivalent, {found['not_runnable']} for a GPU alone; "
            f"{found['accused']} of {found['right']} right variants accused in {found['right_cases']} cases")


def tables(run: ScoreRun) -> list[NamedTable]:
    """By class, by check, and other projects' criteria on the same mutants."""
    return [_by_class(run), _by_check(run), _by_criterion(run)]


_CLASS_COLUMNS = ("class", "entries", "mutants", "caught", "by the owner", "missed", "equivalent", "GPU alone")


def _by_class(run: ScoreRun) -> NamedTable:
    rows = []
    for letter, title in run.header.classes.items():
        of_class = [one for one in run.mutants.values() if one.id[:1] == letter]
        if not of_class:
            continue
        found = Counter(one.outcome for one in of_class)
        entries = sum(name[:1] == letter for name in run.header.entries)
        rows.append([f"{letter} {title}", str(entries), str(len(of_class)), str(found["caught"]),
                     str(sum(one.owned for one in of_class)), str(found["missed"] + found["broken"]),
                     str(found["equivalent"]), str(found["not_runnable"])])
    if rows:
        rows.append(["all", *(str(sum(int(row[place]) for row in rows)) for place in range(1, len(rows[0])))])
    return NamedTable("Mutants by class of defect", _CLASS_COLUMNS, rows, _CLASS_COLUMNS[1:])


def _by_check(run: ScoreRun) -> NamedTable:
    found = Counter(one.said for one in run.mutants.values() if one.outcome == "caught")
    return NamedTable("What was said of those caught", ["verdict and stage", "mutants"],
                      [[said, str(count)] for said, count in found.most_common()], right=("mutants",))


def _by_criterion(run: ScoreRun) -> NamedTable:
    """Of mutants whose output was there to be compared; a crash is no verdict of a criterion."""
    judged = [one for one in run.mutants.values() if one.refused]
    projects = list(dict.fromkeys(name for one in (*judged, *run.right.values()) for name in one.refused))
    rows = []
    for letter, title in run.header.classes.items():
        of_class = [one for one in judged if one.id[:1] == letter]
        if of_class:
            rows.append([f"{letter} {title}", f"{len(of_class)} of {len(of_class)}",
                         *(_share(of_class, project) for project in projects)])
    rows.append(["all mutants", f"{len(judged)} of {len(judged)}", *(_share(judged, project) for project in projects)])
    accused = sum(len(one.red) for one in run.right.values())
    rows.append(["right variants", f"{accused} of {sum(one.executed for one in run.right.values())}",
                 *(_share_of_right(run, project) for project in projects)])
    return NamedTable("Layers that are refused, by criterion, each with data of its project's scale",
                      ["class", "moe-ref", *projects], rows, right=("moe-ref", *projects))


def _share_of_right(run: ScoreRun, project: str) -> str:
    asked = [one.refused[project] for one in run.right.values() if project in one.refused]
    return f"{sum(count for count, _ in asked)} of {sum(most for _, most in asked)}"


def _share(some: list[MutantOutcome], project: str) -> str:
    asked = [one.refused[project] for one in some if project in one.refused]
    return f"{sum(asked)} of {len(asked)}" if asked else "-"


def complaints(run: ScoreRun) -> list[str]:
    """What keeps the score from being perfect, in words, by name."""
    words = [f"{one.outcome} {one.id}: {one.reason or f'{one.tried} cases tried'}" for one in run.mutants.values()
             if one.outcome in ("missed", "broken")]
    words += [f"not by its owner {one.id}: {one.said} on {one.case}" for one in run.mutants.values()
              if one.outcome == "caught" and not one.owned]
    words += [f"not silent {one.id}: its bits differ from the right subject's on the case without its trigger"
              for one in run.mutants.values() if one.silent is False]
    words += [f"accused {one.id}: {text}" for one in run.right.values()
              for text in (*one.red, *filter(None, [one.reason]))]
    return sorted(words)


def wrong(run: ScoreRun) -> list[str]:
    """Of the complaints those that say that the suite is wrong: mutants missed or broken, right variants accused."""
    return [words for words in complaints(run) if words.startswith(("missed", "broken", "accused"))]


def unjudged(run: ScoreRun) -> list[str]:
    """Entries of the catalogue of which this record judges no mutant: not chosen, cut short, or not to be seeded."""
    judged = {name.partition(".")[0] for name in run.mutants}
    return [name for name in run.header.entries if name not in judged]
