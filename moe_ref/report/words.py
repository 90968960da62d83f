"""Records in words: ratios, the place of an error, the worst element, the replay line."""

import math
import shlex
from collections.abc import Sequence

from moe_ref.records.refused import Refused
from moe_ref.records.schema import CaseLine, Number, StageResult, from_number
from moe_ref.report.facts import culprit, ratio_of


def format_ratio(value: Number) -> str:
    """A ratio in words: two digits, more beside 1.0 and from 100 on; one above its bound never reads as 1."""
    number = from_number(value)
    if 99.5 <= number < 99_950:
        return f"{float(f'{number:.3g}'):.0f}"
    if not 0.95 <= number < 1.05:
        return f"{number:.2g}"
    text = f"{number:.4g}"
    return f"{number:.9g}" if text == "1" and number > 1 else text


def excess(stage: StageResult) -> str:
    """How far a failing stage is off: '41x its bound', or '7x what is likely' of one whose elements are all inside it;
    exact stages differ, nan and inf stay words.
    """
    ratio, bound_ratio = from_number(stage.ratio), from_number(stage.bound_ratio)
    if stage.exact:
        return f"{stage.num_bad} of {stage.num_checked} differ"
    ratio, of_what = (bound_ratio, "its bound") if bound_ratio > 1 else (ratio, "what is likely")
    return f"{format_ratio(ratio)}x {of_what}" if math.isfinite(ratio) else f"error / allowed is {ratio}"


def stage_ratio(stage: StageResult) -> str:
    """Error / allowed of a stage; exact ones are equal or differ."""
    if stage.exact:
        return "differ" if ratio_of(stage.ratio) > 0 else "="
    return format_ratio(stage.ratio)


def where(line: CaseLine) -> str:
    """Where the first failing stage is wrong, in words; the reason if no stage was compared."""
    stage = culprit(line)
    if stage is None or not stage.num_bad:
        return first_line(line.reason)
    parts = [_numbers("expert", stage.bad_experts), _numbers("rank", stage.bad_ranks),
             _numbers("tile", stage.bad_tiles) + (f" of {stage.num_tiles}" if stage.bad_tiles else "")]
    tokens = _numbers("token", stage.bad_tokens)
    if stage.num_bad_tokens > len(stage.bad_tokens):
        tokens = f"{stage.num_bad_tokens} tokens" + (f" ({tokens}, ...)" if tokens else "")
    parts.append(tokens)
    return ", ".join(filter(None, parts)) or f"{stage.num_bad} of {stage.num_checked} elements"


def _numbers(name: str, values: list[int]) -> str:
    """'expert 3', 'tiles 0-5, 9': consecutive numbers as ranges."""
    if not values:
        return ""
    ranges: list[list[int]] = []
    for value in sorted(values):
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return f"{name}{'s' if len(values) > 1 else ''} {text}"


def worst_element(stage: StageResult) -> str:
    """The worst element in words; '' if none was recorded."""
    if stage.worst is None:
        return ""
    worst = stage.worst
    axes = {"rank": worst.rank, "token": worst.token, "row": worst.row, "slot": worst.slot, "expert": worst.expert,
            "column": worst.column}
    place = ", ".join(f"{name} {value}" for name, value in axes.items() if value is not None)
    return f"{stage.stage}[{place}] got {worst.got}, want {worst.want}, allowed {worst.allowed}"


def replay(line: CaseLine) -> str:
    """The command that runs the case again."""
    return line.replay or shlex.join(["moe-ref", "replay", line.case, "--impl", line.implementation.name])


def first_line(text: str) -> str:
    """The first line; reasons of crashes carry a traceback below it."""
    return text.partition("\n")[0]


def printable(text: str) -> str:
    """Text with control characters and line breaks as spaces; other spaces stay, so columns stay aligned."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def one_line(text: str, limit: int = 300) -> str:
    """Text of a record on one line, cut at `limit`, without control characters (a terminal obeys them)."""
    plain = " ".join(printable(text).split())
    return plain if len(plain) <= limit else plain[:limit - 3] + "..."


def refused_words(refused: Sequence[Refused]) -> str:
    """'2 lines and 1 file refused', '' for none."""
    lines = sum(one.number for one in refused if one.line is not None or one.number > 1)
    files = sum(one.line is None and one.number == 1 for one in refused)
    found = [plural(number, noun) for number, noun in ((lines, "line"), (files, "file")) if number]
    return f"{' and '.join(found)} refused" if found else ""


def plural(number: int, noun: str) -> str:
    """'1 failure', '2 failures'; a noun in -pass stays as it is."""
    return f"{number} {noun}" + ("" if number == 1 or noun.endswith("pass") else "s")
