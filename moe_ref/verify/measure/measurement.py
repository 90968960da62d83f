"""What a comparison comes down to: plain numbers. The judge sees nothing else. Imports no torch."""

import math
from dataclasses import dataclass

from moe_ref.records.schema import StageResult


@dataclass(frozen=True)
class Measurement:
    """All stages of one case, faults of structure in words, and the power of the case.

    power: by what factor an all-zero result would miss its bound, where it misses it most. A subject that
    shows its stages is caught at whichever stage turns to zero first, so the weakest of them counts; one
    that shows only its output is caught there. unjudged_tokens: their choice of experts is hidden and ambiguous.
    differing_ranks: whose output is not bit for bit that of rank 0.
    """

    stages: tuple[StageResult, ...]
    struct_faults: tuple[str, ...] = ()
    power: float = math.inf
    unjudged_tokens: int = 0
    differing_ranks: tuple[int, ...] = ()
