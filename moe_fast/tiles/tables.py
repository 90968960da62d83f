"""The files: one per architecture, and other.json for those without one."""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import NoReturn, TypeVar

from moe_fast.tiles.tile import Tile
from moe_ref.contract.errors import UsageValueError

FOLDER = Path(__file__).parent
OTHER = "other"
TUNED_KERNELS = ("gate_up", "down")
DTYPES = ("bf16", "fp16", "fp32")
MANY = 2**62


@dataclass(frozen=True)
class Entry:
    """The tile up to so many rows per expert (none: MANY); its block_n is shared among `columns` of all accumulators.

    narrowest: how far block_n may be halved where a GPU would have less than `programs` programs per multiprocessor.
    """

    rows: int
    columns: int
    narrowest: int
    programs: float
    tile: Tile

    def widths(self, accumulators: int) -> list[int]:
        """What block_n may be, the widest first."""
        found = [min(self.tile.block_n, self.columns // accumulators)]
        while found[-1] > self.narrowest:
            found.append(found[-1] // 2)
        return found


@dataclass(frozen=True)
class Product:
    """A grouped product on one rank; accumulators: 2 for gate and up at once."""

    kernel: str
    dtype: str
    out_features: int
    in_features: int
    accumulators: int
    experts: int


@dataclass(frozen=True)
class Measured:
    """Where and when an entry was found; microseconds of its tile and of the heuristic's in the same run."""

    device: str
    torch: str
    triton: str
    date: str
    microseconds: float
    heuristic_microseconds: float


@dataclass(frozen=True)
class Tuned:
    """The best tile of a product at so many routed rows."""

    product: Product
    rows: int
    tile: Tile
    measured: Measured


@dataclass(frozen=True)
class Table:
    """One file. multiprocessors: of the largest device of that architecture, which programs should fill."""

    multiprocessors: int
    heuristic: tuple[Entry, ...]
    tuned: tuple[Tuned, ...]

    @cached_property
    def by_product(self) -> dict[Product, list[Tuned]]:
        """The tuned entries of each product."""
        found: dict[Product, list[Tuned]] = {}
        for one in self.tuned:
            found.setdefault(one.product, []).append(one)
        return found


@cache
def table_of(architecture: str) -> Table:
    """The table of an architecture as sm_90, OTHER's where it has none."""
    path = table_path(architecture)
    return read_tiles(path if path.exists() else table_path(OTHER))


def table_path(architecture: str) -> Path:
    """Where an architecture's file is, or would be."""
    return FOLDER / f"{architecture}.json"


def read_tiles(path: Path) -> Table:
    """One file; raises UsageValueError with file and entry for whatever is not as this module says."""
    try:
        document = json.loads(path.read_text(), parse_constant=lambda name: _refuse(f"the number {name}"))
        table = _table(document)
    except (OSError, ValueError) as error:
        raise UsageValueError(f"{path}: {error}") from error
    return table


Record = TypeVar("Record")


def _table(document: object) -> Table:
    given = _members(document, ("multiprocessors", "heuristic", "tuned"))
    multiprocessors = _count("multiprocessors", given["multiprocessors"])
    heuristic = tuple(_each("heuristic", given["heuristic"], _entry))
    tuned = tuple(_each("tuned", given["tuned"], _tuned))
    for name, values in (("rows", [one.rows for one in heuristic]),
                         ("block_m", [one.tile.block_m for one in heuristic])):
        if values != sorted(set(values)):
            _refuse(f"heuristic: {name} {values}, but should grow from entry to entry")
    if not heuristic or heuristic[-1].rows != MANY:
        _refuse("heuristic: the last entry should be of any number of rows, null")
    blocks, seen = {one.tile.block_m for one in heuristic}, set[tuple[Product, int]]()
    for number, one in enumerate(tuned):
        if one.tile.block_m not in blocks:
            _refuse(f"tuned[{number}]: block_m={one.tile.block_m}, but should be one of the heuristic's "
                    f"{sorted(blocks)}, so that the kernel beside it has a tile for the same blocks of rows")
        if (one.product, one.rows) in seen:
            _refuse(f"tuned[{number}]: a second entry of {one.product} at {one.rows} rows")
        seen.add((one.product, one.rows))
    return Table(multiprocessors, heuristic, tuned)


def _entry(document: object) -> Entry:
    given = _members(document, ("rows", "columns", "narrowest", "programs", "tile"))
    tile = tile_of(given["tile"])
    rows = MANY if given["rows"] is None else _count("rows", given["rows"])
    narrowest = _power("narrowest", given["narrowest"], 16, tile.block_n)
    columns = _power("columns", given["columns"], 4 * 16, 1024)  # of four accumulators at most
    if not _is_positive(given["programs"]):
        _refuse(f"programs={given['programs']!r}, but should be above 0")
    return Entry(rows, columns, narrowest, float(given["programs"]), tile)  # pyrefly: ignore


def _tuned(document: object) -> Tuned:
    names = tuple(field.name for field in fields(Product))
    given = _members(document, (*names, "rows", "tile", "measured"))
    return Tuned(product_of({name: given[name] for name in names}), _count("rows", given["rows"]),
                 tile_of(given["tile"]), _measured(given["measured"]))


def product_of(document: object) -> Product:
    """A product from its fields; ValueError for anything else."""
    given = _members(document, tuple(field.name for field in fields(Product)))
    kernel, dtype = given["kernel"], given["dtype"]
    if kernel not in TUNED_KERNELS:
        _refuse(f"kernel {kernel!r}, but should be one of {', '.join(TUNED_KERNELS)}")
    if dtype not in DTYPES:
        _refuse(f"dtype {dtype!r}, but should be one of {', '.join(DTYPES)}")
    counts = {name: _count(name, given[name]) for name in ("out_features", "in_features", "accumulators", "experts")}
    return Product(str(kernel), str(dtype), **counts)


def _measured(document: object) -> Measured:
    kinds = {field.name: field.type for field in fields(Measured)}
    given = _members(document, tuple(kinds))
    for name, value in given.items():
        if not (isinstance(value, str) if kinds[name] is str else _is_positive(value)):
            _refuse(f"measured: {name}={value!r}, but should be {'text' if kinds[name] is str else 'above 0'}")
    return Measured(**given)  # pyrefly: ignore


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


_LIMITS = {"block_m": (16, 256), "block_n": (16, 512), "block_k": (16, 512), "num_warps": (1, 16)}
_COUNTS = {"num_stages": 8, "group": 128}


def tile_of(document: object) -> Tile:
    """A tile from every field that has no default, and any of the others; ValueError for anything else."""
    needed = tuple(field.name for field in fields(Tile) if field.default is MISSING)
    given = _members(document, needed, tuple(field.name for field in fields(Tile) if field.name not in needed))
    for name, value in given.items():
        if name in _LIMITS:
            _power(name, value, *_LIMITS[name])
        elif name in _COUNTS:
            if _count(name, value) > _COUNTS[name]:
                _refuse(f"{name}={value}, but should be at most {_COUNTS[name]}")
        elif not isinstance(value, bool):
            _refuse(f"{name}={value!r}, but should be true or false")
    return Tile(**given)  # pyrefly: ignore


def _each(name: str, document: object, read: Callable[[object], Record]) -> list[Record]:
    if not isinstance(document, list):
        _refuse(f"{name} is a {type(document).__name__}, but should be a list")
    found = []
    for number, one in enumerate(document):
        try:
            found.append(read(one))
        except ValueError as error:
            _refuse(f"{name}[{number}]: {error}")
    return found


def _members(document: object, needed: tuple[str, ...], others: tuple[str, ...] = ()) -> Mapping[str, object]:
    if not isinstance(document, dict):
        _refuse(f"a {type(document).__name__}, but should be an object")
    if missing := [name for name in needed if name not in document]:
        _refuse(f"no {', '.join(missing)}")
    if unknown := [name for name in document if name not in (*needed, *others)]:
        _refuse(f"unknown {', '.join(unknown)}; known are {', '.join((*needed, *others))}")
    return document


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _refuse(f"{name}={value!r}, but should be an integer from 1")
    return value


def _power(name: str, value: object, least: int, most: int) -> int:
    size = _count(name, value)
    if size & (size - 1) or not least <= size <= most:
        _refuse(f"{name}={size}, but should be a power of two from {least} to {most}")
    return size


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
