"""What candidates start from: a case, its inputs, and what the subject rightly showed before the failing stage."""

from dataclasses import dataclass
from functools import cached_property

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.build import Inputs

OPERANDS = (Stage.PERMUTE_SCALES, Stage.PERMUTE_CODES, Stage.ACT_SCALES, Stage.ACT_CODES)
ORDER = tuple(stage for stage in Stage if not stage.is_gradient and stage not in OPERANDS)
"""Codes and scales of rows are no stages of these layers, which round nothing."""


@dataclass(frozen=True)
class Known:
    """What every candidate starts from: a case, its inputs, and what the subject rightly showed, see `placed`."""

    case: Case
    inputs: Inputs
    numerics: Numerics
    shares: tuple[RankShare, ...]
    given: dict[Stage, torch.Tensor]

    @cached_property
    def experts(self) -> list[ExpertWeights]:
        return [_doubled(self.inputs.weights.expert(e)) for e in range(self.case.problem.spec.num_experts)]

    @cached_property
    def shared(self) -> ExpertWeights | None:
        expert = self.inputs.weights.shared_expert()
        return None if expert is None else _doubled(expert)


def _doubled(expert: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(*(None if one is None else one.double() for one in expert))  # pyrefly: ignore
