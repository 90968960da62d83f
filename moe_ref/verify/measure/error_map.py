"""The map of a failing stage: its comparison is repeated, and watched block by block. Passing cases pay nothing."""

import math
from dataclasses import dataclass

import torch

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.case import Case
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import EXPERT_PARAMETERS, parameter_shapes
from moe_ref.inputs.build import Inputs
from moe_ref.records.error_map import BEYOND, MOST_BINS, PROFILE, WITHIN, ErrorMap, pack
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.measure.gradients import forward_part, measure_case
from moe_ref.verify.measure.placing import ROW_STAGES, RankTensors, over_all_tokens
from moe_ref.verify.measure.routing import measure_routing
from moe_ref.verify.measure.stage_meter import Place
from moe_ref.verify.measure.stages import measure

LARGEST_CASE = 2**33
"""Products of one projection of a case whose comparison is repeated: some ten seconds."""

MOST_CHARACTERS = 2800
"""Of the cells: a map of more is made coarser, so that a record stays small."""

MOST_ROW_RANKS = 32
_TILES = (16, 32, 64, 128)


@dataclass(frozen=True)
class RowAxis:
    """The rows of a stage in the order of its map, N of them.

    words: see ErrorMap.rows. number_R: where a routed row stands (rows of stages that have them), number_T: a token;
    of a parameter neither, its experts follow each other with `height` rows each. within_N: the row in what a kernel
    cuts into tiles; size_N: how many rows that has. experts: (row, expert) where the rows of one begin.
    """

    words: str
    within_N: torch.Tensor
    size_N: torch.Tensor
    experts: tuple[tuple[int, int], ...] = ()
    number_R: torch.Tensor | None = None
    number_T: torch.Tensor | None = None
    height: int = 0
    top_k: int = 1

    @classmethod
    def routed(cls, ids_TK: torch.Tensor) -> "RowAxis":
        """Routed rows by expert, token and slot."""
        order_R, experts, starts = _by_expert(ids_TK.flatten())
        sizes = torch.tensor([*starts[1:], len(order_R)]) - torch.tensor(starts)
        group_N = torch.repeat_interleave(torch.arange(len(starts)), sizes)
        within_N = torch.arange(len(order_R)) - torch.tensor(starts)[group_N]
        return cls("routed rows by expert, token, slot", within_N, sizes[group_N],
                   tuple(zip(starts, experts, strict=True)), number_R=order_R.argsort(), top_k=ids_TK.shape[1])

    @classmethod
    def tokens(cls, ids_TK: torch.Tensor) -> "RowAxis":
        """Tokens by the expert of their first slot."""
        order_T, experts, starts = _by_expert(ids_TK[:, 0])
        return cls("tokens by the expert of their first slot", order_T, torch.full_like(order_T, len(order_T)),
                   tuple(zip(starts, experts, strict=True)), number_T=order_T.argsort())

    @classmethod
    def parameter(cls, name: str, shape: tuple[int, ...]) -> "RowAxis":
        """All axes but the last of an unsharded parameter."""
        of_experts = name in EXPERT_PARAMETERS
        height = math.prod(shape[of_experts:-1])
        count = shape[0] if of_experts else 1
        return cls(f"rows of {name}", torch.arange(height).repeat(count), torch.full((count * height,), height),
                   tuple((e * height, e) for e in range(count)) if of_experts else (), height=height)

    def at(self, place: Place, count: int) -> torch.Tensor:
        """Where the rows of a block stand."""
        if place.token_R is None:
            return (place.expert or 0) * self.height + place.row + torch.arange(count)
        if place.slot_R is not None and self.number_R is not None:
            return self.number_R[place.token_R * self.top_k + place.slot_R]
        assert self.number_T is not None, "blocks of tokens are compared in maps of tokens"
        return self.number_T[place.token_R]


