"""Every failure with where it sits, what it looks like and the line that runs it again; then what is no verdict."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.records.schema import CaseLine, StageResult, from_number
from moe_ref.report.axes import size_of
from moe_ref.report.facts import culprit, ratio_of
from moe_ref.report.sections.error_map import error_map
from moe_ref.report.sections.places import CARDS_SHOWN, num_cards
from moe_ref.report.sections.view import View, fill
from moe_ref.report.words import excess, format_ratio, where, worst_element

if TYPE_CHECKING:
    from markupsafe import Markup

_FAULTS_SHOWN, _REASONS_SHOWN = 4, 30
_TILES_DRAWN = 512
_SIGMAS_SHOWN = 1e4
"""Beyond it a distance in standard deviations says no more than the ratio does."""

_MEANING: dict[str, str] = {
    Stage.LOGITS: "the router's product", Stage.IDS: "the choice of experts",
    Stage.WEIGHTS: "the routing weights of the chosen experts", Stage.PERMUTE: "tokens as rows, by expert",
    Stage.GATE_UP: "the gate and up projections", Stage.ACT: "the activation, with the projections before it",
    Stage.DOWN: "the down projection", Stage.SHARED: "the shared expert",
    Stage.MERGED: "the weighted sum over a token's experts", Stage.REDUCED: "the sum over ranks",
    Stage.OUTPUT: "the whole layer, from its inputs",
    Verdict.MISMATCH: "numbers farther off than is allowed",
    Verdict.STRUCT: "a broken promise about shapes, inputs or calls",
    Verdict.CRASH: "an exception, or a process that died", Verdict.HANG: "no result within the time limit",
    Verdict.NONDETERMINISTIC: "two runs that differ although they should not",
    Verdict.UNEXPECTED_PASS: "a failure is expected: its entry can go"}


def failure_section(view: View) -> "Markup":
    """Failures in groups, the smallest case first; known failures and harness errors, which accuse nobody."""
    return fill("sections/failures.html.j2", groups=view.groups[:CARDS_SHOWN], left_out=view.groups[CARDS_SHOWN:],
                cards=num_cards(view.groups), faults_shown=_FAULTS_SHOWN, what=_what, facts=_facts, likely=_likely,
                tiles=tiles, new=frozenset(view.comparison.new_failures) if view.comparison else frozenset(),
                error_map=error_map, known=_by_reason(view.lines, Verdict.KNOWN_FAILURE),
                errors=_by_reason(view.lines, Verdict.HARNESS_ERROR), reasons_shown=_REASONS_SHOWN,
                anchors=view.anchors)


def tiles(stage: StageResult) -> list[bool]:
    """True per 64-column tile that holds an element above its bound; [] of a single one, and if none is named."""
    bad = set(stage.bad_tiles)
    return [tile in bad for tile in range(min(stage.num_tiles, _TILES_DRAWN))] if bad and stage.num_tiles > 1 else []


def _what(name: str) -> str:
    """A stage or verdict in plain words; '' for one of another version."""
    return f"the gradient of {name[5:]}" if name.startswith("grad_") else _MEANING.get(name, "")


def _facts(line: CaseLine) -> list[tuple[str, str]]:
    """(label, words) of a failure, what points at the cause first; what was not recorded is left out."""
    stage = culprit(line)
    if stage is None:
        return []
    size, element = (_size(stage), worst_element(stage)) if stage.num_bad else ("", "")
    found = [*_besides(line), ("where", where(line)), ("off by", size), ("worst element", element),
             ("as a whole", _whole(stage)), ("case", line.purpose)]
    return [(label, words) for label, words in found if words]


def _besides(line: CaseLine) -> list[tuple[str, str]]:
    """What the reason says below its first line: which collectives are missing or too many."""
    words = line.reason.partition("\n")[2]
    name, _, rest = words.partition(" of ")
    return [(name, f"of {rest}") if name == "collectives" else ("also", words)]


def _likely(line: CaseLine) -> tuple[str, str]:
    """(the fault that explains the error, how well); without one what the message guesses."""
    if line.diagnosis:
        share, following = from_number(line.diagnosis.share), from_number(line.diagnosis.next_share)
        return line.diagnosis.fault, f"explains {share:.1%} of the error, the next best fault {following:.0%}"
    rows = (row.strip() for row in line.message.split("\n"))
    return next((row.removeprefix("likely").strip().removeprefix("looks like ") for row in rows
                 if row.startswith("likely ")), ""), ""


def _size(stage: StageResult) -> str:
    """How far, and how much of the stage is wrong."""
    sigmas, bound_ratio = from_number(stage.sigmas), ratio_of(stage.bound_ratio)
    counted = "" if stage.exact else f"; {stage.num_bad} of {stage.num_checked} elements are above it"
    likely = f", {format_ratio(stage.ratio)}x what is likely" if ratio_of(stage.ratio) > bound_ratio > 1 else ""
    return excess(stage) + likely + (f", {format_ratio(sigmas)} sigma" if 0 < sigmas < _SIGMAS_SHOWN else "") + counted


def _whole(stage: StageResult) -> str:
    """Best-fit scale and bias, and the statistics, those above what they may be first."""
    parts = [] if stage.exact else [f"best-fit scale {from_number(stage.scale):.4g}, "
                                    f"bias {from_number(stage.bias):+.2g} of what is allowed"]
    ranked = sorted(stage.statistics, key=lambda one: -ratio_of(one.value) / max(ratio_of(one.allowed), 1e-300))
    for one in ranked:
        value, allowed = from_number(one.value), from_number(one.allowed)
        places = {"token": one.token, "expert": one.expert, "tp rank": one.rank}
        named = ", ".join(f"{name} {number}" for name, number in places.items() if number is not None)
        parts.append(f"{one.name} {value:.3g} of at most {allowed:.3g}" + (f" ({named})" if named else "")
                     + " FAIL" * (value > allowed))
    return "; ".join(parts)


def _by_reason(lines: Iterable[CaseLine], verdict: Verdict) -> list[tuple[str, str, list[CaseLine]]]:
    """(first line of the reason, the rest of the smallest case's reason, cases by size), most frequent first."""
    found: dict[str, list[CaseLine]] = {}
    for line in lines:
        if line.verdict == verdict:
            found.setdefault(line.reason.partition("\n")[0] or "no reason recorded", []).append(line)
    ordered = [(reason, sorted(members, key=lambda line: (size_of(line.case), line.case)))
               for reason, members in found.items()]
    return [(reason, members[0].reason.partition("\n")[2], members)
            for reason, members in sorted(ordered, key=lambda pair: (-len(pair[1]), pair[0]))]
