"""Protects the tuner: what it tries, what it finds wrong, that a run that died goes on, and that only a GPU's times get
into a table.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moe_fast.compile.resources import Resources
from moe_fast.tiles.tables import read_tiles, table_path
from moe_fast.tiles.tile import Load, Tile
from moe_fast.tune import Search, Shape, Trial, best_entries, candidates, read_trials, search, space, write_entries
from moe_fast.tune import run as run_module
from moe_fast.tune.shapes import draw, fault
from moe_ref.cli.main import cli
from moe_ref.contract.errors import UsageValueError

SHAPE = Shape(hidden=64, intermediate=48, experts=3, top_k=2, tokens=8)
GATE_UP, DOWN = SHAPE.products
TILE = Tile(16, 32, 64)
GOOD = Resources(registers=40, dots=("bf16",), matrix=("HMMA",))
LIMIT = 232448


@dataclass
class Kept:
    """What a search told."""

    trials: list[Trial]

    def doing(self, words: str, total: int) -> None:
        """Nothing to be shown."""

    def done(self, trial: Trial) -> None:
        self.trials.append(trial)


def by_width(calls: Mapping[Tile, Callable[[], object]]) -> dict[Tile, float]:
    """A clock that is faster for wider tiles, and for more rows in a block."""
    return {tile: 1000.0 / (tile.block_n + tile.block_m) for tile in calls}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A compiler that finds nothing wrong; what it was asked for."""
    asked: list[object] = []

    def compile_all(combinations: list[object], lanes: int) -> list[Resources]:
        asked.extend(combinations)
        return [GOOD for _ in combinations]
    monkeypatch.setattr(run_module, "compile_all", compile_all)
    return asked


def how(most: int | None = 4) -> Search:
    return Search("sm_90", "cpu", by_width, most=most)


# What is tried


@pytest.mark.parametrize("product", [GATE_UP, DOWN])
def test_candidates_fit_and_suit_the_shape(product) -> None:
    """No block of many more rows than an expert has, no stages that cannot be held; each is there once."""
    found = candidates(product, Load(16, 3), LIMIT)
    assert len(found) == len(set(found)) > 20
    assert {tile.block_m for tile in found} == {16}
    for tile in found:
        stage = (tile.block_m + product.accumulators * tile.block_n) * tile.block_k * 2
        assert stage * (tile.num_stages - 1) <= LIMIT
    assert {tile.block_m for tile in candidates(product, Load(3000, 3), LIMIT)} == {16, 32, 64, 128}


def test_switches_of_a_tile_are_tried_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that is no size is a switch, whatever its name."""
    @dataclass(frozen=True)
    class Switched(Tile):
        turned: bool = False

    before = candidates(DOWN, Load(16, 3), LIMIT)
    monkeypatch.setattr(space, "Tile", Switched)
    after = candidates(DOWN, Load(16, 3), LIMIT)
    assert len(after) == 2 * len(before)
    assert {tile.turned for tile in after} == {False, True}


# What is right


@pytest.mark.parametrize("product", [GATE_UP, DOWN])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_right_kernel_has_no_fault(product, dtype: str) -> None:
    """Whatever the tile: sums of exact operands have one value."""
    shape = replace(SHAPE, dtype=dtype)
    operands = draw(shape, replace(product, dtype=dtype), "cpu", exact=True)
    expected = operands.expected()
    assert expected.float().abs().mean() > 0.05
    for tile in (TILE, Tile(32, 16, 16), Tile(16, 64, 128)):
        assert fault(operands, operands.call(tile)(), expected) == ""


@pytest.mark.parametrize("product", [GATE_UP, DOWN])
def test_one_term_too_few_is_a_fault(product) -> None:
    """Where a tile's last step would be lost, or a row is another's."""
    operands = draw(SHAPE, product, "cpu", exact=True)
    expected = operands.expected()
    cut = operands.weights.clone()
    cut[..., -1] = 0
    assert "elements differ" in fault(operands, replace(operands, weights=cut).call(TILE)(), expected)
    assert "elements differ" in fault(operands, expected.roll(1, 0), expected)
    assert fault(operands, torch.full_like(expected, torch.nan), expected).startswith(f"{expected.numel()} of")


def test_loads_are_uneven_and_no_expert_is_chosen_twice() -> None:
    ids_TK = draw(replace(SHAPE, tokens=64), GATE_UP, "cpu", exact=True).ids_TK
    assert all(len(set(row)) == 2 for row in ids_TK.tolist())
    assert len(set(torch.bincount(ids_TK.flatten()).tolist())) > 1


# The search


def test_a_search_screens_and_repeats_the_good_ones(compiled: list[object]) -> None:
    """Every candidate is a trial, the heuristic's tile among them; the best of each are timed again in turns."""
    kept = Kept([])
    trials = search([SHAPE], how(), [], kept)
    assert trials == kept.trials
    for product in SHAPE.products:
        own = [one for one in trials if one.product == product]
        assert [one.status for one in own].count("TIMED") == 4
        assert {one.tile for one in own if one.status == "BEST"} == {one.tile for one in own if one.status == "TIMED"}
        assert sum(one.heuristic for one in own if one.status == "BEST") == 1
    assert not any(one.evidence for one in trials)


