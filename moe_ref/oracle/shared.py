"""The shared expert: an expert that every token passes, its part on this rank or all of it."""

import torch

from moe_ref.contract.collectives import enter
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WeightSource, check_shared
from moe_ref.oracle import expert as formula
from moe_ref.oracle.gather_form import all_columns
from moe_ref.oracle.tokens import whole_in_sum


def shared_rows(x_TH: torch.Tensor, gate_TS: torch.Tensor | None, weights: WeightSource, spec: MoESpec,
                rank: Rank) -> torch.Tensor | None:
    """(T, H) in fp64, gated: a partial sum, columns under the gather schedule, all of it where it is whole; or None.

    Ranks that hold the same part of it and have other tokens add up its gradient.
    """
    expert = check_shared(weights.shared_expert(), spec, rank.parallel, rank.groups.rank)
    if spec.shared is None or expert is None:
        return None
    whole = rank.whole_shared
    holders = rank.with_other_tokens if whole else (rank.ep,) * rank.parallel.tokens.over_ep
    w13_GIH, w2_HI = (enter(matrix.double(), *holders) for matrix in expert[:2])
    bias_GI = None if expert.w13_bias_GI is None else enter(expert.w13_bias_GI.double(), *holders)
    act_TI = formula.activate(formula.gate_up(x_TH, w13_GIH, bias_GI), spec.shared.mlp)
    if spec.shared.gate == "router":
        assert gate_TS is not None
        start, stop = rank.parallel.shared_ranges(spec.shared.intermediate_size)[rank.groups.rank]
        width = spec.shared.intermediate_size // spec.shared.num_experts
        act_TI = act_TI * gate_TS.repeat_interleave(width, dim=1)[:, start:stop]
    if rank.by_output and not whole:
        act_TI = all_columns(act_TI, rank)
    shared_TH = formula.down(act_TI, w2_HI)
    if (bias_H := expert.w2_bias_H) is not None:
        if whole:
            shared_TH = shared_TH + enter(bias_H.double(), *holders)
        else:
            shared_TH = shared_TH + (bias_H.double() if rank.by_output else whole_in_sum(bias_H, rank))
    if spec.shared.gate == "sigmoid":
        assert gate_TS is not None
        shared_TH = shared_TH * gate_TS
    return shared_TH
