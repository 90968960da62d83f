"""What is said of gradients besides their numbers: their shapes, the ranks that hold the same, the power of a case."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.placements import part_range, placements
from moe_ref.contract.shares import RankShare, rank_shares
from moe_ref.contract.vocabulary import Stage, gradient_stage
from moe_ref.contract.weights import parameter_shapes
from moe_ref.inputs.build import Inputs
from moe_ref.verify.measure.measurement import Measurement
from moe_ref.verify.measure.placing import RankTensors
from moe_ref.verify.measure.stage_meter import StageMeter
from moe_ref.verify.measure.stages import bits

_DECISIVE = (Stage.GRAD_W2, Stage.GRAD_W13, Stage.GRAD_X)
"""Gradients that no layer lacks. Others may vanish: of a router with one slot and renormalised weights, of a bias."""


def gradient_shapes(case: Case, inputs: Inputs, share: RankShare) -> dict[str, tuple[int, ...]]:
    """Names of everything a rank is handed that has a gradient, with the shapes of its part."""
    start, stop = share.tokens
    given = {"x_TH": inputs.x_TH, "logits_TE": inputs.logits_TE, "residual_TH": inputs.residual_TH}
    shapes = {name: (stop - start, *tensor.shape[1:]) for name, tensor in given.items() if tensor is not None}
    parameters = parameter_shapes(case.problem.spec, case.parallel, share.rank)
    return shapes | {name: shape for name, shape in parameters.items() if name != "selection_bias_E"}


def gradient_faults(case: Case, inputs: Inputs, ranks: list[RankTensors]) -> list[str]:
    """One line per gradient that is missing or has another shape than its tensor."""
    faults = []
    for share, tensors in zip(rank_shares(case), ranks, strict=True):
        for name, shape in gradient_shapes(case, inputs, share).items():
            got = tensors.get(gradient_stage(name))
            found = "missing" if got is None else f"shape {tuple(got.shape)}"
            if got is None or tuple(got.shape) != shape:
                faults.append(f"{gradient_stage(name)}: {found}, but should be {shape} [rank {share.rank}]")
    return faults


def differing(found: Measurement, case: Case, ranks: list[RankTensors]) -> Measurement:
    """The measurement with the first gradient that is not the same on ranks that hold the same, and those ranks."""
    for stage in (stage for stage in Stage if stage.is_gradient and stage in ranks[0]):
        first, others = dict[object, torch.Tensor](), []
        for share, tensors in zip(rank_shares(case), ranks, strict=True):
            mine = bits(tensors[stage])
            if not torch.equal(first.setdefault(_held(stage, case, share), mine), mine):
                others.append(share.rank)
        if others:
            return replace(found, differing_ranks=tuple(others), differing_stage=stage)
    return found


def _held(stage: Stage, case: Case, share: RankShare) -> object:
    """What a rank has this gradient of; ranks with the same should have the same gradient."""
    held = placements(case.parallel)
    name = next((name for name in held if stage == f"grad_{name.rpartition('_')[0]}"), None)
    if name is None:
        return share.tokens
    placement = held[name]
    columns = None
    if placement.shard_dim is not None:
        size = parameter_shapes(case.problem.spec)[name][placement.shard_dim]
        columns = part_range(name, size, case.parallel, share.rank)
    return columns, None if placement.expert_dim is None else share.ep_rank


def power(meters: Mapping[Stage, StageMeter]) -> float:
    """By what factor gradients of zero would miss their bounds, at the weakest of those that every layer has.

    Others that zeros would pass say so in a note.
    """
    for stage, meter in meters.items():
        if stage not in _DECISIVE and meter.want_want and meter.power < 1:
            meter.notes.append(f"a gradient of zero would pass, at {meter.power:.2g} times the bound")
    judged = [meters[stage] for stage in _DECISIVE if stage in meters]
    # Without a token every gradient is 0, and nothing but 0 passes.
    return min(meter.power for meter in judged) if judged and judged[-1].num_checked else math.inf
