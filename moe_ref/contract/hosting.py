"""Which expert-parallel rank serves a routed slot: the contract's rule, on tensors, nothing read back from them."""

from functools import cache

import torch

from moe_ref.contract.parallel import Parallel

_TABLES: dict[tuple[Parallel, int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}


@cache
def _copies(parallel: Parallel, num_experts: int) -> list[list[tuple[int, int]]]:
    """(ep rank, index there) of every copy of each expert, by rank and then index."""
    copies: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for rank, experts in enumerate(parallel.hosted(num_experts)):
        for index, e in enumerate(experts):
            copies[e].append((rank, index))
    return copies


def _tables(ids_TK: torch.Tensor, parallel: Parallel, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, C, 2) every copy of each expert, repeated up to C, and (E,) how many there are; int64, where the ids are.

    Kept per device: a copy from the host in every call would wait for the device, and cannot be captured in a graph.
    """
    key = parallel, num_experts, ids_TK.device
    # Fake tensors, and those of a trace, know no others.
    if type(ids_TK) is not torch.Tensor or torch.compiler.is_compiling():
        return _make_tables(*key)
    if key not in _TABLES:
        _TABLES[key] = _make_tables(*key)
    return _TABLES[key]


def _make_tables(parallel: Parallel, num_experts: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    copies = _copies(parallel, num_experts)
    most = max(len(places) for places in copies)
    with torch.inference_mode(False):  # kept ones are used outside of it, too
        return (torch.tensor([[places[n % len(places)] for n in range(most)] for places in copies], device=device),
                torch.tensor([len(places) for places in copies], device=device))


def serving_copies(ids_TK: torch.Tensor, parallel: Parallel, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) ep rank that serves each slot and the expert's index there, int64; -1 where the id is no routed expert.

    A token takes copy number (its row in ids_TK) mod (number of copies) of an expert. ids_TK holds the tokens that one
    ep rank starts from: all of them where tokens are replicated over ep, otherwise those of that rank and its tp group.
    """
    table_EC2, counts_E = _tables(ids_TK, parallel, num_experts)
    known_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    id_TK = ids_TK.long().where(known_TK, 0)
    copy_TK = torch.arange(len(ids_TK), device=ids_TK.device)[:, None] % counts_E[id_TK]
    places_TK2 = table_EC2[id_TK, copy_TK]
    return places_TK2[..., 0].where(known_TK, -1), places_TK2[..., 1].where(known_TK, -1)
