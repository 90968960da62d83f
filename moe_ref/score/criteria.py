"""Would other projects' tests accept a layer: their numbers on data of their scale; for comparison, no verdict."""

import math
from dataclasses import replace
from types import ModuleType

import torch

from moe_ref.contract.capabilities import ROUNDED_OPERANDS
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import MATRICES, QuantisedWeights
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.vocabulary import Data, Direction, Ranks, Scheme, Stage
from moe_ref.contract.weights import MoEWeights
from moe_ref.inputs.build import Inputs, inverse_root
from moe_ref.inputs.shards import build_encoded_shards, build_shards
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

Held = MoEWeights | QuantisedWeights


def refused(subject: ModuleType, case_id: str) -> dict[str, bool]:
    """By project whether its criterion refuses the output, beside the truth rounded to its dtype.

    On virtual ranks, once; a project that publishes nothing for the dtype is missing, as is one on whose data the layer
    failed. Gradients are not looked at. Empty for data that no project tests with, and for rows that are rounded to
    8 bits, which are far from a truth that is not.
    """
    case = replace(parse_case(case_id), direction=Direction.FORWARD)
    numerics = subject.CAPABILITIES.numerics_of(case.problem)
    rounds = numerics is not None and numerics.products in ROUNDED_OPERANDS
    if case.problem.data in (Data.NON_FINITE, Data.EXACT) or rounds:
        return {}
    found: dict[str, bool] = {}
    for one in published(load_tolerances().file.published, case.problem.dtype):
        found |= _judged(subject, case, one)
    return found


def _judged(subject: ModuleType, case: Case, one: Published) -> dict[str, bool]:
    request = Request(case=format_case(case), ranks=Ranks.LOCAL, device="cpu", runs=1, time_limit=0.0)
    job = Job(subject, request)
    build = build_shards if case.problem.scheme is Scheme.PLAIN else build_encoded_shards
    whole = build(case.problem, Parallel())[0]
    deviation = DEVIATIONS.get(one.project)
    if deviation is not None:
        job.inputs = _small_tokens(job.inputs, deviation)
        job.shards = {rank: _small_weights(shard, whole, deviation) for rank, shard in job.shards.items()}
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


def _small_weights(weights: Held, whole: Held, deviation: float) -> Held:
    """Matrices without their part of the whole layer's fan-in, biases of the same deviation."""

    def scaled(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "weight_scale_E":
            return tensor
        return tensor * (deviation if "bias" in name else deviation / inverse_root(getattr(whole, name).shape[-1]))

    small: dict[str, torch.Tensor | Encoded] = {
        name: scaled(name, tensor) for name, tensor in weights.named_tensors() if "." not in name}
    if isinstance(weights, MoEWeights):
        return replace(weights, **small)  # pyrefly: ignore
    for name in MATRICES:
        if (matrix := getattr(weights, name)) is not None:
            small[name] = _small_matrix(matrix, deviation / inverse_root(getattr(whole, name).shape[-1]))
    return replace(weights, **small)  # pyrefly: ignore


def _small_matrix(matrix: Encoded, factor: float) -> Encoded:
    """The same codes; factor: a power of two, on the scales, or on the second scale, which has room for it."""
    if matrix.second_scale is not None:
        return replace(matrix, second_scale=matrix.second_scale * factor)
    if matrix.scales.dtype is torch.uint8:
        exponents = (matrix.scales.int() + round(math.log2(factor))).clamp(0, 254)
        return replace(matrix, scales=exponents.to(torch.uint8))
    return replace(matrix, scales=matrix.scales * factor)
