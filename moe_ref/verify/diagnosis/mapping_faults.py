"""Layers with one mistake each in how weights, routing or options are handed over: an adapter's, not a kernel's.

Those that a set-up case asks about beside the usual faults; which of the usual ones are an adapter's too is said here.
"""

from collections.abc import Iterable
from itertools import permutations
from typing import Any, NamedTuple

import torch

from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.oracle import router as routing
from moe_ref.verify.diagnosis import activation_faults, expert_faults, parallel_faults, router_faults, shared_faults
from moe_ref.verify.diagnosis.known import Known
from moe_ref.verify.diagnosis.layer import Layer
from moe_ref.verify.diagnosis.router_faults import OfRouter

MOST_PERMUTED = 4
"""Experts of which every order is tried."""


class AnotherW13(Layer):
    """Rows of gate and up as another memory holds them; variants: what becomes of one expert's w13_GIH."""

    first = Stage.GATE_UP

    @staticmethod
    def of(w13_GIH: torch.Tensor, variant: str) -> torch.Tensor:
        """The same numbers, otherwise."""
        raise NotImplementedError

    def weights_of(self, expert: int) -> ExpertWeights:
        held = super().weights_of(expert)
        return held._replace(w13_GIH=self.of(held.w13_GIH, self.variant))


class Interleaving(AnotherW13):
    """Both need a gate; a shard's rows are its own, so that several ranks say nothing new."""

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        alone = known.case.parallel.size == 1
        return ("gate first", "up first") * (known.case.problem.spec.experts.gated and alone)


class ReadInterleaved(Interleaving):
    words = "w13 read as alternating gate and up rows ({}), but handed as two halves"

    @staticmethod
    def of(w13_GIH: torch.Tensor, variant: str) -> torch.Tensor:
        rows_IGH = w13_GIH.reshape(w13_GIH.shape[1], 2, w13_GIH.shape[2])
        return (rows_IGH if variant == "gate first" else rows_IGH.flip(1)).transpose(0, 1)


class HandedInterleaved(Interleaving):
    words = "w13 handed as alternating gate and up rows ({}), but read as two halves"

    @staticmethod
    def of(w13_GIH: torch.Tensor, variant: str) -> torch.Tensor:
        pair_GIH = w13_GIH if variant == "gate first" else w13_GIH.flip(0)
        return pair_GIH.transpose(0, 1).reshape(w13_GIH.shape)


class W13NotTransposed(AnotherW13):
    words = "w13 handed as (out, in) where (in, out) is read, or the other way round{}"

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        spec, alone = known.case.problem.spec, known.case.parallel.size == 1
        rows = spec.experts.num_projections * spec.intermediate_size
        found = [""] * (rows == spec.hidden_size)
        found += [", gate and up each"] * (spec.intermediate_size == spec.hidden_size and spec.experts.gated)
        return [*found, ", by a view of its memory"] if alone else ()

    @staticmethod
    def of(w13_GIH: torch.Tensor, variant: str) -> torch.Tensor:
        if variant == ", gate and up each":
            return w13_GIH.transpose(1, 2)
        rows_NH = w13_GIH.flatten(0, 1)
        turned = rows_NH.T if not variant else rows_NH.reshape(rows_NH.shape[1], rows_NH.shape[0]).T
        return turned.reshape(w13_GIH.shape)


class W2NotTransposed(Layer):
    words = "w2 handed as (out, in) where (in, out) is read, or the other way round{}"
    first = Stage.DOWN

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        spec = known.case.problem.spec
        square = [""] * (spec.hidden_size == spec.intermediate_size)
        return [*square, ", by a view of its memory"] if known.case.parallel.size == 1 else ()

    @staticmethod
    def of(w2_HI: torch.Tensor, variant: str) -> torch.Tensor:
        """The same numbers, otherwise."""
        return w2_HI.T if not variant else w2_HI.reshape(w2_HI.shape[1], w2_HI.shape[0]).T

    def weights_of(self, expert: int) -> ExpertWeights:
        held = super().weights_of(expert)
        return held._replace(w2_HI=self.of(held.w2_HI, self.variant))


class BothMatricesOtherwise(Layer):
    """One mistake in each of the two: variants are a form of w13 and one of w2."""

    words = "{}"
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        turned = [(one, form) for one in (ReadInterleaved, HandedInterleaved, W13NotTransposed)
                  for form in one.variants(known)]
        swapped = [(None, "gate and up exchanged")] * known.case.problem.spec.experts.gated
        return [_Both(*one, form) for one in [*swapped, *turned] for form in W2NotTransposed.variants(known)]

    def weights_of(self, expert: int) -> ExpertWeights:
        both, held = self.variant, super().weights_of(expert)
        w13_GIH = held.w13_GIH.flip(0) if both.fault is None else both.fault.of(held.w13_GIH, both.form)
        return held._replace(w13_GIH=w13_GIH, w2_HI=W2NotTransposed.of(held.w2_HI, both.of_w2))


