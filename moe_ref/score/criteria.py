"""Would other projects' tests accept a layer: their numbers on data of their scale; for comparison, no verdict."""

from dataclasses import replace
from types import ModuleType

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.vocabulary import Data, Direction, Ranks, Stage
from moe_ref.contract.weights import MoEWeights
from moe_ref.inputs.build import Inputs, inverse_root
from moe_ref.inputs.shards import build_shards
from moe_ref.oracle.layer import moe
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.published import Published, published
from moe_ref.verify.child.execute import Failed, run_local
from moe_ref.verify.child.job import Job
from moe_ref.verify.child.messages import RankTensors, Request
from moe_ref.verify.published import accepts

DEVIATIONS = {"vllm": 2.0**-4, "sglang": 2.0**-7}
"""Nearest powers of two to the deviation of all data in a project's tests over that of generated ones: 0.1 and 0.01;
others test at the scale of the case. Sources: as of `published` in tolerances.yaml."""


def refused(subject: ModuleType, case_id: str) -> dict[str, bool]:
    """By project whether its criterion refuses the output, beside the truth rounded to its dtype.

    On virtual ranks, once; a project that publishes nothing for the dtype is missing, as is one on whose data the layer
    failed. Gradients are not looked at. Empty for data that no project tests with.
    """
    case = replace(parse_case(case_id), direction=Direction.FORWARD)
    if case.problem.data in (Data.NON_FINITE, Data.EXACT):
        return {}
    found: dict[str, bool] = {}
    for one in published(load_tolerances().file.published, case.problem.dtype):
        found |= _judged(subject, case, one)
    return found


def _judged(subject: ModuleType, case: Case, one: Published) -> dict[str, bool]:
    request = Request(case=format_case(case), ranks=Ranks.LOCAL, device="cpu", runs=1, time_limit=0.0)
    job = Job(subject, request)
    whole = build_shards(case.problem, Parallel())[0]
    deviation = DEVIATIONS.get(one.project)
    if deviation is not None:
        job.inputs = _small_tokens(job.inputs, deviation)
        job.shards = {rank: _small_weights(shard, whole, deviation) for rank, shard in job.shards.items()
                      if isinstance(shard, MoEWeights)}
        whole = _small_weights(whole, whole, deviation)
    outcomes = run_local(job)
    if isinstance(outcomes, Failed):
        return {}
    inputs = job.inputs
    truth_TH = moe(inputs.x_TH, whole, case.problem.spec, logits_TE=inputs.logits_TE, residual_TH=inputs.residual_TH)
    return {one.project: not all(_accepted(one, case, rank, tensors, truth_TH)
                                 for rank, tensors in enumerate(outcomes[0].tensors))}


def _accepted(one: Published, case: Case, rank: int, tensors: RankTensors, truth_TH: torch.Tensor) -> bool:
    got_TH = tensors[Stage.REDUCED]
    want_TH = truth_TH[slice(*rank_shares(case)[rank].tokens)].to(got_TH.dtype)
    return got_TH.shape == want_TH.shape and accepts(one.criterion, got_TH, want_TH)


def _small_tokens(inputs: Inputs, deviation: float) -> Inputs:
    residual_TH = inputs.residual_TH
    return replace(inputs, x_TH=inputs.x_TH * deviation,
                   residual_TH=None if residual_TH is None else residual_TH * deviation)


def _small_weights(weights: MoEWeights, whole: MoEWeights, deviation: float) -> MoEWeights:
    """Matrices without their part of the whole layer's fan-in, biases of the same deviation."""
    fan_in = {name: tensor.shape[-1] for name, tensor in whole.named_tensors()}

    def scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "weight_scale_E":
            return tensor
        return tensor * (deviation if "bias" in name else deviation / inverse_root(fan_in[name]))

    return MoEWeights(**{name: scaled(name, tensor) for name, tensor in weights.named_tensors()})
