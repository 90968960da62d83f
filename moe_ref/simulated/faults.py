"""Planted faults of precision and structure: what a wrong layer does in place of the right one, and where."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.numerics.formats import round_to, unit_in_last_place
from moe_ref.numerics.summation import matmul as ordered_matmul
from moe_ref.numerics.summation import truncating_matmul
from moe_ref.simulated.fault import Fault, Matmul, Product
from moe_ref.simulated.reduction import Reduction

BLOCK = 64
"""Terms that a faulty kernel loses, or adds up before its accumulator takes them."""


def _stores_narrow(numerics: Numerics, stage: Stage) -> bool:
    """Whether a stage is stored in fewer bits than it is computed in."""
    return numerics.storage.get(stage, Format.FP32) not in (Format.FP32, Format.FP64)


@dataclass(frozen=True)
class LastBlockDropped(Fault):
    """The last 64 terms (half of them in narrow layers) of gate and up are lost, in every expert or in one."""

    name: ClassVar[str] = "last_block_dropped"
    stage: ClassVar[Stage] = Stage.GATE_UP
    expert: int | None = None

    def product(self, matmul: Matmul, a_RK: torch.Tensor, b_KN: torch.Tensor, of: Product) -> torch.Tensor:
        if of.stage is not Stage.GATE_UP or self.expert not in (None, of.expert):
            return matmul(a_RK, b_KN)
        kept = _kept_terms(len(b_KN))
        return matmul(a_RK[:, :kept], b_KN[:kept])


@dataclass(frozen=True)
class LastBlockDroppedOfOneExpert(LastBlockDropped):
    """The same in one expert alone."""

    name: ClassVar[str] = "last_block_dropped_one_expert"
    expert: int | None = 0


@dataclass(frozen=True)
class LastBlockDroppedOfOneTile(Fault):
    """The same in the last 16 columns of one expert's up projection."""

    name: ClassVar[str] = "last_block_dropped_one_tile"
    stage: ClassVar[Stage] = Stage.GATE_UP
    expert: int = 0

    def product(self, matmul: Matmul, a_RK: torch.Tensor, b_KN: torch.Tensor, of: Product) -> torch.Tensor:
        whole_RN = matmul(a_RK, b_KN)
        if of.stage is Stage.GATE_UP and of.expert == self.expert:
            kept = _kept_terms(len(b_KN))
            whole_RN[:, -16:] = matmul(a_RK[:, :kept], b_KN[:kept, -16:])
        return whole_RN