class _Both(NamedTuple):
    fault: type[AnotherW13] | None
    form: str
    of_w2: str

    def __format__(self, spec: str) -> str:
        first = self.fault.words.format(self.form) if self.fault else self.form
        return f"{first}; {W2NotTransposed.words.format(self.of_w2)}"


class BiasesExchanged(Layer):
    words = "biases of gate and up exchanged, or their rows alternating where halves are read"
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        experts = known.case.problem.spec.experts
        return ("exchanged", "read", "handed") if experts.bias and experts.gated else ()

    def weights_of(self, expert: int) -> ExpertWeights:
        held = super().weights_of(expert)
        assert held.w13_bias_GI is not None
        bias_GI = held.w13_bias_GI
        other = {"exchanged": bias_GI.flip(0), "read": bias_GI.reshape(-1, 2).T, "handed": bias_GI.T.reshape(2, -1)}
        return held._replace(w13_bias_GI=other[self.variant])


class ExpertsInOtherOrder(Layer):
    words = "experts in another order, {} for 0, 1, ..."
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        experts = tuple(range(known.case.problem.spec.num_experts))
        if len(experts) <= MOST_PERMUTED:
            return [order for order in permutations(experts) if order != experts]
        return [experts[::-1], (*experts[1:], experts[0]), (experts[-1], *experts[:-1])]

    def weights_of(self, expert: int) -> ExpertWeights:
        return super().weights_of(self.variant[expert])


class RoutingWeightsReversed(Layer):
    words = "routing weights in the reverse order of their ids"
    first = Stage.GATE_UP

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.problem.spec.top_k > 1)

    def row_weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        return weights_TK.flip(1)


class LogitsIgnored(OfRouter):
    words = "logits_TE ignored: those of its own router taken"
    first = Stage.LOGITS

    @classmethod
    def of(cls, router: Any, known: Known) -> Iterable[Any]:
        return (None,) * (known.inputs.logits_TE is not None)

    def logits(self) -> torch.Tensor:
        return routing.router_logits(self.tokens(), self.inputs.weights)


class RouterNotTransposed(OfRouter):
    words = "router handed as (out, in) where (in, out) is read, or the other way round, by a view of its memory"
    first = Stage.LOGITS

    @classmethod
    def of(cls, router: Any, known: Known) -> Iterable[Any]:
        return (None,) * (known.inputs.logits_TE is None)

    def logits(self) -> torch.Tensor:
        router_EH = self.inputs.weights.router_EH
        assert router_EH is not None
        turned_EH = router_EH.double().reshape(router_EH.shape[1], router_EH.shape[0]).T
        bias_E = self.inputs.weights.router_bias_E
        logits_TE = self.tokens() @ turned_EH.T
        return logits_TE if bias_E is None else logits_TE + bias_E.double()


MAPPING_FAULTS: tuple[type[Layer], ...] = (
    ReadInterleaved, HandedInterleaved, W13NotTransposed, W2NotTransposed, BothMatricesOtherwise, BiasesExchanged,
    ExpertsInOtherOrder, RoutingWeightsReversed, LogitsIgnored, RouterNotTransposed)

OF_ADAPTERS = frozenset({
    *MAPPING_FAULTS, *activation_faults.ACTIVATION_FAULTS, expert_faults.GateUpExchanged,
    expert_faults.ProjectionBiasDropped, expert_faults.DownBiasDropped, expert_faults.WeightOnTheOtherSide,
    expert_faults.WeightOnGateAndUp, expert_faults.WeightTwice, expert_faults.WeightNotApplied,
    router_faults.LogitBiasDropped, router_faults.SelectionBiasDropped,
    router_faults.BiasAtTheOtherPlace, router_faults.GroupsIgnored, router_faults.GroupFill, router_faults.GroupScore,
    router_faults.NotRenormalised, router_faults.Renormalised, router_faults.OtherEpsilon,
    router_faults.ScalingDropped, router_faults.ScalingTwice, router_faults.OtherScore,
    router_faults.LogitsNotCapped, router_faults.BiasInWeights, shared_faults.SharedLeftOut,
    shared_faults.ScaleOnShared, shared_faults.SharedTwice, parallel_faults.MergedAxisCutAsOne,
    parallel_faults.IdsNotShifted, parallel_faults.BiasTimesTP, parallel_faults.Residuals, parallel_faults.NotReduced,
    parallel_faults.ReducedTwice, parallel_faults.MeanForSum})
"""What code around a kernel gets wrong, everywhere alike. All others are of a kernel, or could be."""
