"""Which slots an expert of limited capacity keeps."""

import torch

from moe_ref.contract.spec import Router


def kept_slots(ids_TK: torch.Tensor, score_TK: torch.Tensor, router: Router) -> torch.Tensor:
    """True where the expert still has room for the slot, (T, K); all True without a capacity.

    Sequences of capacity.sequence_length tokens are counted apart; a last, shorter one has the limit of its length.
    """
    kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    capacity = router.capacity
    if capacity is None:
        return kept_TK
    step = capacity.sequence_length or max(1, len(ids_TK))
    for start in range(0, len(ids_TK), step):
        window = slice(start, start + step)
        for e in range(router.num_experts):
            token_R, slot_R = (ids_TK[window] == e).nonzero(as_tuple=True)
            limit = capacity.limit(len(ids_TK[window]), router.top_k, router.num_experts)
            order_R = torch.arange(len(token_R), device=ids_TK.device)  # by token, then slot
            if capacity.priority == "choice":
                order_R = torch.argsort(slot_R, stable=True)
            elif capacity.priority == "weight":
                # NaN sorts as the largest: put last, a broken token takes nobody's place.
                order_R = torch.argsort(score_TK[window][token_R, slot_R].nan_to_num(nan=-torch.inf), stable=True,
                                        descending=True)
            dropped_R = order_R[limit:]
            kept_TK[start + token_R[dropped_R], slot_R[dropped_R]] = False
    return kept_TK
