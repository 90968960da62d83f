"""What every rank holds of a problem's weights, made expert by expert, so that no unsharded copy exists."""

from collections.abc import Callable

import torch

from moe_ref.contract.case import Problem
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.encoded import Encoded, stacked
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.placements import rank_part
from moe_ref.contract.quantised import MATRICES, QuantisedWeights, cut_matrix
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Storage
from moe_ref.contract.weights import (
    EXPERT_PARAMETERS,
    SHARED_PARAMETERS,
    WHOLE_PARAMETERS,
    ExpertWeights,
    MoEWeights,
    parameter_shapes,
)
from moe_ref.inputs.build import EncodedExpert, GeneratedWeights
from moe_ref.inputs.storage import empty_stored, padded


def build_shards(problem: Problem, parallel: Parallel, device: torch.device | str = "cpu",
                 progress: Callable[[int], None] = lambda expert: None,
                 storage: Storage = Storage.OUT_IN, *, only: frozenset[int] | None = None) -> list[MoEWeights]:
    """Every rank's weights, or those of the ranks in `only`, filled expert by expert, so that no unsharded copy exists.

    Experts that a rank hosts more than once are copied as often. With another storage the matrices are strided views of
    memory in that order; padded, every parameter is a part of a larger tensor.
    """
    weights, options = GeneratedWeights(problem), {"dtype": TORCH_DTYPES[problem.dtype], "device": device}
    shards: dict[int, dict[str, torch.Tensor]] = {
        rank: {name: empty_stored(name, shape, storage, **options)
               for name, shape in parameter_shapes(problem.spec, parallel, rank).items()}
        for rank in range(parallel.size) if only is None or rank in only}
    for name in WHOLE_PARAMETERS:
        tensor = getattr(weights, name)
        if tensor is not None:
            tensor = padded(tensor.to(device)) if storage is Storage.PADDED else tensor.to(device)
            for shard in shards.values():
                shard[name] = tensor
    if shared := weights.shared_expert():
        for rank, shard in shards.items():
            _copy_part(shared, SHARED_PARAMETERS, shard, parallel, rank)
    hosted = parallel.hosted(problem.spec.num_experts)
    for e in range(problem.spec.num_experts):
        places = [(rank, index) for rank in shards
                  for index, held in enumerate(hosted[parallel.coordinates(rank)[0]]) if held == e]
        if places:
            expert = weights.expert(e)
            for rank, index in places:
                _copy_part(expert, EXPERT_PARAMETERS, shards[rank], parallel, rank, index)
        progress(e)
    return [MoEWeights(**shard) for shard in shards.values()]


def _copy_part(expert: ExpertWeights, names: tuple[str, ...], shard: dict[str, torch.Tensor], parallel: Parallel,
               rank: int, index: int | None = None) -> None:
    for name, tensor in zip(names, expert, strict=True):
        if tensor is not None:
            target = shard[name] if index is None else shard[name][index]
            target.copy_(rank_part(name, tensor, parallel, rank))


def build_encoded_shards(problem: Problem, parallel: Parallel, device: torch.device | str = "cpu",
                         progress: Callable[[int], None] = lambda expert: None, *,
                         only: frozenset[int] | None = None) -> list[QuantisedWeights]:
    """build_shards of a problem whose weights are encoded."""
    weights, ranks = GeneratedWeights(problem), [rank for rank in range(parallel.size) if only is None or rank in only]
    shared = weights.encoded_shared_expert()
    hosted = parallel.hosted(problem.spec.num_experts)
    parts: dict[int, dict[int, EncodedExpert]] = {rank: {} for rank in ranks}
    for e in range(problem.spec.num_experts):
        holders = [rank for rank in ranks if e in hosted[parallel.coordinates(rank)[0]]]
        if holders or e == 0:
            expert = weights.encoded_expert(e)
            for rank in holders:
                parts[rank][e] = _part(expert, "", parallel, rank)
        progress(e)
    return [_assembled(problem, weights, [parts[rank][e] for e in hosted[parallel.coordinates(rank)[0]]], shared,
                       parallel, rank).to(device) for rank in ranks]


def _part(expert: EncodedExpert, prefix: str, parallel: Parallel, rank: int) -> EncodedExpert:
    """The rank's rows and columns of one expert."""
    names = {"w13": "w13_EGIH", "w2": "w2_EHI", "w13_bias_GI": "w13_bias_EGI", "w2_bias_H": "w2_bias_EH"}
    if prefix:
        names = {"w13": MATRICES["shared_w13"], "w2": MATRICES["shared_w2"], "w13_bias_GI": "shared_w13_bias_GI",
                 "w2_bias_H": "shared_w2_bias_H"}
    cut = {name: cut_matrix(names[name], getattr(expert, name), parallel, rank) for name in ("w13", "w2")}
    biases = {name: rank_part(names[name], bias, parallel, rank).clone()
              for name in ("w13_bias_GI", "w2_bias_H") if (bias := getattr(expert, name)) is not None}
    return expert._replace(**cut, **biases)  # pyrefly: ignore


def _assembled(problem: Problem, weights: GeneratedWeights, experts: list[EncodedExpert],
               shared: EncodedExpert | None, parallel: Parallel, rank: int) -> QuantisedWeights:
    """One rank's experts side by side, the shared one, and what belongs to none."""
    count = len(experts)
    held = experts or [_part(weights.encoded_expert(0), "", parallel, rank)]

    def side_by_side(name: str) -> torch.Tensor | None:
        found = [getattr(expert, name) for expert in held]
        return None if found[0] is None else torch.stack(found)[:count]

    fixed = ENCODINGS[problem.scheme].input_scale
    given: dict[str, torch.Tensor | Encoded | None] = {
        "w13": stacked([expert.w13 for expert in held], count), "w2": stacked([expert.w2 for expert in held], count),
        "w13_bias_EGI": side_by_side("w13_bias_GI"), "w2_bias_EH": side_by_side("w2_bias_H"),
        "w13_input_scale_E": side_by_side("w13_input_scale") if fixed else None,
        "w2_input_scale_E": side_by_side("w2_input_scale") if fixed else None}
    if shared is not None:
        part = _part(shared, "shared_", parallel, rank)
        given |= {"shared_w13": part.w13, "shared_w2": part.w2, "shared_w13_bias_GI": part.w13_bias_GI,
                  "shared_w2_bias_H": part.w2_bias_H}
        given |= {"shared_w13_input_scale": part.w13_input_scale,
                  "shared_w2_input_scale": part.w2_input_scale} if fixed else {}
    whole = {name: getattr(weights, name) for name in WHOLE_PARAMETERS}
    return QuantisedWeights(scheme=problem.scheme, **given, **whole)  # pyrefly: ignore
