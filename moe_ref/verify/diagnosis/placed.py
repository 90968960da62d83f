"""What ranks showed of one stage as one tensor of the whole layer, not a number where no rank shows anything."""

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import SharedPlacement, Stage
from moe_ref.verify.measure.placing import RankTensors, row_positions

BY_TOKEN = (Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.SHARED, Stage.MERGED, Stage.REDUCED)


def placed(stage: Stage, ranks: list[RankTensors], case: Case, shares: tuple[RankShare, ...],
           server_TK: torch.Tensor) -> torch.Tensor:
    """fp64: (P, T, ...) of tokens on each of P ranks; gate_up (R, G, I), act (R, I) and down (tp, R, H) of R = T * K
    routed rows, each as the rank that serves it shows it; ids as (P, T, K, E + Z) of zeros and ones.
    """
    if stage in BY_TOKEN:
        return torch.stack([_of_rank(stage, *one, case) for one in zip(ranks, shares, strict=True)])
    spec, rows = case.problem.spec, server_TK.numel()
    shape = {Stage.GATE_UP: (rows, spec.experts.num_projections, spec.intermediate_size),
             Stage.ACT: (rows, spec.intermediate_size), Stage.DOWN: (case.parallel.tp, rows, spec.hidden_size)}[stage]
    whole = torch.full(shape, torch.nan, dtype=torch.float64)
    for tensors, share in zip(ranks, shares, strict=True):
        position_R = row_positions(server_TK, share, case.parallel.ep)
        row_R = (position_R >= 0).nonzero().flatten()
        shown = tensors[stage][position_R[row_R]].double()
        if stage is Stage.DOWN:
            whole[share.tp_rank, row_R, slice(*share.outputs)] = shown
        else:
            whole[row_R, ..., slice(*share.columns)] = shown
    return whole


def _of_rank(stage: Stage, tensors: RankTensors, share: RankShare, case: Case) -> torch.Tensor:
    spec, shown = case.problem.spec, tensors[stage]
    whole_shared = stage is Stage.SHARED and case.parallel.shared is SharedPlacement.REPLICATED
    tokens, columns = share.merged_tokens, share.outputs
    if stage not in (Stage.SHARED, Stage.MERGED) or whole_shared:
        tokens, columns = share.tokens, (0, spec.hidden_size)
    if stage is Stage.IDS:
        shown = one_hot(shown, spec.num_choices)
    if stage in (Stage.SHARED, Stage.MERGED, Stage.REDUCED):
        whole = torch.full((case.problem.num_tokens, spec.hidden_size), torch.nan, dtype=torch.float64)
        whole[slice(*tokens), slice(*columns)] = shown.double()
        return whole
    whole = torch.full((case.problem.num_tokens, *shown.shape[1:]), torch.nan, dtype=torch.float64)
    whole[slice(*tokens)] = shown.double()
    return whole


def one_hot(ids_TK: torch.Tensor, num_choices: int) -> torch.Tensor:
    """(T, K, E + Z) of zeros and ones, so that a wrong id is an error like any other; an id outside is none."""
    return (ids_TK.long()[..., None] == torch.arange(num_choices)).double()
