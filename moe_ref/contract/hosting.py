"""Which expert-parallel rank serves a routed slot: the contract's rule, on tensors, nothing read back from them."""

from functools import cache

import torch

from moe_ref.contract.parallel import Parallel


@cache
def _copies(parallel: Parallel, num_experts: int) -> list[list[tuple[int, int]]]:
    """(ep rank, index there) of every copy of each expert, by rank and then index."""
    copies: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for rank, experts in enumerate(parallel.hosted(num_experts)):
        for index, e in enumerate(experts):
            copies[e].append((rank, index))
    return copies


def serving_copies(ids_TK: torch.Tensor, parallel: Parallel, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) ep rank that serves each slot and the expert's index there, int64; -1 where the id is no routed expert.

    A token takes copy number (its row in ids_TK) mod (number of copies) of an expert. ids_TK holds the tokens that one
    ep rank starts from: all of them where tokens are replicated over ep, otherwise those of that rank and its tp group.
    """
    copies = _copies(parallel, num_experts)
    most = max(len(places) for places in copies)
    table = torch.tensor([[places[n % len(places)] for n in range(most)] for places in copies])
    counts = torch.tensor([len(places) for places in copies])
    table_EC2, counts_E = table.to(ids_TK.device), counts.to(ids_TK.device)
    known_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    id_TK = ids_TK.long().where(known_TK, 0)
    copy_TK = torch.arange(len(ids_TK), device=ids_TK.device)[:, None] % counts_E[id_TK]
    places_TK2 = table_EC2[id_TK, copy_TK]
    return places_TK2[..., 0].where(known_TK, -1), places_TK2[..., 1].where(known_TK, -1)
