"""A down projection stored in act-order, turned into a plain layer that tensor parallelism can cut.

GPTQ with act-order (Frantar et al., arXiv 2210.17323) groups the input features of w2 by importance, and kernels store
them group by group, in an order perm of the expert's own:

    w2_stored[:, j] = w2[:, perm[j]]                      so y = act[:, perm] @ w2_stored^T

A row split of w2_stored needs activation columns that other ranks hold: a gather before the product. But act is made
column by column, so that the output features of w1 and w3 can be stored in the same order ("TP-Aware Dequantization",
Hoque et al., arXiv 2402.04925):

    w13_stored = w13[:, perm, :], b13_stored = b13[:, perm]      so act_stored = act[:, perm]

and the rank that has rows [a, b) of w13_stored has what columns [a, b) of w2_stored take: the plain split, with its one
all-reduce. The other way, Schedule.GATHER, gathers the activation anyway and could permute it there, for T*K*I elements
more on the wire.
"""

from dataclasses import replace

import torch

from moe_ref.contract.errors import UsageTypeError, raise_faults
from moe_ref.contract.weights import ExpertWeights, MoEWeights, WeightSource


def group_order(g_idx_I: torch.Tensor) -> torch.Tensor:
    """perm, int64, along the last axis: the input features group by group, each group in its old order.

    g_idx_I: the group of every input feature, (I,) or (E, I), integers, as GPTQ stores it (g_idx).
    """
    _check_integers("g_idx", g_idx_I)
    return torch.argsort(g_idx_I, dim=-1, stable=True)


def absorb_act_order(weights: MoEWeights, perm_EI: torch.Tensor,
                     shared_perm_I: torch.Tensor | None = None) -> MoEWeights:
    """The same layer with w1, w3 and their biases in the order in which w2 is stored; w2 stays as it is.

    weights: whole in I, of all experts or of those that a rank hosts, w2_EHI stored in the order perm_EI (E, I);
    they are cut afterwards. shared_perm_I: the order of the shared expert's w2; None: it is in its own. Where the
    router weighs several shared experts (gate="router") it must keep each in its block of columns. Raises
    UsageValueError with the expert and the numbers for what is no permutation, UsageTypeError for other types.
    """
    if not isinstance(weights, MoEWeights):
        raise UsageTypeError(f"weights: {type(weights).__name__}, but should be MoEWeights; a source goes into "
                             "ActOrderSource")
    _check_orders(perm_EI, shared_perm_I)
    _check_fit("w13_EGIH", (weights.w13_EGIH.shape[0], weights.w13_EGIH.shape[-2]), "perm_EI", tuple(perm_EI.shape))
    perm_EI = perm_EI.to(weights.w13_EGIH.device).long()
    changed = {"w13_EGIH": weights.w13_EGIH.gather(2, perm_EI[:, None, :, None].expand_as(weights.w13_EGIH))}
    if (bias_EGI := weights.w13_bias_EGI) is not None:
        changed["w13_bias_EGI"] = bias_EGI.gather(2, perm_EI[:, None, :].expand_as(bias_EGI))
    if shared := _absorb_shared(weights.shared_expert(), shared_perm_I):
        changed["shared_w13_GIH"] = shared.w13_GIH
        if shared.w13_bias_GI is not None:
            changed["shared_w13_bias_GI"] = shared.w13_bias_GI
    return replace(weights, **changed)


class ActOrderSource:
    """absorb_act_order on a WeightSource, one expert at a time: row e of perm_EI belongs to source.expert(e)."""

    def __init__(self, source: WeightSource, perm_EI: torch.Tensor,
                 shared_perm_I: torch.Tensor | None = None) -> None:
        _check_orders(perm_EI, shared_perm_I)
        if (held := getattr(source, "num_experts", len(perm_EI))) != len(perm_EI):
            raise_faults("perm_EI", [f"{len(perm_EI)} permutations, but the source has {held} experts"])
        self._source, self._perm_EI, self._shared_perm_I = source, perm_EI, shared_perm_I
        self.router_EH = source.router_EH
        self.router_bias_E = source.router_bias_E
        self.selection_bias_E = source.selection_bias_E
        self.weight_scale_E = source.weight_scale_E
        self.shared_gate_SH = source.shared_gate_SH
        self.output_bias_H = source.output_bias_H

    @property
    def num_experts(self) -> int:
        """How many experts the source has."""
        return len(self._perm_EI)

    def expert(self, e: int) -> ExpertWeights:
        """Expert e of the source, read now, its w13 and their bias copied in the order of its w2."""
        return _absorb(self._source.expert(e), self._perm_EI[e], f"perm_EI[{e}]")

    def shared_expert(self) -> ExpertWeights | None:
        """The shared expert in the same way, or None."""
        return _absorb_shared(self._source.shared_expert(), self._shared_perm_I)


def _absorb_shared(expert: ExpertWeights | None, perm_I: torch.Tensor | None) -> ExpertWeights | None:
    if perm_I is None:
        return expert
    if expert is None:
        raise_faults("shared_perm_I", [f"{len(perm_I)} features, but the layer has no shared expert"])
    assert expert is not None
    return _absorb(expert, perm_I, "shared_perm_I")


def _absorb(expert: ExpertWeights, perm_I: torch.Tensor, name: str) -> ExpertWeights:
    _check_fit("w13_GIH", (expert.w13_GIH.shape[-2],), name, tuple(perm_I.shape))
    perm_I, bias_GI = perm_I.to(expert.w13_GIH.device).long(), expert.w13_bias_GI
    return expert._replace(w13_GIH=expert.w13_GIH.index_select(1, perm_I),
                           w13_bias_GI=None if bias_GI is None else bias_GI.index_select(1, perm_I))


def _check_orders(perm_EI: torch.Tensor, shared_perm_I: torch.Tensor | None) -> None:
    _check_permutations("perm_EI", perm_EI, 2)
    if shared_perm_I is not None:
        _check_permutations("shared_perm_I", shared_perm_I, 1)


def _check_integers(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise UsageTypeError(f"{name}: {kind}, but should be a tensor of torch.int32 or torch.int64")


def _check_fit(name: str, held: tuple[int, ...], perm_name: str, given: tuple[int, ...]) -> None:
    if held != given:
        raise_faults(perm_name, [f"shape {given}, but should be {held} as {name} has it; the order is that of all "
                                 "columns, so absorb it before the weights are cut"])


def _check_permutations(name: str, perm: torch.Tensor, dims: int) -> None:
    """Raise unless every row holds each of 0 .. I - 1 once."""
    _check_integers(name, perm)
    if perm.dim() != dims:
        raise_faults(name, [f"shape {tuple(perm.shape)}, but should have {dims} dimensions"])
    rows_EI = perm.reshape(-1, perm.shape[-1])
    wrong_E = (rows_EI.sort(-1).values != torch.arange(perm.shape[-1], device=perm.device)).any(-1)
    raise_faults(name, [(f"expert {e}: " if dims == 2 else "") + _row_fault(rows_EI[e])
                        for e in wrong_E.nonzero().flatten().tolist()])


def _row_fault(perm_I: torch.Tensor) -> str:
    size, (values, counts) = len(perm_I), perm_I.unique(return_counts=True)
    found, often = values.tolist(), values[counts > 1].tolist()
    lists = {f"outside [0, {size})": [one for one in found if not 0 <= one < size], "more than once": often,
             "missing": sorted(set(range(size)).difference(found))}
    return "no permutation: " + ", ".join(
        f"{', '.join(map(str, numbers[:5]))}{', ...' if len(numbers) > 5 else ''} {word}"
        for word, numbers in lists.items() if numbers)
