"""Auxiliary losses of routers in fp64, each with its gradient with respect to the logits written out.

    load balance (Switch, arXiv 2101.03961, eqs. 4 to 6)    E * sum over e of f_e P_e
    sequence balance (DeepSeek-V3, arXiv 2412.19437, eqs. 17 to 20)    mean over sequences of sum over e of f_e P_e
    z-loss (ST-MoE, arXiv 2202.08906, eq. 5)    mean over tokens of logsumexp(logits)^2

f_e counts decisions and has no gradient; P_e is a mean of scores. Coefficients (alpha, c_z) are the caller's.
ids_TK are the ids as selected, before capacity drops any; an id outside the logits' columns counts for nothing.
Columns of identity experts are experts here. No tokens: loss and gradient are 0.
"""

import torch

from moe_ref.contract.errors import UsageTypeError, UsageValueError, raise_faults
from moe_ref.contract.spec import Router
from moe_ref.oracle.backward.weights import score_backward
from moe_ref.oracle.router import score


def load_balancing_loss(logits_TE: torch.Tensor, ids_TK: torch.Tensor,
                        mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """E * sum of f_e P_e: f_e slots per token on expert e, P_e mean of softmax(logits); a scalar.

    With K slots f sums to K, as in transformers. mask_T (T,): tokens that count, all without it. Several layers
    pooled as transformers does: their logits and ids one after the other. Raises UsageValueError / UsageTypeError
    on shapes or kinds that do not fit, as all losses here do.
    """
    share_E, mean_T = _shares(logits_TE, ids_TK, mask_T)
    prob_TE = torch.softmax(logits_TE.double(), dim=-1)
    return logits_TE.shape[1] * (share_E * (mean_T @ prob_TE)).sum()


@torch.no_grad()
def load_balancing_gradient(logits_TE: torch.Tensor, ids_TK: torch.Tensor,
                            mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient of load_balancing_loss, (T, E): E m_t p_e (f_e - sum over j of p_j f_j), m_t = mask / tokens."""
    share_E, mean_T = _shares(logits_TE, ids_TK, mask_T)
    prob_TE = torch.softmax(logits_TE.double(), dim=-1)
    return logits_TE.shape[1] * mean_T[:, None] * prob_TE * (share_E - (prob_TE @ share_E)[:, None])


def sequence_balance_loss(logits_TE: torch.Tensor, ids_TK: torch.Tensor, router: Router,
                          sequence_length: int | None = None) -> torch.Tensor:
    """Mean over sequences of sum of f_e P_e: f_e = E / (K L) * slots on e, P_e mean of s_e / sum of s; a scalar.

    s is router.score with its scale and cap; for softmax this is DeepSeek-V2's expert-level loss per sequence
    (arXiv 2405.04434, eqs. 23 to 25). L = sequence_length, which must divide T; None: one sequence. The paper
    counts the best K by s alone, without selection bias and groups; the caller chooses with ids_TK.
    """
    share_BE, score_TE = _sequence_shares(logits_TE, ids_TK, sequence_length), score(logits_TE.double(), router)
    normed_BTE = (score_TE / score_TE.sum(-1, keepdim=True)).unflatten(0, (len(share_BE), -1))
    return (share_BE * normed_BTE.mean(1)).sum() / len(share_BE) if len(logits_TE) else score_TE.sum()


@torch.no_grad()
def sequence_balance_gradient(logits_TE: torch.Tensor, ids_TK: torch.Tensor, router: Router,
                              sequence_length: int | None = None) -> torch.Tensor:
    """Gradient of sequence_balance_loss, (T, E): d_s_e = (f_e - sum over j of f_j s_j / S) / (S T), S = sum of s,
    then through the score as in moe_ref.oracle.backward.weights."""
    share_BE, score_TE = _sequence_shares(logits_TE, ids_TK, sequence_length), score(logits_TE.double(), router)
    share_TE = share_BE.repeat_interleave(len(score_TE) // max(1, len(share_BE)), 0)
    sum_T1 = score_TE.sum(-1, keepdim=True)
    centred_TE = share_TE - (share_TE * score_TE).sum(-1, keepdim=True) / sum_T1
    return score_backward(centred_TE / (sum_T1 * max(1, len(score_TE))), logits_TE, router)


def router_z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)^2, a scalar."""
    _check(logits_TE)
    return (torch.logsumexp(logits_TE.double(), dim=-1) ** 2).sum() / max(1, len(logits_TE))


@torch.no_grad()
def router_z_gradient(logits_TE: torch.Tensor) -> torch.Tensor:
    """Gradient of router_z_loss, (T, E): 2 logsumexp(logits) softmax(logits) / T."""
    _check(logits_TE)
    total_T1 = torch.logsumexp(logits_TE.double(), dim=-1, keepdim=True)
    return 2 * total_T1 * torch.softmax(logits_TE.double(), dim=-1) / max(1, len(logits_TE))


def _shares(logits_TE: torch.Tensor, ids_TK: torch.Tensor,
            mask_T: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """f (E,) and each token's part of a mean (T,): mask / number of tokens that count."""
    _check(logits_TE, ids_TK, mask_T)
    mask_T = torch.ones_like(logits_TE[:, 0], dtype=torch.float64) if mask_T is None else mask_T.double()
    total = mask_T.sum()
    mean_T = mask_T / torch.where(total > 0, total, 1.0)
    return (_slots(ids_TK, logits_TE.shape[1]) * mean_T[:, None]).sum(0), mean_T


def _sequence_shares(logits_TE: torch.Tensor, ids_TK: torch.Tensor, sequence_length: int | None) -> torch.Tensor:
    """f of every sequence, (B, E)."""
    _check(logits_TE, ids_TK)
    (tokens, experts), slots = logits_TE.shape, ids_TK.shape[1]
    length = max(1, tokens) if sequence_length is None else sequence_length
    if length < 1 or tokens % length:
        raise UsageValueError(f"sequence_length={length}, but should divide the number of tokens, {tokens}")
    if not tokens:
        return logits_TE.new_zeros(1, experts, dtype=torch.float64)
    count_BE = _slots(ids_TK, experts).unflatten(0, (-1, length)).sum(1)
    return count_BE * experts / (slots * length)


def _slots(ids_TK: torch.Tensor, num_columns: int) -> torch.Tensor:
    """How many of a token's slots are on each expert, (T, E) in fp64."""
    columns_E = torch.arange(num_columns, device=ids_TK.device)
    return (ids_TK[:, :, None] == columns_E).sum(1).double()


def _check(logits_TE: torch.Tensor, ids_TK: torch.Tensor | None = None,
           mask_T: torch.Tensor | None = None) -> None:
    """Shapes and kinds, all at once."""
    if logits_TE.dim() != 2 or not logits_TE.dtype.is_floating_point:
        raise UsageTypeError(f"logits_TE: shape {tuple(logits_TE.shape)} of {logits_TE.dtype}, "
                             "but should be (T, E) and floating point")
    faults, tokens = [], len(logits_TE)
    if ids_TK is not None and (ids_TK.dim() != 2 or len(ids_TK) != tokens or ids_TK.dtype.is_floating_point):
        faults.append(f"ids_TK: shape {tuple(ids_TK.shape)} of {ids_TK.dtype}, "
                      f"but should be ({tokens}, K) integers")
    if mask_T is not None and tuple(mask_T.shape) != (tokens,):
        faults.append(f"mask_T: shape {tuple(mask_T.shape)}, but should be ({tokens},)")
    raise_faults("losses", faults)
