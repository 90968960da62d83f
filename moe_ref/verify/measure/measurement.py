"""What a comparison comes down to: plain numbers. The judge sees nothing else. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_ref.contract.vocabulary import Stage
from moe_ref.records.schema import StageResult


@dataclass(frozen=True)
class Mutant:
    """By what factor a mistake would exceed what is allowed, and the stage or statistic that would see it."""

    factor: float
    where: str


@dataclass(frozen=True)
class Measurement:
    """All stages of one case, faults of structure in words, and the power of the case.

    power: by what factor an all-zero result would miss its bound, where it misses it most. A subject that
    shows its stages is caught at whichever stage turns to zero first, so the weakest of them counts; one
    that shows only its output is caught there. unjudged_tokens: their choice of experts is hidden and ambiguous.
    differing_ranks: whose output, or what differing_stage names, is not bit for bit that of the first rank that should
    hold the same. rows_moved: per rank the routed slots of its tp group, and those that its ep rank serves.
    mutants: other mistakes than zeros that this case could have and should see; see power.py. signal: root mean square
    of the output over that of what its elements may be off.
    """

    stages: tuple[StageResult, ...]
    struct_faults: tuple[str, ...] = ()
    power: float = math.inf
    mutants: Mapping[str, Mutant] = field(default_factory=dict)
    signal: float = math.inf
    unjudged_tokens: int = 0
    differing_ranks: tuple[int, ...] = ()
    differing_stage: Stage = Stage.REDUCED
    rows_moved: tuple[tuple[int, int], ...] = ()
