"""Shapes and dtypes of everything a subject shows, before any number is compared."""

from collections.abc import Collection

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.case import Case
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.vocabulary import Stage
from moe_ref.verify.measure.routing import RankTensors


def stage_shapes(case: Case, rank: int) -> dict[Stage, tuple[int, ...]]:
    """What each stage of `rank` should look like; sharded stages have the rank's own width."""
    spec, tokens = case.problem.spec, case.problem.num_tokens
    rows = tokens * spec.top_k
    start, stop = case.parallel.ranges(spec.intermediate_size)[rank]
    return {
        Stage.LOGITS: (tokens, spec.num_choices), Stage.IDS: (tokens, spec.top_k), Stage.WEIGHTS: (tokens, spec.top_k),
        Stage.GATE_UP: (rows, spec.experts.num_projections, stop - start),
        Stage.ACT: (rows, stop - start), Stage.DOWN: (rows, spec.hidden_size),
        Stage.SHARED: (tokens, spec.hidden_size), Stage.MERGED: (tokens, spec.hidden_size),
        Stage.REDUCED: (tokens, spec.hidden_size),
    }


def expected_stages(case: Case, capabilities: Capabilities) -> set[Stage]:
    """The stages a subject must show in this case: those it declares, where the layer has them."""
    spec, expected = case.problem.spec, {*capabilities.stages, Stage.REDUCED}
    if spec.router is None:
        expected -= {Stage.LOGITS}
    if spec.shared is None:
        expected -= {Stage.SHARED}
    return expected


def struct_faults(case: Case, ranks: list[RankTensors], capabilities: Capabilities) -> list[str]:
    """One line per stage that is missing or undeclared, or of wrong shape or dtype, with both."""
    numerics, faults = capabilities.numerics[case.problem.dtype], []
    expected = expected_stages(case, capabilities)
    for rank, tensors in enumerate(ranks):
        if missing := expected - tensors.keys():
            faults.append(f"rank {rank} does not show {_names(missing)}, but should, as declared")
        if extra := tensors.keys() - expected:
            faults.append(f"rank {rank} shows {_names(extra)}, but should not, since it is not declared for this layer")
    for rank, tensors in enumerate(ranks):
        shapes = stage_shapes(case, rank)
        if rows := [stage for stage in (Stage.WEIGHTS, Stage.GATE_UP, Stage.ACT, Stage.DOWN)
                    if stage in tensors and Stage.IDS not in tensors]:
            faults.append(f"{_names(rows)} shown without ids, so nobody can say which expert a row belongs to")
        for stage, tensor in tensors.items():
            if stage not in shapes:
                faults.append(f"{stage}: shown, but this stage is not compared, so it should not be [rank {rank}]")
                continue
            if tuple(tensor.shape) != shapes[stage]:
                faults.append(f"{stage}: shape {tuple(tensor.shape)}, but should be {shapes[stage]} [rank {rank}]")
            stored = numerics.storage.get(stage)
            if stored is not None and tensor.dtype != TORCH_DTYPES[stored]:
                faults.append(f"{stage}: dtype {tensor.dtype}, but should be {TORCH_DTYPES[stored]} as declared "
                              f"[rank {rank}]")
            if stage is Stage.IDS and tensor.dtype.is_floating_point:
                faults.append(f"ids: dtype {tensor.dtype}, but should be an integer type [rank {rank}]")
    return faults


def _names(stages: Collection[Stage]) -> str:
    return ", ".join(stage for stage in Stage if stage in stages)
