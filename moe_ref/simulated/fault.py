"""A step of a layer that something else may stand in for; as it is, no fault at all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.numerics.formats import round_to
from moe_ref.simulated.reduction import Reduction

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""a (M, K) @ b (K, N) in fp64 of format numbers, with the errors of the machine that it stands for."""


@dataclass(frozen=True)
class Product:
    """Which product of an expert: gate_up or down, and the tp rank of its columns (gate_up: all ranks at once)."""

    stage: Literal[Stage.GATE_UP, Stage.DOWN]
    expert: int
    rank: int = 0


@dataclass(frozen=True)
class Fault:
    """No fault: every step as the contract has it; a subclass replaces one.

    name: as a record or a table names it. stage: the first one that is not right when all are shown. Ids and weights
    are shown as they should be: a fault sits behind them, in what computes.
    """

    name: ClassVar[str] = "right"
    stage: ClassVar[Stage | None] = None

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        """Whether it is a fault of this case and contract, if its expert has tokens: else nothing differs, or no more
        than right layers do."""
        return self.stage is not None

    def served(self, ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
        """The experts that rows are computed with."""
        return ids_TK

    def weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """The routing weights that rows are multiplied with."""
        return weights_TK

    def product(self, matmul: Matmul, a_RK: torch.Tensor, b_KN: torch.Tensor, of: Product) -> torch.Tensor:
        """One product of an expert."""
        return matmul(a_RK, b_KN)

    def factor(self, factor_RI: torch.Tensor, stored: Format) -> torch.Tensor:
        """activation(gate) before it meets up; `stored` is the format of act."""
        return factor_RI

    def fed(self, act_RI: torch.Tensor, stored_RI: torch.Tensor) -> torch.Tensor:
        """What the down product takes, given the activation before and after its store."""
        return stored_RI

    def row(self, row_RH: torch.Tensor, stored: Format) -> torch.Tensor:
        """The down product before it is weighted; `stored` is the format of down."""
        return row_RH

    def store(self, value: torch.Tensor, stored: Format, stage: Stage) -> torch.Tensor:
        """The store of a stage."""
        return round_to(value, stored)

    def reduction(self, reduction: Reduction) -> Reduction | None:
        """How ranks add up; None: each keeps its own part."""
        return reduction

    def output(self, y_TH: torch.Tensor) -> torch.Tensor:
        """The result of the layer."""
        return y_TH