def _by_expert(ids_N: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
    """The order by expert, those that occur, and where each begins."""
    sorted_N, order_N = ids_N.sort(stable=True)
    experts, counts = sorted_N.unique_consecutive(return_counts=True)
    return order_N, experts.tolist(), (counts.cumsum(0) - counts).tolist()


class MapMeter:
    """Watches the ratios of one stage, R x C elements at a time, and keeps the largest of each bin."""

    def __init__(self, axis: RowAxis, num_columns: int, tp: int) -> None:
        self.axis, self.num_columns, self.tp = axis, num_columns, tp
        self.row_step, self.column_step = _step(len(axis.within_N)), _step(num_columns)
        self.cells = torch.full((-(-len(axis.within_N) // self.row_step), -(-num_columns // self.column_step)), -1.0,
                                dtype=torch.float64)
        self.largest_N = torch.full((len(axis.within_N),), -1.0, dtype=torch.float64)
        self.rank_N = torch.full((len(axis.within_N),), -1)
        self.shards: dict[int, int] = {}

    def __call__(self, ratio: torch.Tensor, place: Place) -> None:
        row_R = self.axis.at(place, len(ratio))
        bin_C = (place.column + torch.arange(ratio.shape[1])) // self.column_step
        ratio = torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf)
        binned = ratio.new_full((len(ratio), self.cells.shape[1]), -1.0)
        binned.scatter_reduce_(1, bin_C.expand_as(ratio), ratio, "amax")
        self.cells.scatter_reduce_(0, (row_R // self.row_step)[:, None].expand_as(binned), binned, "amax")
        self.largest_N[row_R] = torch.maximum(self.largest_N[row_R], ratio.amax(1))
        self.rank_N[row_R] = torch.where(self.rank_N[row_R] < 0, place.rank, self.rank_N[row_R])
        self.shards.setdefault(place.column, place.rank % self.tp)

    def result(self) -> ErrorMap:
        """The map; where it would take too many characters, in larger bins."""
        cells, row_step, column_step = self.cells, self.row_step, self.column_step
        while len(text := pack(levels(cells))) > MOST_CHARACTERS:
            if cells.shape[0] > cells.shape[1]:
                cells, row_step = _pairs(cells), 2 * row_step
            else:
                cells, column_step = _pairs(cells.T).T, 2 * column_step
        within = torch.full((PROFILE,), -1.0, dtype=torch.float64)
        within.scatter_reduce_(0, self.axis.within_N % PROFILE, self.largest_N, "amax")
        first = dict[int, tuple[int, int]]()
        for start, expert in self.axis.experts:
            first.setdefault(start // row_step, (start, expert))
        return ErrorMap(rows=self.axis.words, num_rows=len(self.largest_N), num_columns=self.num_columns,
                        row_step=row_step, column_step=column_step, cells=text, experts=list(first.values()),
                        ranks=sorted(self.shards.items()) if len(self.shards) > 1 else [], row_ranks=self._row_ranks(),
                        profile=pack(levels(within)), tails=self._tails())

    def _row_ranks(self) -> list[tuple[int, int]]:
        starts = [0, *(1 + (self.rank_N.diff() != 0).nonzero().flatten()).tolist()]
        changes = [(start, int(self.rank_N[start])) for start in starts if self.rank_N[start] >= 0]
        return changes if 1 < len(changes) <= MOST_ROW_RANKS else []

    def _tails(self) -> list[int]:
        compared_N = self.largest_N >= 0
        bad_N, found = self.largest_N[compared_N] > 1, []
        for tile in _TILES:
            last_N = (self.axis.within_N >= self.axis.size_N // tile * tile)[compared_N]
            if bool(last_N.any()) and not bool(last_N.all()) and torch.equal(bad_N, last_N):
                found.append(tile)
        return found


def levels(ratios: torch.Tensor) -> bytes:
    """One byte for each ratio, see ErrorMap; -1: nothing was compared."""
    known = (torch.log2(ratios.clamp(2.0**-WITHIN, 2.0**BEYOND)).ceil() + WITHIN).clamp(1, BEYOND - 1)
    known = torch.where(ratios == math.inf, BEYOND, known)
    return bytes(torch.where(ratios < 0, 0, known).to(torch.uint8).flatten().tolist())


def _step(size: int) -> int:
    """The power of two that makes at most MOST_BINS bins."""
    return 2 ** max(0, math.ceil(math.log2(max(1, size) / MOST_BINS)))


def _pairs(cells: torch.Tensor) -> torch.Tensor:
    """The larger of each two rows; the last one may be alone."""
    if len(cells) % 2:
        cells = torch.cat([cells, cells[-1:]])
    return torch.maximum(cells[::2], cells[1::2])


def mappable(case: Case) -> bool:
    """Whether the comparison of a case is repeated for a map."""
    spec = case.problem.spec
    return case.problem.num_tokens * spec.top_k * spec.hidden_size * spec.intermediate_size <= LARGEST_CASE


def measure_map(case: Case, inputs: Inputs, ranks: list[RankTensors], capabilities: Capabilities,
                model: RoundingModel, stage: Stage) -> ErrorMap | None:
    """The map of one stage as `measure_case` compares it; None where it compares no elements of it."""
    if case.problem.num_tokens == 0:
        return None
    axis, num_columns = _axes(stage, case, _ids(case, inputs, ranks, capabilities, model))
    meter = MapMeter(axis, num_columns, case.parallel.tp)
    if stage.is_gradient:
        measure_case(case, inputs, ranks, capabilities, model, watched={stage: meter})
    else:
        measure(case, inputs, forward_part(ranks), capabilities, model, watched={stage: meter})
    return meter.result() if bool((meter.largest_N >= 0).any()) else None


def _ids(case: Case, inputs: Inputs, ranks: list[RankTensors], capabilities: Capabilities,
         model: RoundingModel) -> torch.Tensor:
    """The choice of experts that the comparison follows, (T, K)."""
    shares, numerics = rank_shares(case), capabilities.contract(case.problem)
    expanded = over_all_tokens(ranks, shares, case.problem.num_tokens)
    return measure_routing(inputs, expanded, [share.tokens for share in shares], numerics, capabilities, model,
                           math.inf).followed.ids_TK


def _axes(stage: Stage, case: Case, ids_TK: torch.Tensor) -> tuple[RowAxis, int]:
    """The rows of a stage and the number of its columns."""
    spec = case.problem.spec
    for name, shape in parameter_shapes(spec).items():
        if stage == f"grad_{name.rpartition('_')[0]}":
            return RowAxis.parameter(name, shape), shape[-1]
    widths = {Stage.LOGITS: spec.num_choices, Stage.GRAD_LOGITS: spec.num_choices, Stage.WEIGHTS: spec.top_k,
              Stage.GATE_UP: spec.experts.num_projections * spec.intermediate_size, Stage.ACT: spec.intermediate_size}
    axis = RowAxis.routed(ids_TK) if stage in ROW_STAGES else RowAxis.tokens(ids_TK)
    return axis, widths.get(stage, spec.hidden_size)
