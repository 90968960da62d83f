"""Auxiliary losses of routers in fp64, each with its gradient with respect to the logits written out.

    load balance (Switch, arXiv 2101.03961, eqs. 4 to 6)    E * sum over e of f_e P_e
    sequence balance (DeepSeek-V3, arXiv 2412.19437, eqs. 17 to 20)    mean over sequences of sum over e of f_e P_e
    z-loss (ST-MoE, arXiv 2202.08906, eq. 5)    mean over tokens of logsumexp(logits)^2

f_e counts decisions and has no gradient; P_e is a mean of scores, per sequence of n_e = s_e / sum over j of s_j.
n is computed from log s: where every score of a token underflows (logits below -745), s itself would give 0 / 0.
Coefficients (alpha, c_z) are the caller's.
ids_TK are the ids as selected, before capacity drops any; an id outside the logits' columns counts for nothing.
Columns of identity experts are experts here. No tokens: loss and gradient are 0.
"""

import torch

from moe_ref.contract.errors import UsageTypeError, positive_faults, raise_faults
from moe_ref.contract.spec import Router
from moe_ref.oracle.backward.mlp import softcap_slope
from moe_ref.oracle.router import capped, sigmoid, softplus

LOW = -40.0
"""Below it softplus(z) is exp(z) within a rounding: the two differ by less than exp(z) / 2 < 2^-58 of either."""


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
    counts the best K by s alone, without selection bias and groups; the caller chooses with ids_TK. Raises
    UsageValueError too unless the router has as many choices as the logits columns.
    """
    length = _checked_length(logits_TE, ids_TK, router, sequence_length)
    share_BE = _sequence_shares(logits_TE, ids_TK, length)
    normed_TE = torch.softmax(_log_score(logits_TE, router), dim=-1)
    if not len(logits_TE):
        return normed_TE.sum()
    return (share_BE * normed_TE.unflatten(0, (-1, length)).mean(1)).sum() / len(share_BE)


@torch.no_grad()
def sequence_balance_gradient(logits_TE: torch.Tensor, ids_TK: torch.Tensor, router: Router,
                              sequence_length: int | None = None) -> torch.Tensor:
    """Gradient of sequence_balance_loss, (T, E): of log s_e it is n_e (f_e - sum over j of f_j n_j) / T, and the
    slope of log s_e follows, with that of the cap and the scale."""
    length = _checked_length(logits_TE, ids_TK, router, sequence_length)
    share_TE = _sequence_shares(logits_TE, ids_TK, length).repeat_interleave(length, 0)[:len(logits_TE)]
    normed_TE = torch.softmax(_log_score(logits_TE, router), dim=-1)
    grad_TE = normed_TE * (share_TE - (share_TE * normed_TE).sum(-1, keepdim=True)) / max(1, len(logits_TE))
    grad_TE = grad_TE * _log_score_slope(capped(logits_TE.double(), router), router)
    if router.logit_softcap:
        grad_TE = grad_TE * softcap_slope(logits_TE.double() * router.logit_scale, router.logit_softcap)
    return grad_TE * router.logit_scale


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


def _log_score(logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """log of router.score, (T, E), up to a number per token: softmax(z) has log z, sigmoid(z) -softplus(-z),
    sqrt(softplus(z)) log(softplus(z)) / 2, z being the capped logits."""
    capped_TE = capped(logits_TE.double(), router)
    if router.score == "softmax":
        return capped_TE
    if router.score == "sigmoid":
        return -softplus(-capped_TE)
    return torch.where(capped_TE < LOW, capped_TE, torch.log(softplus(capped_TE.clamp(min=LOW)))) / 2


def _log_score_slope(capped_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """Derivative of _log_score by z: 1, sigmoid(-z), or sigmoid(z) / (2 softplus(z)), which is 1/2 far below 0."""
    if router.score == "softmax":
        return torch.ones_like(capped_TE)
    if router.score == "sigmoid":
        return sigmoid(-capped_TE)
    bounded_TE = capped_TE.clamp(min=LOW)
    return torch.where(capped_TE < LOW, 0.5, sigmoid(bounded_TE) / (2 * softplus(bounded_TE)))


def _shares(logits_TE: torch.Tensor, ids_TK: torch.Tensor,
            mask_T: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """f (E,) and each token's part of a mean (T,): mask / number of tokens that count."""
    _check(logits_TE, ids_TK, mask_T)
    mask_T = torch.ones_like(logits_TE[:, 0], dtype=torch.float64) if mask_T is None else mask_T.double()
    total = mask_T.sum()
    mean_T = mask_T / torch.where(total > 0, total, 1.0)
    return (_slots(ids_TK, logits_TE.shape[1]) * mean_T[:, None]).sum(0), mean_T


def _checked_length(logits_TE: torch.Tensor, ids_TK: torch.Tensor, router: Router,
                    sequence_length: int | None) -> int:
    """L; raises unless everything that a sequence-wise loss takes fits together."""
    _check(logits_TE, ids_TK)
    if not isinstance(router, Router):
        raise UsageTypeError(f"router={router!r}, but should be a Router")
    tokens, experts = logits_TE.shape
    length = max(1, tokens) if sequence_length is None else sequence_length
    faults = positive_faults(sequence_length=length)
    if not faults and tokens % length:
        faults.append(f"sequence_length={length}, but should divide the number of tokens, {tokens}")
    if experts != router.num_choices:
        faults.append(f"logits_TE: {experts} columns, but should be one per choice of the router, "
                      f"{router.num_choices}")
    raise_faults("losses", faults)
    return length


def _sequence_shares(logits_TE: torch.Tensor, ids_TK: torch.Tensor, length: int) -> torch.Tensor:
    """f of every sequence of `length` tokens, (B, E)."""
    experts, slots = logits_TE.shape[1], ids_TK.shape[1]
    if not len(logits_TE):
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
    if ids_TK is not None and (ids_TK.dim() != 2 or len(ids_TK) != tokens or ids_TK.dtype.is_floating_point
                               or not ids_TK.shape[1]):
        faults.append(f"ids_TK: shape {tuple(ids_TK.shape)} of {ids_TK.dtype}, "
                      f"but should be ({tokens}, K) integers with K of at least 1")
    if mask_T is not None and tuple(mask_T.shape) != (tokens,):
        faults.append(f"mask_T: shape {tuple(mask_T.shape)}, but should be ({tokens},)")
    raise_faults("losses", faults)
