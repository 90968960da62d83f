"""Trials to entries of a table: for each shape the block_m whose two products take the least time together."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from moe_fast.tiles.tables import Product, Tuned, read_tiles
from moe_fast.tune.shapes import Shape
from moe_fast.tune.trial import Trial
from moe_ref.contract.errors import UsageValueError


def best_entries(shapes: Iterable[Shape], trials: Sequence[Trial]) -> list[Tuned]:
    """Two entries of each shape whose products were both timed on a GPU, with the same block_m."""
    found = []
    for shape in shapes:
        first, second = (_finals(product, shape.load.rows, trials) for product in shape.products)
        blocks = {one.tile.block_m for one in first} & {one.tile.block_m for one in second}
        pairs = [(_fastest(first, block_m), _fastest(second, block_m)) for block_m in sorted(blocks)]
        if pairs:
            pair = min(pairs, key=lambda both: both[0].microseconds + both[1].microseconds)
            found += [_entry(one, several) for one, several in zip(pair, (first, second), strict=True)]
    return found


def _finals(product: Product, rows: int, trials: Sequence[Trial]) -> list[Trial]:
    return [one for one in trials if (one.product, one.rows, one.status) == (product, rows, "BEST") and one.evidence]


def _fastest(trials: Sequence[Trial], block_m: int) -> Trial:
    return min((one for one in trials if one.tile.block_m == block_m), key=lambda one: one.microseconds)


def _entry(best: Trial, trials: Sequence[Trial]) -> Tuned:
    """Beside the time of the heuristic's tile; its own where that did not run."""
    heuristic = next((one.microseconds for one in trials if one.heuristic), best.microseconds)
    return Tuned(best.product, best.rows, best.tile, best.measured(heuristic))


def write_entries(path: Path, entries: Sequence[Tuned]) -> None:
    """Into the table at `path`, in place of those of the same product and rows; one line each, so that a diff shows
    them. UsageValueError, and the file as it was, where the result would be no table.
    """
    before, table = path.read_text(), read_tiles(path)
    replaced = {(one.product, one.rows) for one in entries}
    kept = [one for one in table.tuned if (one.product, one.rows) not in replaced]
    lines = ",\n".join(f"  {json.dumps(_document(one))}" for one in sorted([*kept, *entries], key=_place))
    head, found, _ = before.partition('"tuned": [')
    assert found
    path.write_text(f'{head}{found}\n{lines}]}}\n')
    try:
        read_tiles(path)
    except UsageValueError:
        path.write_text(before)
        raise


def _document(one: Tuned) -> dict[str, object]:
    return {**asdict(one.product), "rows": one.rows, "tile": asdict(one.tile), "measured": asdict(one.measured)}


def _place(one: Tuned) -> tuple:
    return (*asdict(one.product).values(), one.rows)
