"""Protects the choice of tiles: files that are read strictly, rows and programs that the heuristic follows, and entries
that a GPU has tuned, which are compiled, run and found wrong like any other tile.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

import moe_fast
from moe_fast.architecture import assuming
from moe_fast.compile import ARCHITECTURES, compile_all, faults
from moe_fast.compile.products import tile_combinations, tuned_combinations
from moe_fast.tiles import Load, Tile, gemm_tile, tables
from moe_fast.tiles.tables import FOLDER, OTHER, Product, Tuned, read_tiles, table_of
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Verdict
from tests.in_process import judged
from tests.test_gpu_tiles import on_gpu

META = torch.device("meta")
GATE_UP = {"kernel": "gate_up", "dtype": "bf16", "out_features": 1792, "in_features": 4096, "accumulators": 2,
           "experts": 8}
DOWN = {"kernel": "down", "dtype": "bf16", "out_features": 4096, "in_features": 1792, "accumulators": 1, "experts": 8}
MEASURED = {"device": "made up", "torch": "2", "triton": "3", "date": "2026-01-01", "microseconds": 1.0,
            "heuristic_microseconds": 2.0}
TILE = {"block_m": 32, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2, "group": 1}


def chosen(rows: int, kernel: str = "gate_up", experts: int = 8, architecture: str = "sm_90",
           block_m: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Tile:
    """Of a rank of Mixtral 8x7B at tp 8."""
    out, inner, accumulators = (1792, 4096, 2) if kernel == "gate_up" else (4096, 1792, 1)
    with assuming(architecture):
        return gemm_tile(META, dtype, Load(rows, experts), out, inner, accumulators, kernel=kernel, block_m=block_m)


def entry(of: dict[str, object], rows: int, **tile: object) -> dict[str, object]:
    """A tuned entry as a file has it."""
    return {**of, "rows": rows, "tile": TILE | tile, "measured": MEASURED}


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes sm_90's file with other parts, which then counts in place of the real one."""
    def written(**parts: object) -> Path:
        for real in FOLDER.glob("*.json"):
            (tmp_path / real.name).write_text(real.read_text())
        path = tmp_path / "sm_90.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))
        table_of.cache_clear()
        return path
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    yield written
    table_of.cache_clear()


# Files


@pytest.mark.parametrize("name", [*ARCHITECTURES, OTHER])
def test_every_architecture_has_a_file(name: str) -> None:
    """And every file is one that is read; what has none takes that of all others."""
    assert read_tiles(FOLDER / f"{name}.json").heuristic
    assert {path.stem for path in FOLDER.glob("*.json")} == {*ARCHITECTURES, OTHER}
    assert table_of("sm_12") == read_tiles(FOLDER / f"{OTHER}.json")


def broken(document: dict, *path: object, value: object = None, gone: bool = False) -> dict:
    """The document with one place changed, or gone."""
    *outer, last = path
    place = document
    for step in outer:
        place = place[step]
    if gone:
        del place[last]
    else:
        place[last] = value
    return document


FIRST = ("heuristic", 0)


