"""What became of one tile of one product: a line of JSON, appended as it is known, so that a run that died goes on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_fast.tiles.tables import Measured, Product, product_of, tile_of
from moe_fast.tiles.tile import Tile
from moe_ref.contract.errors import UsageValueError

STATUSES = ("TIMED", "BEST", "REFUSED", "WRONG", "CRASHED")


@dataclass(frozen=True)
class Trial:
    """status: TIMED; BEST, timed again in turns with the other good ones and the heuristic's; REFUSED by the compile
    gate; WRONG, unlike torch; CRASHED.

    rows: routed rows. microseconds: the median, 0 where it was not timed. evidence: False of a CPU.
    """

    product: Product
    rows: int
    tile: Tile
    status: str
    device: str
    torch: str
    triton: str
    date: str
    evidence: bool
    heuristic: bool = False
    reason: str = ""
    microseconds: float = 0.0

    @property
    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    def measured(self, heuristic_microseconds: float) -> Measured:
        """For a table."""
        return Measured(self.device, self.torch, self.triton, self.date, self.microseconds, heuristic_microseconds)


def read_trials(path: Path) -> list[Trial]:
    """All complete lines of a record; [] where there is none. Raises UsageValueError with file and line."""
    trials = []
    for number, text in enumerate(path.read_text().split("\n")[:-1] if path.exists() else (), 1):
        try:
            trials.append(_trial(json.loads(text)))
        except (ValueError, TypeError, KeyError) as error:
            raise UsageValueError(f"{path}:{number}: {type(error).__name__}: {error}; is it a record of `moe-ref tune`?"
                                  ) from error
    return trials


def _trial(document: Mapping[str, object]) -> Trial:
    trial = Trial(**{**document, "product": product_of(document["product"]),  # pyrefly: ignore
                     "tile": tile_of(document["tile"])})
    if trial.status not in STATUSES:
        raise ValueError(f"status {trial.status!r}, but should be one of {', '.join(STATUSES)}")
    return trial