def test_a_search_goes_on_from_its_record(compiled: list[object]) -> None:
    """Trials that are known are neither compiled nor run again, and count with the new ones."""
    trials = search([SHAPE], how(), [], Kept([]))
    half = [one for one in trials if one.product == GATE_UP][:2]
    compiled.clear()
    kept = Kept([])
    again = search([SHAPE], how(), half, kept)
    assert [(one.product, one.tile, one.status) for one in again] == [
        (one.product, one.tile, one.status) for one in trials]
    assert not {(one.product, one.tile) for one in kept.trials if one.status == "TIMED"} & {
        (one.product, one.tile) for one in half}
    compiled.clear()
    kept = Kept([])
    assert search([SHAPE], how(), trials, kept) == trials
    assert (kept.trials, compiled) == ([], [])
    other = [replace(one, triton="2.0") for one in trials]
    assert search([SHAPE], how(), other, kept) == trials, "of another version everything is tried anew"


def test_what_the_gate_refuses_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spill would be a slow kernel, more shared memory than there is one that does not start."""
    bad = replace(GOOD, spill_bytes=8, shared_bytes=LIMIT + 1)
    monkeypatch.setattr(run_module, "compile_all", lambda combinations, lanes: [bad for _ in combinations])
    monkeypatch.setattr("moe_fast.tune.shapes.Operands.call", None)
    trials = search([SHAPE], how(2), [], Kept([]))
    assert {one.status for one in trials} == {"REFUSED"}
    assert "8 bytes spilled" in trials[0].reason
    assert "bytes of shared memory" in trials[0].reason


def test_wrong_and_crashed_tiles_are_trials_too(compiled: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x_TH: torch.Tensor, w13_EGIH: torch.Tensor, *_: object) -> torch.Tensor:
        return x_TH.new_zeros(16, 48)

    def crash(*_: object) -> torch.Tensor:
        raise RuntimeError("out of resources")
    monkeypatch.setattr("moe_fast.tune.shapes.gate_up", wrong)
    monkeypatch.setattr("moe_fast.tune.shapes.down", crash)
    trials = search([SHAPE], how(2), [], Kept([]))
    found = [(one.product.kernel, one.status) for one in trials]
    assert found == [("gate_up", "WRONG")] * 2 + [("down", "CRASHED")] * 2
    assert "out of resources" in trials[-1].reason


# The record and the table


def trial(product, tile: Tile, microseconds: float, **others: object) -> Trial:
    given = {"status": "BEST", "device": "GPU", "torch": "2", "triton": "3", "date": "2026-01-01", "evidence": True}
    return Trial(product, SHAPE.load.rows, tile, microseconds=microseconds, **(given | others))


def test_a_record_is_read_as_written_and_half_a_line_is_none(tmp_path: Path) -> None:
    path = tmp_path / "tune.jsonl"
    trials = [trial(GATE_UP, TILE, 3.0), trial(DOWN, TILE, 4.0, status="WRONG", reason="a few")]
    path.write_text("".join(one.line + "\n" for one in trials) + trials[0].line[:40])
    assert read_trials(path) == trials
    assert read_trials(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("text", ["[]", "{}", "x", trial(GATE_UP, TILE, 1.0, status="FINE").line,
                                  trial(GATE_UP, TILE, 1.0).line.replace('"block_n": 32', '"block_n": 33')])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tune.jsonl"
    path.write_text(trial(GATE_UP, TILE, 1.0).line + "\n" + text + "\n")
    with pytest.raises(UsageValueError, match=r"tune\.jsonl:2: "):
        read_trials(path)


def test_the_best_pair_has_one_block_of_rows() -> None:
    """gate_up alone would take 16 rows, down 64; together 32 are the fastest."""
    times = {GATE_UP: {16: 10.0, 32: 12.0, 64: 40.0}, DOWN: {16: 30.0, 32: 12.0, 64: 5.0}}
    trials = [trial(product, Tile(block_m, 32, 64), time, heuristic=block_m == 16)
              for product, blocks in times.items() for block_m, time in blocks.items()]
    first, second = best_entries([SHAPE], trials)
    assert (first.tile.block_m, second.tile.block_m) == (32, 32)
    assert (first.measured.microseconds, first.measured.heuristic_microseconds) == (12.0, 10.0)


def test_times_of_a_cpu_and_single_products_make_no_entry() -> None:
    both = [trial(product, TILE, 1.0) for product in SHAPE.products]
    assert len(best_entries([SHAPE], both)) == 2
    assert best_entries([SHAPE], [replace(one, evidence=False) for one in both]) == []
    assert best_entries([SHAPE], both[:1]) == []


def table(tmp_path: Path) -> Path:
    path = tmp_path / "sm_90.json"
    path.write_text(table_path("sm_90").read_text())
    return path


def test_entries_are_written_in_place_of_older_ones(tmp_path: Path) -> None:
    """The heuristic stays as it was, to the byte."""
    path = table(tmp_path)
    before, heuristic = path.read_text(), read_tiles(path).heuristic
    [*old] = best_entries([SHAPE], [trial(product, TILE, 9.0) for product in SHAPE.products])
    [*new] = best_entries([SHAPE], [trial(product, Tile(16, 64, 64), 3.0) for product in SHAPE.products])
    other = [replace(one, rows=640) for one in old]
    write_entries(path, [*old, *other])
    write_entries(path, new)
    found = read_tiles(path)
    assert found.heuristic == heuristic
    assert path.read_text().startswith(before.partition('"tuned"')[0])
    assert sorted(one.rows for one in found.tuned) == [16, 16, 640, 640]
    assert {one.tile.block_n for one in found.tuned if one.rows == 16} == {64}


def test_a_table_that_would_be_none_is_not_written(tmp_path: Path) -> None:
    path = table(tmp_path)
    before = path.read_text()
    [*entries] = best_entries([SHAPE], [trial(product, Tile(256, 32, 64), 9.0) for product in SHAPE.products])
    with pytest.raises(UsageValueError, match="block_m=256"):
        write_entries(path, entries)
    assert path.read_text() == before


# The command


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["tune", *arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.output


def test_on_a_cpu_a_few_tiles_run_and_no_table_is_written(compiled: list[object], tmp_path: Path) -> None:
    """It says so, keeps its trials, goes on from them past half a line, and never from those of a GPU."""
    record, path = tmp_path / "tune.jsonl", table(tmp_path)
    before, gpu = path.read_text(), trial(GATE_UP, TILE, 3.0).line
    record.write_text(gpu + "\n" + gpu[:50])
    code, text = run("--device", "cpu", "--record", str(record), "--table", str(path))
    assert code == 0
    assert text.splitlines()[-1].startswith("6 TIMED, 6 BEST on cpu; NO EVIDENCE")
    assert path.read_text() == before
    lines = record.read_text().splitlines()
    assert (lines[0], len(lines), {json.loads(line)["evidence"] for line in lines[1:]}) == (gpu, 13, {False})
    run("--device", "cpu", "--record", str(record), "--table", str(path))
    assert record.read_text().splitlines() == lines


def test_a_wrong_tile_fails_the_run(compiled: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moe_fast.tune.shapes.gate_up", lambda x_TH, *_: x_TH.new_zeros(16, 48))
    code, text = run("--device", "cpu", "--record", str(tmp_path / "tune.jsonl"))
    assert code == 1
    assert "WRONG" in text


def test_an_implementation_without_a_tuner_is_refused() -> None:
    with pytest.raises(UsageValueError, match=r"'moe_ref' has no moe_ref\.tune"):
        run("moe_ref", "--device", "cpu")
