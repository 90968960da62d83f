"""Parameters that ranks hold whole beside parts of others: biases, each added once to what ranks add up.

Every rank gets the gradient of complete rows, and the gradient of a bias is a sum of those, whatever the bias is here:
so it is complete where the bias was replaced by zeros as well, and needs no collective over these ranks.
"""

import torch
from torch.autograd.function import once_differentiable

from moe_fast.held import Held
from moe_ref.contract.collectives import enter
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec


class _Zeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return gradient


def routed_bias(weights: Held, rank: Rank) -> torch.Tensor | None:
    """w2_bias_EH as this rank adds it: the first one of the ranks that hold parts of w2, or each its own columns."""
    bias_EH = weights.w2_bias_EH
    return bias_EH if bias_EH is None or rank.by_output or rank.tp.rank == 0 else _Zeros.apply(bias_EH)


def shared_bias(weights: Held, rank: Rank) -> torch.Tensor | None:
    """shared_w2_bias_H as this rank adds it to a shared expert that is cut."""
    bias_H = weights.shared_w2_bias_H
    return bias_H if bias_H is None or rank.by_output or rank.adds_what_is_whole else _Zeros.apply(bias_H)


def output_bias(weights: Held, spec: MoESpec, rank: Rank) -> torch.Tensor | None:
    """The output's bias as this rank adds it to the merge; None where a whole shared expert is added before it."""
    bias_H = weights.output_bias_H
    if bias_H is None or rank.whole_shared:
        return None
    if rank.by_output:
        start, stop = rank.outputs(spec.hidden_size)
        return enter(bias_H, rank.tp, rank.ep)[start:stop]
    bias_H = enter(bias_H, rank.ep) if rank.over_ep else bias_H
    return bias_H if rank.by_slot or rank.adds_what_is_whole else _Zeros.apply(bias_H)


def with_whole_shared(y_TH: torch.Tensor, shared_TH: torch.Tensor | None, weights: Held, spec: MoESpec,
                      rank: Rank) -> torch.Tensor:
    """The completed sum, a shared expert that is whole on every rank, and what follows it: the mean, and the bias."""
    if shared_TH is not None:
        y_TH = y_TH + shared_TH
    if takes_mean(spec):
        y_TH = y_TH * 0.5
    if weights.output_bias_H is None:
        return y_TH
    return y_TH + enter(weights.output_bias_H, *rank.with_other_tokens)


def takes_mean(spec: MoESpec) -> bool:
    """Whether the result is half of routed plus shared experts."""
    return spec.shared is not None and spec.shared.merge == "mean"
