"""The loop over experts: rows of one after the other, weighted and added up.

    for each expert e that this rank hosts:
        rows = the (token, slot) pairs that it serves
        y[token] += weights[token, slot] * expert_e(x[token])         (or expert_e(weights * x), Llama 4)
"""

from dataclasses import dataclass

import torch

from moe_ref.contract.collectives import enter, once
from moe_ref.contract.rank import Rank
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import EXPERT_PARAMETERS, ExpertWeights, WeightSource, check_expert
from moe_ref.oracle import expert as formula
from moe_ref.oracle.rows import RoutedRows
from moe_ref.oracle.tokens import GroupTokens


@dataclass(frozen=True)
class Slots:
    """What this rank computes: tokens and routing weights in fp64, and the expert of each slot.

    local_TK: the expert's index in this rank's weights, -1 where the slot has none here. place_TK: the row of the sum
    that a slot is added to, out of num_places.
    """

    x_TH: torch.Tensor
    local_TK: torch.Tensor
    weights_TK: torch.Tensor
    place_TK: torch.Tensor
    num_places: int


def places(ids_TK: torch.Tensor, by_slot: bool) -> tuple[torch.Tensor, int]:
    """A row of the sum for each token, or for each slot; and how many there are."""
    num_tokens, top_k = ids_TK.shape
    place_R = torch.arange(ids_TK.numel(), device=ids_TK.device)
    if by_slot:
        return place_R.view(num_tokens, top_k), num_tokens * top_k
    return (place_R // top_k).view(num_tokens, top_k), num_tokens


def tie(slots: Slots, weights: WeightSource) -> torch.Tensor:
    """0, hanging on tokens, routing weights and, where no slot is served, on the experts' parameters.

    A rank without a row then still takes part in the collectives of the backward pass, and has gradients of zero.
    """
    zero = slots.x_TH[:0].sum() + slots.weights_TK[:0].sum()
    if bool((slots.local_TK >= 0).any()):
        return zero
    for name in EXPERT_PARAMETERS:
        if (tensor := getattr(weights, name, None)) is not None:
            zero = zero + tensor[:0].double().sum()
    return zero


def expert_sums(slots: Slots, weights: WeightSource, spec: MoESpec, rank: Rank, zero: torch.Tensor,
                rows: RoutedRows) -> torch.Tensor:
    """Weighted rows of the experts that this rank hosts, added up by place: (num_places, H), a partial sum over tp."""
    y_PH = torch.zeros(slots.num_places, spec.hidden_size, dtype=torch.float64, device=slots.x_TH.device) + zero
    for e in range(num_hosted(spec, rank)):
        token_R, slot_R = (slots.local_TK == e).nonzero(as_tuple=True)
        if len(token_R) == 0:
            continue
        expert = hosted_expert(e, weights, spec, rank)
        w_R1 = slots.weights_TK[token_R, slot_R, None]
        gate_up_RGI, act_RI = projected(slots.x_TH[token_R], w_R1, expert, spec)
        down_RH = formula.down(act_RI, expert.w2_HI)
        if expert.w2_bias_H is not None:
            down_RH = down_RH + once(enter(expert.w2_bias_H.double(), rank.tp), rank.tp.rank == 0)
        down_RH = weighted(down_RH, w_R1, spec)
        y_PH.index_add_(0, slots.place_TK[token_R, slot_R], down_RH)
        rows.keep(token_R, slot_R, gate_up=gate_up_RGI, act=act_RI, down=down_RH)
    return y_PH


def num_hosted(spec: MoESpec, rank: Rank) -> int:
    """Experts in this rank's weights, copies included."""
    return len(rank.parallel.hosted(spec.num_experts)[rank.ep.rank])


def hosted_expert(e: int, weights: WeightSource, spec: MoESpec, rank: Rank) -> ExpertWeights:
    """Expert e of this rank's weights, its shapes checked."""
    return check_expert(weights.expert(e), spec, rank.parallel, rank.groups.rank, e)


def projected(x_RH: torch.Tensor, w_R1: torch.Tensor, expert: ExpertWeights,
              spec: MoESpec) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up (R, G, I) and act (R, I) of an expert's rows, weighted before where the spec says so."""
    in_RH = x_RH * w_R1 if spec.weight_on == "input" else x_RH
    gate_up_RGI = formula.gate_up(in_RH, expert.w13_GIH, expert.w13_bias_GI)
    return gate_up_RGI, formula.activate(gate_up_RGI, spec.experts)


def weighted(down_RH: torch.Tensor, w_R1: torch.Tensor, spec: MoESpec) -> torch.Tensor:
    """An expert's output times its routing weight, unless that multiplied the input."""
    return down_RH if spec.weight_on == "input" else w_R1 * down_RH


def add_identity(y_PH: torch.Tensor, tokens: GroupTokens, place_TK: torch.Tensor, spec: MoESpec, rank: Rank,
                 rows: RoutedRows | None) -> None:
    """Identity experts return the token: added by one of the ranks with partial sums, or each rank's own columns."""
    start, stop = rank.outputs(spec.hidden_size)
    for e in range(spec.num_experts, spec.num_choices):
        token_R, slot_R = (tokens.ids_TK == e).nonzero(as_tuple=True)
        if len(token_R) == 0:
            continue
        down_RH = tokens.weights_TK[token_R, slot_R, None] * tokens.x_TH[token_R, start:stop]
        if not rank.by_output:
            down_RH = once(down_RH, rank.adds_what_is_whole)
        y_PH.index_add_(0, place_TK[token_R, slot_R], down_RH)
        if rows is not None:
            rows.keep(token_R, slot_R, down=down_RH)