@pytest.mark.parametrize(("path", "value", "words"), [
    (("more",), 1, "unknown more"),
    (("multiprocessors",), 0, "multiprocessors=0, but should be an integer from 1"),
    (("multiprocessors",), True, "multiprocessors=True"),
    ((*FIRST, "tile", "block_n"), 48, "heuristic[0]: block_n=48, but should be a power of two from 16 to 512"),
    ((*FIRST, "tile", "block_m"), 8, "block_m=8"),
    ((*FIRST, "tile", "num_stages"), 9, "num_stages=9, but should be at most 8"),
    ((*FIRST, "tile", "block_z"), 16, "heuristic[0]: unknown block_z"),
    ((*FIRST, "narrowest"), 256, "narrowest=256, but should be a power of two from 16 to 128"),
    ((*FIRST, "rows"), 40, "heuristic: rows [40, 32,"),
    ((*FIRST, "tile", "block_m"), 32, "heuristic: block_m [32, 32,"),
    (("heuristic", -1, "rows"), 999, "the last entry should be of any number of rows"),
    (("tuned",), {}, "tuned is a dict, but should be a list"),
    (("tuned",), [entry(GATE_UP, 4) | {"more": 1}], "tuned[0]: unknown more"),
    (("tuned",), [entry(GATE_UP | {"kernel": "up"}, 4)], "kernel 'up', but should be one of gate_up, down"),
    (("tuned",), [entry(GATE_UP | {"dtype": "fp8"}, 4)], "dtype 'fp8'"),
    (("tuned",), [entry(GATE_UP, 4), entry(GATE_UP, 4)], "tuned[1]: a second entry"),
    (("tuned",), [entry(GATE_UP, 4, block_m=256)], "tuned[0]: block_m=256, but should be one of the heuristic's"),
    ((*FIRST, "programs"), 0, "heuristic[0]: programs=0, but should be above 0"),
    (("tuned",), [entry(GATE_UP, 4) | {"measured": MEASURED | {"microseconds": 0}}], "measured: microseconds=0"),
    (("tuned",), [entry(GATE_UP, 4) | {"measured": MEASURED | {"device": 5}}], "measured: device=5"),
])
def test_a_fault_in_a_file_is_named(path: tuple, value: object, words: str, tmp_path: Path) -> None:
    """File, entry, what was there and what should be: a silent mistake in a table is a slow or a wrong layer."""
    document = broken(json.loads((FOLDER / "sm_90.json").read_text()), *path, value=value)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(document))
    with pytest.raises(UsageValueError) as error:
        read_tiles(file)
    assert str(error.value).startswith(f"{file}: ")
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"multiprocessors": NaN, "heuristic": [], "tuned": []}'])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(UsageValueError, match=r"bad\.json: "):
        read_tiles(file)


@pytest.mark.parametrize("name", ["block_n", "block_k"])
def test_a_tile_has_its_sizes(name: str, tmp_path: Path) -> None:
    """Options of the compiler have defaults, sizes do not."""
    document = broken(json.loads((FOLDER / "sm_90.json").read_text()), *FIRST, "tile", name, gone=True)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(document))
    with pytest.raises(UsageValueError, match=f"no {name}"):
        read_tiles(file)


# The heuristic


def test_few_rows_have_programs_for_every_multiprocessor() -> None:
    """One token of Mixtral at tp 8 would start 56 programs on 132 multiprocessors with the widest columns."""
    for rows, experts in ((2, 2), (16, 8), (128, 8)):
        for kernel, out in (("gate_up", 1792), ("down", 4096)):
            tile = chosen(rows, kernel)
            assert tile.block_n == 16 or experts * out / tile.block_n >= 2 * 132
            assert (tile.block_m, tile.block_k) == (16, 128), "sums are cut as ever"
    assert (chosen(2).block_n, chosen(16).block_n) == (16, 32)
    assert chosen(2, architecture="sm_80").block_n == 16


def test_one_expert_of_many_rows_steps_down_to_smaller_blocks() -> None:
    """A shared expert at tp 8 has few columns: with 64 rows in a block it would be two programs."""
    with assuming("sm_90"):
        tile = gemm_tile(META, torch.bfloat16, Load(64, 1), 256, 7168, 2, kernel="gate_up")
        assert (tile.block_m, tile.block_n) == (16, 16)
        assert gemm_tile(META, torch.bfloat16, Load(2**16, 1), 256, 7168, 2, kernel="gate_up").block_m == 128


