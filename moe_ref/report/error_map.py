"""An error map of a record as a drawing with borders of tiles, experts and ranks, and in words.

Colours are see-through below the bound, so that they lie as well on a dark page; text and lines are `currentColor`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from moe_ref.contract.vocabulary import Stage
from moe_ref.records.error_map import BEYOND, MOST_BINS, PROFILE, WITHIN, ErrorMap
from moe_ref.records.schema import StageResult
from moe_ref.report.png import Colour, png_uri
from moe_ref.report.words import excess, plural

TILE = 64
"""Columns between thin lines."""

_WIDTH, _LEFT, _TOP, _BOTTOM = 640, 78, 30, 32
_HEIGHTS = (110, 330)
_LEAST_WIDTH = 560
"""On a narrow page the map is scrolled, so that its words stay readable."""
_LEAST_GAP = 4
"""Lines nearer than this, in pixels, would hide what lies below them, and are left out."""
_LABEL_GAP = 11
_MOST_SPANS = 4
_LEAST_PROFILE = 16
_COLUMNS: dict[str, str] = {Stage.LOGITS: "expert", Stage.GRAD_LOGITS: "expert", Stage.WEIGHTS: "slot"}

_HEAT = (47, 111, 219)
_BAD = ((240, 140, 0), (225, 45, 57), (190, 24, 160))
_BAD_OCTAVES = 12
"""Twice the bound is the first colour, 2^12 times and more the last."""


@dataclass(frozen=True)
class DrawnMap:
    """An <svg> of the map, one of its profile ("" where that tells nothing), the map in words, what tails say."""

    drawing: str
    profile: str
    words: str
    tail: str


@dataclass(frozen=True)
class _Span:
    """What lies above the bound along one axis: [start, stop) in elements."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}" if self.stop == self.start + 1 else f"{self.start}-{self.stop - 1}"


def draw_map(stage: StageResult) -> DrawnMap:
    """The map of a stage that has one; raises ValueError where the record holds none that can be drawn."""
    found = stage.error_map
    if found is None:
        raise ValueError("none was recorded")
    levels, profile = found.levels(), found.profile_levels()
    for name, marks, limit in (("experts", found.experts, found.num_rows), ("ranks", found.ranks, found.num_columns),
                               ("row_ranks", found.row_ranks, found.num_rows)):
        if len(marks) > 4 * MOST_BINS or any(not 0 <= start < limit for start, _ in marks):
            raise ValueError(f"{name} begin outside of the map")
    noun = _COLUMNS.get(stage.stage, "column")
    words = _words(stage, found, levels, noun)
    # Where no expert has more rows than the smallest tile, a profile is the map again.
    tells = sum(map(bool, profile)) > _LEAST_PROFILE and len({level > WITHIN for level in profile if level}) == 2
    tail = f"exactly the rows of last, partial tiles of {_either(found.tails)} rows are wrong" if found.tails else ""
    return DrawnMap(_svg(found, levels, words, noun), _strip(profile) if tells else "", words, tail)


def palette() -> list[Colour]:
    """The colour of every level: none, blue up to the bound, then orange to red to magenta."""
    colours: list[Colour] = [(0, 0, 0, 0)]
    colours += [(*_HEAT, 14 + 7 * level) for level in range(WITHIN)]
    for level in range(WITHIN + 1, BEYOND + 1):
        place = 2 * min(1.0, (level - WITHIN - 1) / _BAD_OCTAVES)
        start = min(1, int(place))
        red, green, blue = (round(one + (other - one) * (place - start))
                            for one, other in zip(_BAD[start], _BAD[start + 1], strict=True))
        colours.append((red, green, blue, 255))
    return colours


def legend() -> list[tuple[str, str]]:
    """(colour as CSS, words) of some levels, the hard edge between the third and the fourth."""
    colours = palette()
    shown = ((1, "0"), (WITHIN - 6, "1/100"), (WITHIN, "1"), (WITHIN + 1, "2"), (WITHIN + 7, "100"), (BEYOND, "inf"))
    return [(f"rgba({red}, {green}, {blue}, {opacity / 255:.2f})", words)
            for (red, green, blue, opacity), words in ((colours[level], words) for level, words in shown)]


def _words(stage: StageResult, found: ErrorMap, levels: Sequence[bytes], noun: str) -> str:
    """As "down: rows of expert 5, columns 64-127, 2 of 33 rows above the bound; largest 41x its bound"."""
    bad_rows = [number for number, row in enumerate(levels) if max(row) > WITHIN]
    if not bad_rows:
        return f"{stage.stage}: no element above its bound"
    bad_columns = [number for number in range(len(levels[0])) if any(row[number] > WITHIN for row in levels)]
    rows = _spans(bad_rows, found.row_step, found.num_rows)
    columns = _spans(bad_columns, found.column_step, found.num_columns)
    experts = stage.bad_experts or _experts(found, rows)
    named = f"rows of {_listed('expert', _spans(experts, 1, 1 + max(experts)))}" if experts else _listed("row", rows)
    count = (f"{len(bad_rows)} of {plural(len(levels), 'row')}" if found.row_step == 1 else
             f"{len(bad_rows)} of {len(levels)} bins of {found.row_step} rows")
    return (f"{stage.stage}: {named}, {_listed(noun, columns)}, {count} above the bound; "
            f"{'' if stage.exact else 'largest '}{excess(stage)}")


def _spans(bins: Iterable[int], step: int, size: int) -> list[_Span]:
    """Neighbouring bins as one span each."""
    spans: list[_Span] = []
    for number in sorted(bins):
        one = _Span(number * step, min(size, (number + 1) * step))
        if spans and spans[-1].stop == one.start:
            one = _Span(spans.pop().start, one.stop)
        spans.append(one)
    return spans


