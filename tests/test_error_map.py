"""Protects the map of a failure: an error shows in the cell where it is, with the borders of experts and ranks.

Maps are recorded at the first failing stage alone, stay small, and a report draws what it can trust and nothing else.
"""

import math
from typing import Any

import msgspec
import pytest
import torch

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.records.error_map import BEYOND, MOST_BINS, PROFILE, WITHIN, ErrorMap, pack, unpack
from moe_ref.records.schema import CaseLine
from moe_ref.report.error_map import draw_map, palette
from moe_ref.report.evidence import Evidence
from moe_ref.report.failure_groups import failure_groups
from moe_ref.report.sections.failures import failure_section
from moe_ref.report.sections.places import anchors
from moe_ref.report.sections.view import View
from moe_ref.verify.measure.error_map import MOST_CHARACTERS, MapMeter, RowAxis, levels, mappable
from moe_ref.verify.measure.stage_meter import Place
from tests import made_records as made
from tests.in_process import judged
from tests.subjects import oracle_gradients, wrong
from tests.subjects.base import Call, TorchMoE
from tests.subjects.parallel import ParallelMoE

PLAIN = "v1-T33.H96.I160.E8.K2-bf16-norm"
SIZES = [6, 10, 4, 10, 11, 14, 8, 3]
"""Routed rows of its experts."""


