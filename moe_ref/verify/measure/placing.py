"""What ranks showed, in the coordinates of the whole layer: all tokens, and each rank's routed rows."""

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.hosting import serving_copies
from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import Stage, Tokens

RankTensors = dict[Stage, torch.Tensor]

ROW_STAGES = (Stage.PERMUTE_SCALES, Stage.PERMUTE_CODES, Stage.GATE_UP, Stage.ACT, Stage.ACT_SCALES, Stage.ACT_CODES,
              Stage.DOWN)
ROUTING_STAGES = (Stage.LOGITS, Stage.IDS, Stage.WEIGHTS)


def over_all_tokens(ranks: list[RankTensors], shares: tuple[RankShare, ...], num_tokens: int) -> list[RankTensors]:
    """Per rank its logits, ids and weights, with those of the first rank that has a token where it has not."""
    whole = {stage: torch.empty(num_tokens, *ranks[0][stage].shape[1:], dtype=ranks[0][stage].dtype)
             for stage in ROUTING_STAGES if stage in ranks[0]}
    for tensors, share in zip(reversed(ranks), reversed(shares), strict=True):
        for stage, tensor in whole.items():
            tensor[slice(*share.tokens)] = tensors[stage]
    expanded = []
    for tensors, share in zip(ranks, shares, strict=True):
        own = dict(whole)
        if share.tokens != (0, num_tokens) or any(not torch.equal(tensors[stage], whole[stage]) for stage in whole):
            own = {stage: tensor.clone() for stage, tensor in whole.items()}
            for stage, tensor in own.items():
                tensor[slice(*share.tokens)] = tensors[stage]
        expanded.append(own)
    return expanded


def servers(ids_TK: torch.Tensor, case: Case, shares: tuple[RankShare, ...]) -> torch.Tensor:
    """(T, K) ep rank that serves each slot by the contract's rule; -1 where the id is no routed expert."""
    return serving_places(ids_TK, case, shares)[0]


def serving_places(ids_TK: torch.Tensor, case: Case,
                   shares: tuple[RankShare, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) ep rank that serves each slot, and the place of the expert there; -1 where the id is no routed expert."""
    parallel, num_experts = case.parallel, case.problem.spec.num_experts
    if not parallel.tokens.over_ep:
        return serving_copies(ids_TK, parallel, num_experts)
    cuts = [share.merged_tokens for share in shares[::parallel.tp]]
    found = [serving_copies(ids_TK[start:stop], parallel, num_experts) for start, stop in cuts]
    return torch.cat([hosts for hosts, _ in found]), torch.cat([places for _, places in found])


def row_positions(server_TK: torch.Tensor, share: RankShare, parallel_ep: int) -> torch.Tensor:
    """(T*K,) where a rank's tensors hold each routed row, -1: nowhere; without expert parallelism all are there."""
    if parallel_ep == 1:
        return torch.arange(server_TK.numel())
    served_R = (server_TK == share.ep_rank).reshape(-1)
    return torch.where(served_R, served_R.cumsum(0) - 1, -1)


def in_every_slot(case: Case, ranks: list[RankTensors]) -> list[RankTensors]:
    """Rows of all slots where a subject shows those of slots with an expert alone; zeros for the others.

    Without expert parallelism either way is right; with it, the rows that a rank serves are told by their number.
    """
    spec = case.problem.spec
    if case.parallel.ep > 1 or case.parallel.tokens is not Tokens.REPLICATED:
        return ranks
    return [tensors if Stage.IDS not in tensors else
            {stage: _in_every_slot(tensor, tensors[Stage.IDS], spec.num_choices) if stage in ROW_STAGES else tensor
             for stage, tensor in tensors.items()} for tensors in ranks]


def _in_every_slot(tensor: torch.Tensor, ids_TK: torch.Tensor, num_choices: int) -> torch.Tensor:
    named_R = ((ids_TK >= 0) & (ids_TK < num_choices)).flatten()
    if len(tensor) == len(named_R) or len(tensor) != int(named_R.sum()):
        return tensor
    whole = torch.zeros(len(named_R), *tensor.shape[1:], dtype=tensor.dtype)
    whole[named_R] = tensor
    return whole


def whole_output(ranks: list[RankTensors], shares: tuple[RankShare, ...], num_tokens: int) -> torch.Tensor:
    """The output of all tokens, (T, H) fp64, each as the first rank that has it returned it."""
    whole_TH = torch.empty(num_tokens, ranks[0][Stage.REDUCED].shape[1], dtype=torch.float64)
    for tensors, share in zip(reversed(ranks), reversed(shares), strict=True):
        whole_TH[slice(*share.tokens)] = tensors[Stage.REDUCED].double()
    return whole_TH