def _listed(name: str, spans: Sequence[_Span]) -> str:
    shown = ", ".join(map(str, spans[:_MOST_SPANS])) + ", ..." * (len(spans) > _MOST_SPANS)
    return f"{name}{'s' * (len(spans) > 1 or spans[0].stop > spans[0].start + 1)} {shown}"


def _experts(found: ErrorMap, rows: Sequence[_Span]) -> list[int]:
    """Experts that rows above the bound may belong to."""
    ends = [start for start, _ in found.experts[1:]] + [found.num_rows]
    return sorted({expert for (start, expert), end in zip(found.experts, ends, strict=False)
                   if any(span.start < end and start < span.stop for span in rows)})


def _either(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _svg(found: ErrorMap, levels: Sequence[bytes], words: str, noun: str) -> str:
    """The picture below its borders; everything in it is a number or escaped."""
    bins_high = len(levels)
    height = min(max(6 * bins_high, _HEIGHTS[0]), _HEIGHTS[1])
    across, down = _WIDTH / (len(levels[0]) * found.column_step), height / (bins_high * found.row_step)
    right, low = _LEFT + found.num_columns * across, _TOP + found.num_rows * down
    parts = [f'<image x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{height}" preserveAspectRatio="none" '
             f'style="image-rendering:pixelated" href="{png_uri(levels, palette())}"/>']
    tiles = range(0, found.num_columns, TILE)
    if TILE * across >= _LEAST_GAP:
        parts += [_line(x, _TOP, x, low, 0.5, 0.3) for x in (_LEFT + tile * across for tile in tiles[1:])]
    parts += _labels([(_LEFT + tile * across, str(tile)) for tile in tiles], 3 * _LABEL_GAP, low + 12)
    parts.append(_text(_LEFT, low + 26, f"{noun}s, {found.column_step} in a cell; thin lines: tiles of {TILE}"))
    parts += _expert_borders(found, down, right)
    for column, _ in found.ranks[1:]:
        parts.append(_line(_LEFT + column * across, _TOP - 6, _LEFT + column * across, low, 1.6, 0.9))
    parts += _labels([(_LEFT + column * across, f"tp rank {rank}") for column, rank in found.ranks], 50, _TOP - 8)
    for row, rank in found.row_ranks:
        y = _TOP + row * down
        parts.append(_line(_LEFT, y, right + 6, y, 1.6, 0.9))
        parts.append(_text(right + 8, y + 10, f"rank {rank}"))
    rows = f"{found.rows}, {found.row_step} in a cell"
    parts.append(_text(0, 10, rows))
    parts.append(f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT:.1f}" height="{low - _TOP:.1f}" fill="none" '
                 'stroke="currentColor" stroke-width="0.8"/>')
    size = (_LEFT + _WIDTH + 60, _TOP + height + _BOTTOM)
    return _frame(size, words, parts)


def _expert_borders(found: ErrorMap, down: float, right: float) -> list[str]:
    """A line where each expert begins, its number in the middle of its rows; where there is room."""
    ends = [start for start, _ in found.experts[1:]] + [found.num_rows]
    parts, last_line, last_label = list[str](), -1e9, -1e9
    for (start, expert), end in zip(found.experts, ends, strict=False):
        y, middle = _TOP + start * down, _TOP + (start + end) / 2 * down + 3
        if start and y - last_line >= _LEAST_GAP:
            parts.append(_line(_LEFT - 5, y, right, y, 0.9, 0.75))
            last_line = y
        if middle - last_label >= _LABEL_GAP:
            parts.append(_text(_LEFT - 8, middle, f"expert {expert}", "end"))
            last_label = middle
    return parts


def _strip(profile: bytes) -> str:
    """The largest of each place in tiles, in a row."""
    words = (f"Rows by their number within their expert (tokens and rows of a parameter: by their own) mod {PROFILE}: "
             f"{_listed('place', _spans([n for n, level in enumerate(profile) if level > WITHIN], 1, PROFILE))} "
             "above the bound")
    across = _WIDTH / PROFILE
    parts = [f'<image x="{_LEFT}" y="16" width="{_WIDTH}" height="14" preserveAspectRatio="none" '
             f'style="image-rendering:pixelated" href="{png_uri([profile], palette())}"/>',
             _text(0, 10, f"rows by their place in tiles, number mod {PROFILE}; lines: tiles of 16, heavier of 32")]
    parts += [_line(_LEFT + place * across, 14, _LEFT + place * across, 32, 0.6 if place % 32 else 1.2, 0.8)
              for place in range(0, PROFILE + 1, 16)]
    parts += [_text(_LEFT + place * across, 42, str(place), "middle") for place in range(0, PROFILE, 16)]
    return _frame((_LEFT + _WIDTH + 60, 46), words, parts)


def _frame(size: tuple[int, int], words: str, parts: Sequence[str]) -> str:
    width, height = size
    style = f"max-width:{width}px;min-width:{_LEAST_WIDTH}px"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(words)}" style="{style}" font-size="10" font-family="sans-serif" '
            f'fill="currentColor"><title>{escape(words)}</title>{"".join(parts)}</svg>')


def _line(x1: float, y1: float, x2: float, y2: float, width: float, opacity: float) -> str:
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" '
            f'stroke-width="{width:g}" stroke-opacity="{opacity:g}"/>')


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _labels(labels: Sequence[tuple[float, str]], gap: float, y: float) -> list[str]:
    """Those that stand far enough from the one before."""
    parts, last = list[str](), -1e9
    for x, words in labels:
        if x - last >= gap:
            parts.append(_text(x, y, words))
            last = x
    return parts
