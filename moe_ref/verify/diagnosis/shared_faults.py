"""Layers with one fault each in the shared expert, or in how it joins the routed ones."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import SharedPlacement, Stage
from moe_ref.verify.diagnosis.known import Known
from moe_ref.verify.diagnosis.layer import Layer


class SharedFault(Layer):
    """Faults of layers with a shared expert."""

    first = Stage.SHARED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        return (None,) * (known.case.problem.spec.shared is not None)


class SharedLeftOut(SharedFault):
    words = "shared expert left out"

    def shared(self) -> torch.Tensor:
        return torch.zeros_like(super().shared())

    def shared_part(self) -> torch.Tensor:
        return torch.zeros_like(super().shared_part())

    def late_shared(self) -> torch.Tensor:
        return torch.zeros_like(super().late_shared())


class SharedLimitedAsRouted(SharedFault):
    words = "shared expert computed with the limits of the routed ones"

    def shared_mlp(self, mlp: MLP) -> MLP:
        experts = self.spec.experts
        return replace(mlp, limit=experts.limit, limit_at=experts.limit_at) if not mlp.gate_softcap else mlp


class GatesExchanged(SharedFault):
    words = "weights of shared experts in reverse order"

    def gates(self) -> torch.Tensor | None:
        gate_TS = super().gates()
        return None if gate_TS is None else gate_TS.flip(1)


class MeanAsSum(SharedFault):
    words = "routed and shared rows added, not averaged"
    first = Stage.MERGED

    def averaged(self, total: torch.Tensor) -> torch.Tensor:
        return total


class ScaleOnShared(SharedFault):
    words = "B21 shared expert times {:.3g} by the scaling factor"
    first = Stage.MERGED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        router = known.case.problem.spec.router
        scaled = router is not None and router.scaling_factor != 1.0
        return (router.scaling_factor, 1 / router.scaling_factor) if scaled else ()  # pyrefly: ignore

    def shared_part(self) -> torch.Tensor:
        return super().shared_part() * self.variant

    def late_shared(self) -> torch.Tensor:
        return super().late_shared() * self.variant


class SharedTwice(SharedFault):
    """Variants: each rank's part as often as there are ranks, or the sum of all parts on each rank."""

    words = "F03 shared expert reduced twice"
    first = Stage.SHARED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        beside = known.case.problem.spec.shared is not None and known.case.parallel.size > 1
        return ("times", "sum", "before") if beside else ()

    def shared(self) -> torch.Tensor:
        return self.of_all(super().shared()) if self.variant == "before" else super().shared()

    def shared_part(self) -> torch.Tensor:
        part_PTH = super().shared_part()
        if self.variant == "times":
            return part_PTH * (self.parallel.tp if self.parallel.tokens.over_ep else self.parallel.size)
        return self.of_all(part_PTH) if self.variant == "sum" else part_PTH

    def of_all(self, part_PTH: torch.Tensor) -> torch.Tensor:
        total_TH = part_PTH.sum(0)
        whole_PTH = torch.zeros_like(part_PTH)
        for share in self.shares:
            whole_PTH[share.rank, slice(*share.merged_tokens)] = total_TH[slice(*share.merged_tokens)]
        return whole_PTH


class WholeSharedInSums(SharedFault):
    words = "F06 whole shared expert in the sum of every rank"
    first = Stage.MERGED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        parallel, spec = known.case.parallel, known.case.problem.spec
        placed = parallel.shared is SharedPlacement.REPLICATED
        return (None,) * (spec.shared is not None and parallel.size > 1 and placed)

    def joined(self, sums_PTH: torch.Tensor) -> torch.Tensor:
        return super().joined(sums_PTH + self.stage(Stage.SHARED))

    def late_shared(self) -> torch.Tensor:
        return torch.zeros_like(super().late_shared())


class SharedNotReduced(SharedFault):
    words = "F05 shared expert left as a partial sum"
    first = Stage.MERGED

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        parallel, spec = known.case.parallel, known.case.problem.spec
        placed = parallel.shared is SharedPlacement.SHARDED
        return (None,) * (spec.shared is not None and parallel.size > 1 and placed)

    def shared_part(self) -> torch.Tensor:
        return torch.zeros_like(super().shared_part())

    def reduced(self) -> torch.Tensor:
        return super().reduced() + self.averaged(super().shared_part())


SHARED_FAULTS: tuple[type[Layer], ...] = (
    SharedLeftOut, SharedLimitedAsRouted, GatesExchanged, MeanAsSum, ScaleOnShared, SharedTwice, WholeSharedInSums,
    SharedNotReduced)
