"""The gather schedule: the whole activation on every rank, and w2 cut by output.

    act = all columns of activation(...)            one all-gather for the routed rows of all experts
    y[token] += weights[token, slot] * (act @ w2^T + b2)             this rank's columns of the output
"""

import torch

from moe_ref.contract.collectives import gather
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WeightSource
from moe_ref.oracle import expert as formula
from moe_ref.oracle.routed import Slots, hosted_expert, num_hosted, projected, weighted
from moe_ref.oracle.rows import RoutedRows


def all_columns(act_RI: torch.Tensor, rank: Rank) -> torch.Tensor:
    """The activation's columns of every tp rank, in order; they travel as rows of its transpose."""
    return torch.cat(gather(act_RI.T, rank.tp)).T


def gathered_sums(slots: Slots, weights: WeightSource, spec: MoESpec, rank: Rank, zero: torch.Tensor,
                  rows: RoutedRows) -> torch.Tensor:
    """Weighted rows of all experts added up by token, (T, H), complete in the columns that this rank makes."""
    top_k, options = slots.local_TK.shape[1], {"dtype": torch.float64, "device": slots.x_TH.device}
    (first, last), (start, stop) = rank.columns(spec.intermediate_size), rank.outputs(spec.hidden_size)
    act_RI = torch.zeros(slots.local_TK.numel(), last - first, **options) + zero
    served = [(slots.local_TK == e).nonzero(as_tuple=True) for e in range(num_hosted(spec, rank))]

    for e, (token_R, slot_R) in enumerate(served):
        if len(token_R):
            gate_up_RGI, act_of_e_RI = projected(slots.x_TH[token_R], slots.weights_TK[token_R, slot_R, None],
                                                 hosted_expert(e, weights, spec, rank), spec)
            act_RI.index_add_(0, token_R * top_k + slot_R, act_of_e_RI)
            rows.keep(token_R, slot_R, gate_up=gate_up_RGI, act=act_of_e_RI)
    act_RI = all_columns(act_RI, rank)
    y_TH = torch.zeros(slots.num_places, stop - start, **options) + act_RI[:0].sum()
    for e, (token_R, slot_R) in enumerate(served):
        if len(token_R):
            expert = hosted_expert(e, weights, spec, rank)
            down_RH = formula.down(act_RI[token_R * top_k + slot_R], expert.w2_HI)
            if expert.w2_bias_H is not None:
                down_RH = down_RH + expert.w2_bias_H.double()
            down_RH = weighted(down_RH, slots.weights_TK[token_R, slot_R, None], spec)
            y_TH.index_add_(0, slots.place_TK[token_R, slot_R], down_RH)
            rows.keep(token_R, slot_R, down=down_RH)
    return y_TH
