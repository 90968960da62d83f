"""Candidates compiled, checked and timed, one product of one shape at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

import torch
import triton

from moe_fast.architecture import architecture, assuming
from moe_fast.compile.combinations import Combination, combination_of
from moe_fast.compile.lanes import compile_all
from moe_fast.compile.products import TORCH_DTYPES, record_product
from moe_fast.compile.resources import Resources, faults
from moe_fast.compile.targets import ARCHITECTURES
from moe_fast.tiles.choose import gemm_tile
from moe_fast.tiles.tables import Product
from moe_fast.tiles.tile import Tile
from moe_fast.tune.shapes import Operands, Shape, draw, fault
from moe_fast.tune.space import candidates
from moe_fast.tune.trial import Trial
from moe_ref.contract.errors import UsageValueError

Clock = Callable[[Mapping[Tile, Callable[[], object]]], Mapping[Tile, float]]
"""Median microseconds of calls that take turns, each with a cold cache."""
FINALISTS = 8
NO_KERNEL = ""
"""That no entry is tuned for."""


def gpu_architecture() -> str:
    """Of the current GPU; UsageValueError where it is none that tiles can be compiled for."""
    found = architecture(torch.device("cuda"))
    if found not in ARCHITECTURES:
        raise UsageValueError(f"tune: a GPU of {found}, but should be one of {', '.join(ARCHITECTURES)}")
    return found


class Progress(Protocol):
    """Told what is being done, and each trial as it is known: whoever keeps them writes them at once."""

    def doing(self, words: str, total: int) -> None: ...

    def done(self, trial: Trial) -> None: ...


@dataclass(frozen=True)
class Search:
    """Where and how: architecture to compile for, device to run on, lanes of compilers; most: tiles of one product."""

    architecture: str
    device: str
    clock: Clock
    lanes: int = 2
    most: int | None = None

    @property
    def evidence(self) -> bool:
        """Times of a CPU say nothing."""
        return self.device != "cpu"


def search(shapes: Iterable[Shape], how: Search, known: Sequence[Trial], progress: Progress) -> list[Trial]:
    """Every trial of these shapes; those `known` of this device and these versions are not run again.

    A tile is compiled once for all shapes that it is the same kernel for.
    """
    found, compiled = [], dict[str, Resources]()
    for shape in shapes:
        for product in shape.products:
            found += _Run(shape, product, how, known, progress, compiled).trials()
    return found


class _Run:
    """One product of one shape."""

    def __init__(self, shape: Shape, product: Product, how: Search, known: Sequence[Trial], progress: Progress,
                 compiled: dict[str, Resources]) -> None:
        self._shape, self._product, self._how, self._progress = shape, product, how, progress
        self._compiled = compiled
        here = (product, shape.load.rows, self._device, torch.__version__, triton.__version__)
        self._known = [one for one in known if (one.product, one.rows, one.device, one.torch, one.triton) == here]

    def trials(self) -> list[Trial]:
        """Screening, then the good ones side by side."""
        done = {one.tile: one for one in self._known if one.status != "BEST"}
        todo = [tile for tile in self._tiles() if tile not in done]
        name = f"{self._product.kernel} {self._product.out_features} x {self._product.in_features}"
        self._progress.doing(f"{name}, {self._shape.load.rows} rows", len(todo))
        finals = [one for one in self._known if one.status == "BEST"]
        if finals and not todo:
            return [*done.values(), *finals]
        refused = self._refused(todo)
        exact, normal = (draw(self._shape, self._product, self._how.device, exact=exact) for exact in (True, False))
        expected = exact.expected()
        for tile in todo:
            done[tile] = self._screened(tile, refused.get(tile, ""), exact, expected, normal)
            self._progress.done(done[tile])
            if done[tile].status == "CRASHED" and self._how.device == "cuda":
                # A fault in memory leaves a context in which nothing runs any more: the run ends, the next goes on.
                torch.cuda.synchronize()
        return [*done.values(), *self._finals(done, normal)]

    def _tiles(self) -> list[Tile]:
        """The heuristic's for every block_m, then the others."""
        blocks = sorted({tile.block_m for tile in self._space()})
        own = [self._heuristic(), *(self._heuristic(block_m) for block_m in blocks)]
        return list(dict.fromkeys([*own, *self._space()]))[:self._how.most]

    def _space(self) -> list[Tile]:
        return candidates(self._product, self._shape.load, ARCHITECTURES[self._how.architecture].shared_memory)

    def _heuristic(self, block_m: int | None = None) -> Tile:
        """What a layer would take without tuned entries."""
        with assuming(self._how.architecture):
            first = self._gemm_tile(self._shape.products[0], block_m)
            return first if self._product.kernel == "gate_up" else self._gemm_tile(self._product, first.block_m)

    def _gemm_tile(self, product: Product, block_m: int | None) -> Tile:
        return gemm_tile(torch.device("meta"), TORCH_DTYPES[product.dtype], self._shape.load, product.out_features,
                         product.in_features, product.accumulators, kernel=NO_KERNEL, block_m=block_m)

    def _refused(self, tiles: Sequence[Tile]) -> dict[Tile, str]:
        """What the compile gate says of each that it refuses."""
        by_tile = {tile: self._combination(tile) for tile in tiles}
        todo = {one.key: one for one in by_tile.values() if one.key not in self._compiled}
        self._compiled.update(zip(todo, compile_all(list(todo.values()), self._how.lanes), strict=True))
        return {tile: "; ".join(reasons) for tile, one in by_tile.items()
                if (reasons := faults(one, self._compiled[one.key]))}

    def _combination(self, tile: Tile) -> Combination:
        launch = record_product(self._product, self._shape.load.rows, self._shape.top_k, tile, self._how.architecture)
        return combination_of(launch, self._how.architecture)

    def _screened(self, tile: Tile, refused: str, exact: Operands, expected: torch.Tensor, normal: Operands) -> Trial:
        if refused:
            return self._trial(tile, "REFUSED", refused)
        try:
            if reason := fault(exact, exact.call(tile)(), expected):
                return self._trial(tile, "WRONG", reason)
            return replace(self._trial(tile, "TIMED"), microseconds=self._how.clock({tile: normal.call(tile)})[tile])
        except (RuntimeError, triton.TritonError) as error:
            return self._trial(tile, "CRASHED", f"{type(error).__name__}: {error}"[:300])

    def _finals(self, done: Mapping[Tile, Trial], normal: Operands) -> list[Trial]:
        """The fastest of every block_m and the heuristic's tile, timed in turns."""
        timed = sorted((one for one in done.values() if one.status == "TIMED"), key=lambda one: one.microseconds)
        chosen = dict.fromkeys([self._heuristic()] if self._heuristic() in {one.tile for one in timed} else [])
        for block_m in {one.tile.block_m for one in timed}:
            chosen |= dict.fromkeys([one.tile for one in timed if one.tile.block_m == block_m][:FINALISTS])
        medians = self._how.clock({tile: normal.call(tile) for tile in chosen}) if chosen else {}
        trials = [replace(self._trial(tile, "BEST"), microseconds=medians[tile]) for tile in medians]
        for one in trials:
            self._progress.done(one)
        return trials

    def _trial(self, tile: Tile, status: str, reason: str = "") -> Trial:
        return Trial(self._product, self._shape.load.rows, tile, status, self._device, torch.__version__,
                     triton.__version__, datetime.now(UTC).date().isoformat(), self._how.evidence,
                     tile == self._heuristic(), reason)

    @property
    def _device(self) -> str:
        return torch.cuda.get_device_name() if self._how.device == "cuda" else self._how.device