def _kept_terms(terms: int) -> int:
    """Terms left of a sum that lost its last block."""
    return terms - min(BLOCK, -(-terms // 2))


@dataclass(frozen=True)
class AnotherProduct(Fault):
    """Both products of every expert are computed by another machine."""

    stage: ClassVar[Stage] = Stage.GATE_UP
    machine: ClassVar[Matmul]

    def product(self, matmul: Matmul, a_RK: torch.Tensor, b_KN: torch.Tensor, of: Product) -> torch.Tensor:
        return type(self).machine(a_RK, b_KN)


@dataclass(frozen=True)
class AccumulatedInBF16(AnotherProduct):
    """The running total is rounded to bf16 after every 64 terms, which are added in fp32."""

    name: ClassVar[str] = "accumulated_in_bf16"
    machine: ClassVar[Matmul] = partial(ordered_matmul, order="blocked", fmt=Format.BF16, inside=Format.FP32,
                                        block=BLOCK)


@dataclass(frozen=True)
class AccumulatedInFP16(AnotherProduct):
    """The running total is rounded to fp16 after every 16 terms, as an fp16 accumulator of a tensor core is."""

    name: ClassVar[str] = "accumulated_in_fp16"
    machine: ClassVar[Matmul] = partial(ordered_matmul, order="blocked", fmt=Format.FP16, inside=Format.FP32, block=16)


@dataclass(frozen=True)
class AccumulationTruncated(AnotherProduct):
    """The running total is cut off to fp32 after every 16 terms: right on hardware that declares it, else not.

    Of 16-bit operands short sums are exact, and the same; it grows with the number of terms.
    """

    name: ClassVar[str] = "accumulation_truncated"
    machine: ClassVar[Matmul] = partial(truncating_matmul, products_per_step=16)


@dataclass(frozen=True)
class OperandsInTF32(Fault):
    """Both operands of both products keep 11 significant bits, rounded."""

    name: ClassVar[str] = "tf32_operands_rounded"
    stage: ClassVar[Stage] = Stage.GATE_UP
    mode: ClassVar[Literal["nearest", "truncate"]] = "nearest"

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return case.problem.dtype is Dtype.FP32

    def product(self, matmul: Matmul, a_RK: torch.Tensor, b_KN: torch.Tensor, of: Product) -> torch.Tensor:
        return matmul(*(round_to(one, Format.TF32, self.mode) for one in (a_RK, b_KN)))


@dataclass(frozen=True)
class OperandsCutToTF32(OperandsInTF32):
    """The same, cut off."""

    name: ClassVar[str] = "tf32_operands_truncated"
    mode: ClassVar[Literal["nearest", "truncate"]] = "truncate"


@dataclass(frozen=True)
class OneWeightOff(Fault):
    """The routing weight of one slot is larger by one bf16 ulp."""

    name: ClassVar[str] = "one_weight_off_by_a_bf16_ulp"
    stage: ClassVar[Stage] = Stage.DOWN
    token: int = 0
    slot: int = 0

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return case.problem.num_tokens > self.token

    def weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        weights_TK = weights_TK.clone()
        one = weights_TK[self.token:self.token + 1, self.slot]
        weights_TK[self.token:self.token + 1, self.slot] = one + unit_in_last_place(one, Format.BF16)
        return weights_TK


@dataclass(frozen=True)
class WeightsInBF16(Fault):
    """Routing weights are rounded to bf16 before rows are multiplied with them."""

    name: ClassVar[str] = "weights_rounded_to_bf16"
    stage: ClassVar[Stage] = Stage.DOWN

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return case.problem.spec.router is not None and numerics.storage.get(Stage.WEIGHTS) is not Format.BF16

    def weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        return round_to(weights_TK, Format.BF16)


@dataclass(frozen=True)
class ActivationNotRounded(Fault):
    """The down product takes the activation before its store, as a fused kernel would; what is shown was stored."""

    name: ClassVar[str] = "activation_not_rounded"
    stage: ClassVar[Stage] = Stage.DOWN

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return _stores_narrow(numerics, Stage.ACT)

    def fed(self, act_RI: torch.Tensor, stored_RI: torch.Tensor) -> torch.Tensor:
        return round_to(act_RI, Format.FP32)


@dataclass(frozen=True)
class ActivationRoundedTwice(Fault):
    """activation(gate) is stored before it meets up, as two unfused kernels do."""

    name: ClassVar[str] = "activation_rounded_twice"
    stage: ClassVar[Stage] = Stage.ACT

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return _stores_narrow(numerics, Stage.ACT) and numerics.activation is None

    def factor(self, factor_RI: torch.Tensor, stored: Format) -> torch.Tensor:
        return round_to(factor_RI, stored)


@dataclass(frozen=True)
class StoreTruncated(Fault):
    """Down rows are cut off to their format, not rounded."""

    name: ClassVar[str] = "down_store_truncated"
    stage: ClassVar[Stage] = Stage.DOWN

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return _stores_narrow(numerics, self.stage)

    def store(self, value: torch.Tensor, stored: Format, stage: Stage) -> torch.Tensor:
        return round_to(value, stored, "truncate" if stage is self.stage else "nearest")


@dataclass(frozen=True)
class ActivationStoreTruncated(StoreTruncated):
    """Activations are."""

    name: ClassVar[str] = "activation_store_truncated"
    stage: ClassVar[Stage] = Stage.ACT


@dataclass(frozen=True)
class RowsRoundedTwice(Fault):
    """Down rows are stored before they are weighted, and once more after it."""

    name: ClassVar[str] = "rows_rounded_before_and_after_their_weight"
    stage: ClassVar[Stage] = Stage.DOWN

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return numerics.weight_at == "down" and _stores_narrow(numerics, Stage.DOWN)

    def row(self, row_RH: torch.Tensor, stored: Format) -> torch.Tensor:
        return round_to(row_RH, stored)


@dataclass(frozen=True)
class ColumnsSwapped(Fault):
    """Two neighbouring columns in the middle of the output have changed places."""

    name: ClassVar[str] = "columns_swapped"
    stage: ClassVar[Stage] = Stage.REDUCED

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return case.problem.spec.hidden_size > 1

    def output(self, y_TH: torch.Tensor) -> torch.Tensor:
        column = y_TH.shape[1] // 2
        y_TH = y_TH.clone()
        y_TH[:, [column - 1, column]] = y_TH[:, [column, column - 1]]
        return y_TH


@dataclass(frozen=True)
class PartialDropped(Fault):
    """One rank's part of one expert is missing from its sum."""

    name: ClassVar[str] = "partial_of_one_expert_dropped"
    stage: ClassVar[Stage] = Stage.DOWN
    expert: int = 0
    rank: int = 0

    def product(self, matmul: Matmul, a_RK: torch.Tensor, b_KN: torch.Tensor, of: Product) -> torch.Tensor:
        whole_RN = matmul(a_RK, b_KN)
        return torch.zeros_like(whole_RN) if of == Product(Stage.DOWN, self.expert, self.rank) else whole_RN


@dataclass(frozen=True)
class NeighbouringExpert(Fault):
    """One slot is computed with the next expert's weights."""

    name: ClassVar[str] = "neighbouring_expert"
    stage: ClassVar[Stage] = Stage.GATE_UP
    token: int = 0
    slot: int = 0

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return case.problem.spec.num_experts > 1 and case.problem.num_tokens > self.token

    def served(self, ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
        ids_TK = ids_TK.clone()
        ids_TK[self.token:self.token + 1, self.slot] += 1
        return ids_TK % num_experts


@dataclass(frozen=True)
class ReducedOnce(Fault):
    """Benign: ranks' sums are added without a rounding on the way, more accurately than a ring does."""

    name: ClassVar[str] = "reduced_once"
    stage: ClassVar[Stage] = Stage.REDUCED

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return case.parallel.tp > 2

    def reduction(self, reduction: Reduction) -> Reduction | None:
        return "once"


@dataclass(frozen=True)
class NotReduced(Fault):
    """The all-reduce is missing: every rank returns its own part."""

    name: ClassVar[str] = "all_reduce_missing"
    stage: ClassVar[Stage] = Stage.REDUCED

    def acts_on(self, case: Case, numerics: Numerics) -> bool:
        return case.parallel.tp > 1

    def reduction(self, reduction: Reduction) -> Reduction | None:
        return None


FAULTS: tuple[Fault, ...] = (
    ReducedOnce(), AccumulationTruncated(), LastBlockDropped(), LastBlockDroppedOfOneExpert(),
    LastBlockDroppedOfOneTile(), AccumulatedInBF16(), AccumulatedInFP16(), OneWeightOff(), WeightsInBF16(),
    ActivationNotRounded(), ActivationRoundedTwice(), StoreTruncated(), ColumnsSwapped(), PartialDropped(),
    NeighbouringExpert(), OperandsInTF32(), OperandsCutToTF32(), ActivationStoreTruncated(), RowsRoundedTwice(),
    NotReduced())
"""Every fault at its default place; the first is benign and must pass."""
