"""Layers with one fault each in the products of routed experts, their weights, or their merge."""

from collections.abc import Iterable
from typing import Any

import torch

from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.verify.diagnosis.blocks import blocks, without_last
from moe_ref.verify.diagnosis.known import Known
from moe_ref.verify.diagnosis.layer import Layer


class Zeros(Layer):
    words = "zeros where numbers should be"
    first = Stage.GATE_UP
    local = "row"

    def gate_up(self) -> torch.Tensor:
        return torch.zeros_like(super().gate_up())

    def act(self) -> torch.Tensor:
        return torch.zeros_like(super().act())

    def down(self) -> torch.Tensor:
        return torch.zeros_like(super().down())

    def merged(self) -> torch.Tensor:
        return torch.zeros_like(super().merged())

    def reduced(self) -> torch.Tensor:
        return torch.zeros_like(super().reduced())


class GateUpExchanged(Layer):
    words = "D01 gate and up exchanged"
    first = Stage.GATE_UP
    local = "expert"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * known.case.problem.spec.experts.gated

    def gate_up(self) -> torch.Tensor:
        return super().gate_up().flip(1)

    def fed_gate_up(self) -> torch.Tensor:
        rows = super().fed_gate_up()
        return rows.flip(1) if Stage.GATE_UP in self.known.given else rows


class LastBlockOfH(Layer):
    words = "last {} columns of K left out of gate and up"
    first = Stage.GATE_UP
    local = "expert"
    in_tiles = True

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return blocks(known.case.problem.spec.hidden_size)

    def fed_tokens(self, row_R: torch.Tensor) -> torch.Tensor:
        return without_last(super().fed_tokens(row_R), self.variant)


class LastBlockOfI(Layer):
    words = "last {} columns of K left out of the down product"
    first = Stage.DOWN
    local = "expert"
    in_tiles = True

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        widths = {stop - start for start, stop in known.case.parallel.ranges(known.case.problem.spec.intermediate_size)}
        return sorted({block for width in widths for block in blocks(width)})

    def inner(self, share: RankShare) -> tuple[int, int]:
        start, stop = super().inner(share)
        return start, max(start, stop - self.variant)


class ProjectionBiasDropped(Layer):
    words = "bias of gate and up left out"
    first = Stage.GATE_UP
    local = "expert"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * known.case.problem.spec.experts.bias

    def weights_of(self, expert: int) -> ExpertWeights:
        return super().weights_of(expert)._replace(w13_bias_GI=None)


class DownBiasDropped(Layer):
    words = "bias of w2 left out"
    first = Stage.DOWN
    local = "expert"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * known.case.problem.spec.experts.bias

    def adds_bias(self, share: RankShare) -> bool:
        return False


class EveryCopyServes(Layer):
    words = "rows added by every copy of an expert"
    first = Stage.DOWN

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * bool(known.case.parallel.redundant)

    def down(self) -> torch.Tensor:
        parts = super().down()
        for e, row_R in self.rows_of:
            parts[:, row_R] *= 1 + self.parallel.redundant.count(e)
        return parts


class NeighbouringExpert(Layer):
    """Variants: how far the neighbour is, and whether it lends all its weights or w2 alone."""

    words = "K03 rows computed with a neighbouring expert"
    first = Stage.GATE_UP
    local = "row"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        if known.case.problem.spec.num_experts == 1:
            return ()
        return [(step, whole) for step in (1, -1) for whole in (True, False)]

    def weights_of(self, expert: int) -> ExpertWeights:
        step, whole = self.variant
        other = super().weights_of((expert + step) % self.spec.num_experts)
        return other if whole else super().weights_of(expert)._replace(w2_HI=other.w2_HI)


class WeightOnTheOtherSide(Layer):
    words = "E02 routing weight on the expert's {}"
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        spec = known.case.problem.spec
        return ("output" if spec.weight_on == "input" else "input",) * (spec.router is not None)

    @property
    def on_input(self) -> bool:
        return self.spec.weight_on != "input"


class WeightOnGateAndUp(Layer):
    words = "E02 routing weight on gate and up, before the activation"
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        spec = known.case.problem.spec
        # Without biases it is the weight on the input.
        return (None,) * (spec.router is not None and spec.experts.bias)

    def gate_up(self) -> torch.Tensor:
        return super().gate_up() * self.row_weight_R1[..., None]

    def weighs_at(self, step: str) -> bool:
        return False


class WeightTwice(Layer):
    words = "routing weight applied twice"
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return ("rows", "merge") if known.case.problem.spec.router is not None else ()

    def row_weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        return weights_TK**2 if self.variant == "rows" else weights_TK

    def slots(self, rows_PTKH: torch.Tensor) -> torch.Tensor:
        return rows_PTKH * self.stage(Stage.WEIGHTS)[..., None] if self.variant == "merge" else rows_PTKH


class WeightNotApplied(Layer):
    words = "E03 routing weight not applied"
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.problem.spec.router is not None)

    def row_weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(weights_TK)


class WeightOfToken(Layer):
    words = "K02 routing weights read by token, not by slot"
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.problem.spec.top_k > 1)

    def row_weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        return weights_TK.flatten()[:len(weights_TK), None].expand_as(weights_TK)


class RowDividedTwice(Layer):
    words = "K01 rows of the activation read at slot / top_k"
    first = Stage.DOWN

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.problem.spec.top_k > 1)

    def fed_act(self, row_R: torch.Tensor) -> torch.Tensor:
        return super().fed_act(row_R // self.spec.top_k)


class SlotsLeftOut(Layer):
    words = "only the first {} of the top-k experts added up"
    first = Stage.MERGED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        top_k = known.case.problem.spec.top_k
        return sorted({1, top_k - 1}) if top_k > 1 else ()

    def slots(self, rows_PTKH: torch.Tensor) -> torch.Tensor:
        rows_PTKH = rows_PTKH.clone()
        rows_PTKH[:, :, self.variant:] = 0.0
        return rows_PTKH


class IdentityUnweighted(Layer):
    words = "identity experts that return the token unweighted"
    first = Stage.DOWN

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.problem.spec.num_choices > known.case.problem.spec.num_experts)

    def with_identity(self, parts: torch.Tensor) -> torch.Tensor:
        weights_R1, self.row_weight_R1 = self.row_weight_R1, torch.ones_like(self.row_weight_R1)
        parts = super().with_identity(parts)
        self.row_weight_R1 = weights_R1
        return parts


EXPERT_FAULTS: tuple[type[Layer], ...] = (
    Zeros, GateUpExchanged, LastBlockOfH, LastBlockOfI, ProjectionBiasDropped, DownBiasDropped, EveryCopyServes,
    NeighbouringExpert, WeightOnTheOtherSide, WeightOnGateAndUp, WeightTwice, WeightNotApplied, WeightOfToken,
    RowDividedTwice, SlotsLeftOut, IdentityUnweighted)
