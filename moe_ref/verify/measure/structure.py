"""Shapes and dtypes of everything a subject shows, before any number is compared."""

from collections.abc import Collection

import torch

from moe_ref.contract.capabilities import Capabilities, Products
from moe_ref.contract.case import Case
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.parallel import Range
from moe_ref.contract.shares import RankShare, rank_shares
from moe_ref.contract.vocabulary import Data, Schedule, Scheme, SharedPlacement, Stage
from moe_ref.verify.bounds.operands import RULES
from moe_ref.verify.measure.operand_stages import STAGES
from moe_ref.verify.measure.placing import ROW_STAGES, RankTensors, over_all_tokens, servers
from moe_ref.verify.measure.row_counts import likely_rows


def stage_shapes(case: Case, share: RankShare, products: Products = "exact") -> dict[Stage, tuple[int, ...]]:
    """What each stage of a rank should look like; sharded stages have the rank's own width.

    Of routed rows with expert parallelism the number is left out: it depends on the ids.
    """
    spec, own, merged = case.problem.spec, _length(share.tokens), _length(share.merged_tokens)
    columns, outputs = _length(share.columns), _length(share.outputs)
    rows = (merged * spec.top_k,) if case.parallel.ep == 1 else ()
    whole_shared = case.parallel.shared is SharedPlacement.REPLICATED
    return {
        Stage.LOGITS: (own, spec.num_choices), Stage.IDS: (own, spec.top_k), Stage.WEIGHTS: (own, spec.top_k),
        Stage.GATE_UP: (*rows, spec.experts.num_projections, columns),
        Stage.ACT: (*rows, columns), Stage.DOWN: (*rows, outputs),
        Stage.SHARED: (own, spec.hidden_size) if whole_shared else (merged, outputs), Stage.MERGED: (merged, outputs),
        Stage.REDUCED: (own, spec.hidden_size), **{
            stage: (*rows, width) for stage, width in _operand_widths(case, share, products).items()},
    }


def _operand_widths(case: Case, share: RankShare, products: Products) -> dict[Stage, int]:
    """Columns of scales and codes of what is multiplied, where it is rounded."""
    rule, spec = RULES.get(products), case.problem.spec
    if rule is None:
        return {}
    by_output = case.parallel.schedule is Schedule.GATHER
    start, stop = (0, spec.intermediate_size) if by_output else share.columns
    first = start if case.problem.scheme is not Scheme.PLAIN else 0
    return {Stage.PERMUTE_SCALES: rule.num_blocks(spec.hidden_size), Stage.PERMUTE_CODES: spec.hidden_size,
            Stage.ACT_SCALES: rule.at(first).num_blocks(stop - start), Stage.ACT_CODES: stop - start}


def _length(part: Range) -> int:
    return part[1] - part[0]


def expected_stages(case: Case, capabilities: Capabilities) -> set[Stage]:
    """The stages a subject must show in this case: those it declares, where the layer has them."""
    spec, expected = case.problem.spec, {*capabilities.stages, Stage.REDUCED}
    if spec.router is None or case.problem.data is Data.EXACT:
        expected -= {Stage.LOGITS}
    if spec.shared is None:
        expected -= {Stage.SHARED}
    if capabilities.contract(case.problem).products not in RULES:
        expected -= {stage for stages in STAGES.values() for stage in stages}
    return expected


def struct_faults(case: Case, ranks: list[RankTensors], capabilities: Capabilities) -> list[str]:
    """One line per stage that is missing or undeclared, or of wrong shape or dtype, with both."""
    numerics, faults = capabilities.contract(case.problem), []
    expected, shares = expected_stages(case, capabilities), rank_shares(case)
    for rank, tensors in enumerate(ranks):
        if missing := expected - tensors.keys():
            faults.append(f"rank {rank} does not show {_names(missing)}, but should, as declared")
        if extra := tensors.keys() - expected:
            faults.append(f"rank {rank} shows {_names(extra)}, but should not, since it is not declared for this layer")
    for rank, tensors in enumerate(ranks):
        shapes = stage_shapes(case, shares[rank], numerics.products)
        if rows := [stage for stage in (Stage.WEIGHTS, *ROW_STAGES)
                    if stage in tensors and Stage.IDS not in tensors]:
            faults.append(f"{_names(rows)} shown without ids, so nobody can say which expert a row belongs to")
        for stage, tensor in tensors.items():
            if stage not in shapes:
                faults.append(f"{stage}: shown, but this stage is not compared, so it should not be [rank {rank}]")
                continue
            shape = tuple(tensor.shape)
            if shape != shapes[stage] and not (stage in ROW_STAGES and shape[1:] == shapes[stage]):
                faults.append(f"{stage}: shape {shape}, but should be {shapes[stage]} [rank {rank}]")
            injected = case.problem.data is Data.EXACT and stage is Stage.WEIGHTS
            stored = None if injected else numerics.storage.get(stage)
            if stored is not None and tensor.dtype != TORCH_DTYPES[stored]:
                faults.append(f"{stage}: dtype {tensor.dtype}, but should be {TORCH_DTYPES[stored]} as declared "
                              f"[rank {rank}]")
            if stage is Stage.IDS and (tensor.dtype.is_floating_point or tensor.dtype is torch.bool):
                faults.append(f"ids: dtype {tensor.dtype}, but should be an integer type [rank {rank}]")
    return faults or _row_faults(case, ranks, shares)


def _row_faults(case: Case, ranks: list[RankTensors], shares: tuple[RankShare, ...]) -> list[str]:
    """With expert parallelism a rank shows the rows that it serves, no more and no fewer."""
    if case.parallel.ep == 1 or Stage.IDS not in ranks[0]:
        return []
    expanded, faults = over_all_tokens(ranks, shares, case.problem.num_tokens), []
    for share, tensors, routing in zip(shares, ranks, expanded, strict=True):
        served = int((servers(routing[Stage.IDS], case, shares) == share.ep_rank).sum())
        faults += [f"{stage}: {len(tensors[stage])} rows, but rank {share.rank} serves {served} of the chosen slots"
                   for stage in ROW_STAGES if stage in tensors and len(tensors[stage]) != served]
    stage = next((stage for stage in ROW_STAGES if stage in ranks[0]), None)
    if faults and stage is not None:
        words = likely_rows(case, shares, expanded[0][Stage.IDS], [len(tensors[stage]) for tensors in ranks])
        faults[1:1] = [words] * (words != "")
    return faults


def _names(stages: Collection[Stage]) -> str:
    return ", ".join(stage for stage in Stage if stage in stages)