class Planted(TorchMoE):
    """One wrong element: the third row of expert 5, column 70 of the down product."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().down(call, act_RI, w2_HI, expert).clone()
        if expert == 5:
            rows[2, 70] += 1.0
        return rows


class LastRowsWrong(TorchMoE):
    """Rows of the last, partial tile of 16 of every expert, in one tile of columns."""

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().down(call, act_RI, w2_HI, expert).clone()
        rows[len(rows) // 16 * 16:, 64:128] *= 1.5
        return rows


class HalvedParts(ParallelMoE):
    """Every row of the down product at half its size, under every form of parallelism."""

    def weighted(self, call: Call, down_RH: torch.Tensor, weight_R1: torch.Tensor) -> torch.Tensor:
        return super().weighted(call, down_RH, weight_R1) / 2


def mapped(line: CaseLine) -> ErrorMap:
    """The map of a line, which is at its first failing stage and nowhere else."""
    assert line.verdict == Verdict.MISMATCH, line.message
    [stage] = [stage for stage in line.stages if stage.error_map is not None]
    assert stage.stage == line.first_stage
    assert stage.error_map is not None
    assert len(msgspec.json.encode(stage.error_map)) < 4096
    return stage.error_map


def bad_cells(found: ErrorMap) -> list[tuple[int, int]]:
    """Bins above the bound."""
    return [(row, column) for row, cells in enumerate(found.levels()) for column, level in enumerate(cells)
            if level > WITHIN]


def test_a_planted_error_shows_in_its_cell_alone() -> None:
    line = judged(Planted(), PLAIN, runs=1)
    found = mapped(line)
    row = sum(SIZES[:5]) + 2
    assert (found.num_rows, found.num_columns, found.row_step, found.column_step) == (66, 96, 1, 2)
    assert bad_cells(found) == [(row, 70 // 2)]
    stage = next(stage for stage in line.stages if stage.stage == Stage.DOWN)
    assert found.levels()[row][35] == math.ceil(math.log2(float(stage.ratio))) + WITHIN
    assert min(map(min, found.levels())) > 0, "every other element was compared, too"
    drawn = draw_map(stage)
    assert drawn.words.startswith("down: rows of expert 5, columns 70-71, 1 of 66 rows above the bound; largest ")
    assert drawn.profile == "", "no expert has as many rows as a tile"


def test_a_pass_has_no_map() -> None:
    line = judged(TorchMoE(), PLAIN, runs=1)
    assert line.verdict == Verdict.PASS
    assert all(stage.error_map is None for stage in line.stages)


def test_rows_are_sorted_by_expert() -> None:
    """A whole expert is a band between two borders, and borders say whose rows follow."""
    found = mapped(judged(wrong.last_block_of_k_dropped, PLAIN, runs=1))
    assert found.experts == [(sum(SIZES[:e]), e) for e in range(8)]
    band = range(sum(SIZES[:3]), sum(SIZES[:4]))
    assert {row for row, _ in bad_cells(found)} == set(band)


def test_shards_of_ranks_have_borders() -> None:
    """Columns that a tp rank begins with; rows from which another ep rank serves."""
    found = mapped(judged(wrong.gate_up_swapped, f"{PLAIN}-tp2", runs=1))
    assert (found.ranks, found.row_ranks) == ([(0, 0), (80, 1)], [])
    found = mapped(judged(HalvedParts(), f"{PLAIN}-tp2-ep2", runs=1))
    assert found.row_ranks == [(0, 0), (sum(SIZES[:4]), 2)]
    assert found.ranks == [], "every tp rank has a part of all columns"


def test_tokens_are_sorted_by_their_first_expert() -> None:
    found = mapped(judged(wrong.residual_per_rank, f"{PLAIN}-res-tp4", runs=1))
    assert (found.rows, found.num_rows) == ("tokens by the expert of their first slot", 33)
    assert [expert for _, expert in found.experts] == list(range(8))


def test_rows_of_a_gradient_are_those_of_its_parameter() -> None:
    """Experts without a token, whose gradients are not zero; each has H rows of its own."""
    found = mapped(judged(oracle_gradients.EmptyExpertsNotZero(),
                          "v1-T12.H40.I36.E6.K3-bf16-norm-empty-tp2-bwd", runs=1))
    assert (found.rows, found.num_rows, found.num_columns) == ("rows of w2_EHI", 6 * 40, 36)
    assert found.experts == [(40 * e, e) for e in range(6)]
    assert found.row_step == 4
    assert {4 * row // 40 for row, _ in bad_cells(found)} == {3, 5}


def test_a_tail_of_rows_is_named() -> None:
    """What a kernel without a mask does to its last tile: all rows of it, and no others."""
    line = judged(LastRowsWrong(), "v1-T140.H192.I64.E8.K2-bf16-norm", runs=1)
    found = mapped(line)
    assert 16 in found.tails
    drawn = draw_map(next(stage for stage in line.stages if stage.error_map))
    assert drawn.tail.startswith("exactly the rows of last, partial tiles of 16")
    assert drawn.profile.startswith("<svg")
    assert ", columns 64-127, " in drawn.words
    assert mapped(judged(Planted(), PLAIN, runs=1)).tails == []


class TailOfK(TorchMoE):
    """The loop over K of the down product ends early, in some columns of some experts."""

    end, columns, experts = 0, slice(None), range(8)

    def down(self, call: Call, act_RI: torch.Tensor, w2_HI: torch.Tensor, expert: int) -> torch.Tensor:
        rows = super().down(call, act_RI, w2_HI, expert).clone()
        if expert in self.experts:
            cut = super().down(call, act_RI[:, :self.end], w2_HI[:, :self.end], expert)
            rows[:, self.columns] = cut[:, self.columns]
        return rows


class TailOfOneTile(TailOfK):
    end, columns = 128, slice(64, 128)


class TailOfOneTileOfAnExpert(TailOfK):
    end, columns, experts = 128, slice(32, 64), range(5, 6)


class LimitOfK(TailOfK):
    end = 512


@pytest.mark.parametrize(("subject", "case_id", "words"), [
    (TailOfOneTile(), PLAIN, "last 32 columns of K left out of the down product, in columns 64 to 95"),
    (TailOfOneTileOfAnExpert(), PLAIN,
     "last 32 columns of K left out of the down product, in expert 5, in columns 32 to 63"),
    (LimitOfK(), "v1-T24.H64.I700.E8.K2-bf16-norm", "last 188 columns of K left out of the down product")])
def test_a_dropped_k_tail_is_named_in_words(subject: TailOfK, case_id: str, words: str) -> None:
    """A map alone does not say that a loop over K ended too early in what is orange there; the message does."""
    line = judged(subject, case_id, runs=1)
    assert f"  likely  {words} explains" in line.message, line.message


def test_the_bound_is_a_hard_edge() -> None:
    """A ratio of 1 passes, the next number does not; nothing compared is no level at all."""
    ratios = torch.tensor([-1.0, 0.0, 1e-300, 0.5, 1.0, 1.0 + 2**-52, 2.0, 1e300, math.inf], dtype=torch.float64)
    assert list(levels(ratios)) == [0, 1, 1, WITHIN - 1, WITHIN, WITHIN + 1, WITHIN + 1, BEYOND - 1, BEYOND]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (96, 96), (97, 3), (300, 7168), (5000, 200), (3, 100_000)])
def test_any_map_fits_a_record(rows: int, columns: int) -> None:
    """Noise from 2^-15 to 2^60 of the bound is what packs worst; the largest survives in its place."""
    generator = torch.Generator().manual_seed(7)
    ids_TK = torch.randint(0, 256, (rows, 1), generator=generator)
    meter = MapMeter(RowAxis.routed(ids_TK), columns, 8)
    ratio = torch.exp2(75 * torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 15)
    ratio[-1, -1] = math.inf
    width = max(1, columns // 8)
    for rank in range(-(-columns // width)):
        meter(ratio[:, rank * width:][:, :width], Place(rank, torch.arange(rows), torch.zeros(rows).long(), None,
                                                        rank * width))
    found = meter.result()
    assert len(found.cells) <= MOST_CHARACTERS
    assert len(msgspec.json.encode(found)) < 4096
    assert max(found.num_bins) <= MOST_BINS
    last = int(ids_TK.flatten().sort(stable=True).indices.argsort()[-1])
    assert found.levels()[last // found.row_step][-1] == BEYOND


def test_a_nan_is_beyond_every_bound() -> None:
    meter = MapMeter(RowAxis.tokens(torch.zeros(1, 1, dtype=torch.int64)), 1, 1)
    meter(torch.tensor([[math.nan]], dtype=torch.float64), Place(0, torch.tensor([0])))
    assert meter.result().levels() == [bytes([BEYOND])]


def test_comparisons_of_minutes_are_not_repeated() -> None:
    assert mappable(parse_case(PLAIN))
    assert not mappable(parse_case("v1-T4096.H4096.I2048.E8.K2-bf16"))


GOOD: dict[str, Any] = {"rows": "r", "num_rows": 2, "num_columns": 2, "row_step": 1, "column_step": 1,
                        "cells": pack(bytes([1, 2, 3, 20])), "experts": [(0, 4)], "profile": pack(bytes(PROFILE))}
HOSTILE = [{"cells": ""}, {"cells": "no base64!"}, {"cells": "AAAA"}, {"cells": pack(bytes(3))},
           {"cells": pack(bytes(5))}, {"cells": pack(bytes(2**20))}, {"cells": GOOD["cells"][:-8]}, {"row_step": 0},
           {"row_step": -1}, {"num_rows": 0}, {"num_rows": -2}, {"num_rows": 97}, {"num_columns": 2**62},
           {"column_step": 2**60}, {"experts": [(5, 1)]}, {"experts": [(-1, 1)]}, {"ranks": [(2, 0)]},
           {"row_ranks": [(7, 0)]}, {"experts": [(0, 1)] * 10_000}, {"profile": pack(bytes(65))}, {"profile": "<b>"}]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: str(change)[:40])
def test_a_map_that_is_none_becomes_a_sentence(change: dict[str, Any]) -> None:
    """Whatever a record claims: no exception, no picture, and the rest of the failure stays."""
    html = section_of(ErrorMap(**GOOD | change))
    assert "No error map of down: " in html
    assert "data:image/png" not in html
    assert "41x over bound" in html


def test_words_of_a_record_are_escaped() -> None:
    html = section_of(ErrorMap(**GOOD | {"rows": "<script>alert(1)</script>"}))
    assert "data:image/png" in html
    assert "<script" not in html


def test_a_small_text_that_unpacks_to_much_is_not_unpacked() -> None:
    """A kilobyte of zlib can hold a megabyte."""
    with pytest.raises(ValueError, match="more than 4 levels, but should be 4"):
        unpack(pack(bytes(2**20)), 4)


def test_the_drawing_has_borders_labels_and_words() -> None:
    """All that the picture says is also there without colours."""
    found = ErrorMap(**GOOD | {"num_columns": 128, "column_step": 64, "ranks": [(0, 0), (64, 1)],
                               "experts": [(0, 4), (1, 9)]})
    html = section_of(found)
    for words in (">expert 4<", ">expert 9<", ">tp rank 1<", "thin lines: tiles of 64", 'role="img"'):
        assert words in html
    assert 'aria-label="down: rows of expert 5, columns 64-127, 1 of 2 rows above the bound; largest 41x' in html


def test_colours_part_at_the_bound() -> None:
    """Blue below, more than red above; see-through below, so that both themes can lie behind it."""
    colours = palette()
    assert len(colours) == 256
    assert all(blue > red and opacity < 255 for red, _, blue, opacity in colours[1:WITHIN + 1])
    assert all(red > blue and opacity == 255 for red, _, blue, opacity in colours[WITHIN + 1:])


def section_of(found: ErrorMap) -> str:
    """The section of failures of a run with one that has this map."""
    line = made.failing(made.PLAIN)
    stages = [msgspec.structs.replace(stage, error_map=found) if stage.stage == "down" else stage
              for stage in line.stages]
    line = msgspec.structs.replace(line, stages=stages)
    line = msgspec.json.decode(msgspec.json.encode(line), type=CaseLine)
    groups = failure_groups((line,), frozenset())
    return str(failure_section(View(Evidence(made.make_run(line)), (line,), anchors((line,), groups), None, groups)))
