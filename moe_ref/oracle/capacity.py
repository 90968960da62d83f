"""Which slots an expert of limited capacity keeps."""

import torch

from moe_ref.contract.spec import Router


def kept_slots(ids_TK: torch.Tensor, score_TK: torch.Tensor, router: Router) -> torch.Tensor:
    """True where the expert still has room for the slot, (T, K); all True without a capacity.

    Sequences of capacity.sequence_length tokens are counted apart; a last, shorter one has the limit of its length.
    Identity experts have no limit.
    """
    num_tokens, top_k = ids_TK.shape
    capacity = router.capacity
    if capacity is None or num_tokens == 0:
        return torch.ones_like(ids_TK, dtype=torch.bool)
    length = capacity.sequence_length or num_tokens
    token_R = torch.arange(num_tokens, device=ids_TK.device).repeat_interleave(top_k)
    order_R = _by_priority(score_TK, capacity.priority)
    # One queue per sequence and expert: slots sorted by queue, in the order of priority within it.
    queue_R = (token_R // length) * router.num_choices + ids_TK.flatten()
    order_R = order_R[torch.argsort(queue_R[order_R], stable=True)]
    _, place_in_queues_R, sizes = torch.unique_consecutive(queue_R[order_R], return_inverse=True, return_counts=True)
    place_R = torch.arange(len(order_R), device=ids_TK.device) - (sizes.cumsum(0) - sizes)[place_in_queues_R]
    limits = torch.tensor([capacity.limit(min(length, num_tokens - start), top_k, router.num_experts)
                           for start in range(0, num_tokens, length)], device=ids_TK.device)
    kept_R = torch.empty_like(order_R, dtype=torch.bool)
    kept_R[order_R] = place_R < limits[token_R[order_R] // length]
    return kept_R.view_as(ids_TK) | (ids_TK >= router.num_experts)


def _by_priority(score_TK: torch.Tensor, priority: str) -> torch.Tensor:
    """Slots, by token and then slot, in the order in which they are served."""
    slots_R = torch.arange(score_TK.numel(), device=score_TK.device)
    if priority == "choice":
        return slots_R.view_as(score_TK).T.flatten()
    if priority == "weight":
        # NaN sorts as the largest: put last, a broken token takes nobody's place.
        return torch.argsort(score_TK.flatten().nan_to_num(nan=-torch.inf), stable=True, descending=True)
    return slots_R
