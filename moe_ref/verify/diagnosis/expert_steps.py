"""Routed experts in fp64, rows in (token, slot) order; every step a method that a fault replaces."""

from functools import cached_property

import torch

from moe_ref.contract.parallel import Range
from moe_ref.contract.shares import RankShare
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Schedule, Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.oracle import expert as formula
from moe_ref.verify.diagnosis.router_steps import RouterSteps


class ExpertSteps(RouterSteps):
    """From tokens and their routing to each tp rank's part of every routed row."""

    # Experts: rows in (token, slot) order.

    @cached_property
    def row_weight_R1(self) -> torch.Tensor:
        """The routing weight that a row is multiplied with."""
        return self.row_weights(self.stage(Stage.WEIGHTS)).reshape(-1, 1)

    def row_weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        return weights_TK

    @cached_property
    def rows_of(self) -> list[tuple[int, torch.Tensor]]:
        """Every routed expert with tokens, and its rows."""
        ids_R = self.stage(Stage.IDS).flatten()
        return [(e, row_R) for e in range(self.spec.num_experts) if len(row_R := (ids_R == e).nonzero().flatten())]

    @property
    def on_input(self) -> bool:
        return self.spec.weight_on == "input"

    def weights_of(self, expert: int) -> ExpertWeights:
        return self.known.experts[expert]

    def mlp(self, mlp: MLP) -> MLP:
        return mlp

    def gate_up(self) -> torch.Tensor:
        spec = self.spec
        rows = torch.zeros(self.stage(Stage.IDS).numel(), spec.experts.num_projections, spec.intermediate_size).double()
        for e, row_R in self.rows_of:
            rows[row_R] = self.project(self.fed_tokens(row_R), self.weights_of(e))
        return rows

    def fed_tokens(self, row_R: torch.Tensor) -> torch.Tensor:
        x_RH = self.tokens()[row_R // self.spec.top_k]
        return x_RH * self.row_weight_R1[row_R] if self.on_input else x_RH

    def project(self, x_RH: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        return formula.gate_up(x_RH, expert.w13_GIH, expert.w13_bias_GI)

    def act(self) -> torch.Tensor:
        rows = formula.activate(self.fed_gate_up(), self.mlp(self.spec.experts))
        rows = torch.where(self.has_row_R1, rows, 0.0)
        return rows * self.row_weight_R1 if self.weighs_at("act") else rows

    def fed_gate_up(self) -> torch.Tensor:
        return self.stage(Stage.GATE_UP)

    @cached_property
    def has_row_R1(self) -> torch.Tensor:
        ids_R1 = self.stage(Stage.IDS).reshape(-1, 1)
        return (ids_R1 >= 0) & (ids_R1 < self.spec.num_experts)

    def weighs_at(self, step: str) -> bool:
        return self.known.numerics.weight_at == step and not self.on_input

    @property
    def by_output(self) -> bool:
        return self.parallel.schedule is Schedule.GATHER

    def inner(self, share: RankShare) -> Range:
        """Columns of the activation that a rank multiplies with its w2."""
        return (0, self.spec.intermediate_size) if self.by_output else share.columns

    def down(self) -> torch.Tensor:
        parts = torch.zeros(self.parallel.tp, self.stage(Stage.IDS).numel(), self.spec.hidden_size, dtype=torch.float64)
        for e, row_R in self.rows_of:
            expert, act_RI = self.weights_of(e), self.fed_act(row_R)
            for share in self.shares[:self.parallel.tp]:
                inner, outputs = slice(*self.inner(share)), slice(*share.outputs)
                part_RH = act_RI[:, inner] @ expert.w2_HI[outputs, inner].T
                if expert.w2_bias_H is not None and self.adds_bias(share):
                    bias_H = expert.w2_bias_H[outputs]
                    part_RH = part_RH + (bias_H * self.row_weight_R1[row_R] if self.weighs_at("act") else bias_H)
                weighted = part_RH * self.row_weight_R1[row_R] if self.weighs_at("down") else part_RH
                parts[share.tp_rank, row_R, outputs] = weighted
        return self.with_identity(parts)

    def fed_act(self, row_R: torch.Tensor) -> torch.Tensor:
        return self.stage(Stage.ACT)[row_R]

    def adds_bias(self, share: RankShare) -> bool:
        return self.by_output or share.tp_rank == 0

    def with_identity(self, parts: torch.Tensor) -> torch.Tensor:
        """Rows of identity experts: rank 0's, or each rank's own columns."""
        ids_R, top_k = self.stage(Stage.IDS).flatten(), self.spec.top_k
        row_R = (ids_R >= self.spec.num_experts).nonzero().flatten()
        rows_RH = self.x_TH[row_R // top_k]
        if not self.weighs_at("merge"):
            rows_RH = rows_RH * self.row_weight_R1[row_R]
        for share in self.shares[:self.parallel.tp]:
            if self.adds_identity(share):
                columns = slice(*share.outputs)
                parts[share.tp_rank, row_R, columns] = rows_RH[:, columns]
        return parts

    def adds_identity(self, share: RankShare) -> bool:
        return self.by_output or share.tp_rank == 0