@pytest.mark.parametrize("rows", [1, 16, 100, 200, 500, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_products_of_a_layer_have_the_same_blocks_of_rows(rows: int, dtype: torch.dtype) -> None:
    """They share one alignment, whatever each would have chosen."""
    first = chosen(rows, dtype=dtype)
    assert chosen(rows, "down", block_m=first.block_m, dtype=dtype).block_m == first.block_m


def test_columns_are_not_padded_where_half_the_width_fits() -> None:
    """192 columns are three tiles of 64, not two of 128; 96 fill three quarters of either."""
    with assuming("sm_90"):
        tiles = [gemm_tile(META, torch.bfloat16, Load(2**13, 128), out, 2048, 2, kernel="gate_up") for out in (192, 96)]
    assert [(tile.block_m, tile.block_n) for tile in tiles] == [(64, 64), (64, 128)]


# Tuned entries


def test_the_nearest_tuned_entry_counts_and_only_if_it_is_near(write: Write) -> None:
    write(tuned=[entry(GATE_UP, 64), entry(GATE_UP, 256, block_n=128)])
    assert [(chosen(rows).num_stages, chosen(rows).block_n) for rows in (32, 64, 128, 161, 512)] == [
        (2, 64), (2, 64), (2, 64), (2, 128), (2, 128)]
    assert chosen(159).num_stages == 3, "nearest to 64, but more than twice that"
    heuristic = [chosen(rows, experts=7) for rows in (31, 513)]
    assert [chosen(31).block_m, chosen(513).block_m] == [tile.block_m for tile in heuristic] == [16, 128]


def test_a_tuned_entry_is_of_one_kernel_shape_and_dtype(write: Write) -> None:
    """Down at those rows has the heuristic's tile of the same blocks of rows, where it has no entry of them."""
    write(tuned=[entry(GATE_UP, 16), entry(DOWN, 16, block_m=64)])
    assert chosen(16) == Tile(**TILE)
    assert chosen(16, "down", block_m=32).block_m == 32
    assert chosen(16, "down", block_m=64).block_n == 64
    assert chosen(16, dtype=torch.float16) != Tile(**TILE)
    assert chosen(16, experts=4) != Tile(**TILE)


def judge_tile(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    """A small layer, past the tile's borders, with this tile in both products."""
    def fixed(*arguments: object, **options: object) -> Tile:
        return tile
    for chooser in ("moe_fast.kernels.gate_up.gemm_tile", "moe_fast.operators.experts.gemm_tile"):
        monkeypatch.setattr(chooser, fixed)
    return judged(moe_fast, f"v1-T{3 * tile.block_m}.H208.I160.E4.K2-bf16-norm", runs=1).verdict


def all_tuned() -> list[Tuned]:
    """Of every file."""
    return [one for name in [*ARCHITECTURES, OTHER] for one in table_of(name).tuned]


def test_every_tuned_tile_computes_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the heuristic: a tile that some GPU liked is run before anybody depends on it."""
    for tile in {one.tile for one in all_tuned()}:
        assert judge_tile(tile, monkeypatch) == Verdict.PASS, tile


def test_a_tuned_entry_is_run(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the choice that a layer makes; a kernel that is wrong with that tile alone would be found."""
    small = {"dtype": "bf16", "experts": 4}
    write(tuned=[entry(GATE_UP | small | {"out_features": 160, "in_features": 208}, 64),
                 entry(DOWN | small | {"out_features": 208, "in_features": 160}, 64, block_n=128)])
    used = on_gpu(monkeypatch)
    assert judged(moe_fast, "v1-T32.H208.I160.E4.K2-bf16-norm", runs=1).verdict == Verdict.PASS
    assert {Tile(**TILE), Tile(**TILE | {"block_n": 128})} <= used
    assert len({one.tile for one in all_tuned()}) == 2
    assert judge_tile(Tile(**TILE), monkeypatch) == Verdict.PASS


@pytest.mark.nightly("test_compile has faults that the gate finds")
def test_a_tuned_entry_that_does_not_fit_is_refused_by_the_gate(write: Write) -> None:
    """Five stages of 128 x 256 need more shared memory than a block may have; nothing else would say so."""
    write(tuned=[entry(GATE_UP, 16), entry(DOWN, 4096, block_m=128, block_n=256, num_warps=8, num_stages=5)])
    good, bad = tuned_combinations(["sm_90"])
    found = compile_all([good, bad], 1)
    assert faults(good, found[0]) == []
    assert any("bytes of shared memory, but a block on sm_90 has 232448" in reason for reason in faults(bad, found[1]))


def test_every_width_of_the_tables_can_be_compiled() -> None:
    """`moe-ref compile --tiles`: one combination for each width of each entry and kernel, and the tuned ones."""
    for name in ARCHITECTURES:
        table = table_of(name)
        widths = sum(len(one.widths(accumulators)) for one in table.heuristic for accumulators in (1, 2))
        assert len(tile_combinations([name])) == widths + len(tuned_combinations([name]))


def test_an_entry_says_all_that_a_product_is() -> None:
    """Fields that a file needs are those of the classes."""
    assert {*asdict(Product(**GATE_UP))} == {field.name for field in fields(Product)} == {*GATE_UP}
