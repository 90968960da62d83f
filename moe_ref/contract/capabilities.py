"""What an implementation declares of itself: what it can do, what it promises, how it rounds. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from moe_ref.contract.case import Case
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Schedule, Stage


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """The rounding contract of a forward pass for one dtype; part of the record, never of the case id.

    storage: stage -> format its rows are rounded to (nearest, even) when stored; a stage left out is kept
    in registers and belongs to the group that ends at the next stored stage.
    accumulate: format of every long sum, in any order. reduce: format of partial sums between ranks.
    weight_at: "down": the routing weight multiplies in the down product's accumulator, before the store;
    "merge": down rows are stored without it and weighted, in the accumulation format, when they are summed.
    """

    storage: dict[Stage, Format]
    accumulate: Format = Format.FP32
    reduce: Format = Format.FP32
    weight_at: Literal["down", "merge"] = "down"


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Declared by a subject; what is not declared here is `unsupported`, never guessed.

    stages:                      the stages it records in `trace`, beyond the output
    deterministic:               the same bits whenever it is run again
    equal_ranks:                 every rank returns the same bits
    lower_id_ties:               exact ties go to the lower expert id
    collectives_through_groups:  it communicates through `groups` only, so calls can be counted
    """

    name: str
    version: str
    numerics: dict[Dtype, Numerics]
    stages: tuple[Stage, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    scores: tuple[str, ...] = ("softmax",)
    grouped_routing: bool = False
    selection_bias: bool = False
    shared_expert: bool = False
    dense: bool = False
    residual: bool = False
    max_tp: int = 1
    schedules: tuple[Schedule, ...] = (Schedule.ALL_REDUCE,)
    ranks: tuple[Ranks, ...] = (Ranks.LOCAL,)
    devices: tuple[str, ...] = ("cpu", "cuda")
    deterministic: bool = False
    equal_ranks: bool = False
    lower_id_ties: bool = False
    collectives_through_groups: bool = False

    def refusal(self, case: Case, ranks: Ranks, device: str) -> str | None:
        """Why `case` is not supported, or None when it is."""
        spec, router = case.problem.spec, case.problem.spec.router
        activations = [spec.experts.activation] + ([spec.shared.mlp.activation] if spec.shared else [])
        refused = [
            (case.problem.dtype not in self.numerics, f"dtype {case.problem.dtype}"),
            (case.parallel.tp > self.max_tp, f"tp {case.parallel.tp} above {self.max_tp}"),
            (case.parallel.ep > 1, f"ep {case.parallel.ep}"),
            (case.parallel.schedule not in self.schedules, f"schedule {case.parallel.schedule}"),
            (ranks not in self.ranks, f"{ranks} ranks"),
            (device not in self.devices, f"device {device}"),
            (router is None and not self.dense, "a layer without a router"),
            (router is not None and router.score not in self.scores, f"score {router and router.score}"),
            (router is not None and router.num_groups > 1 and not self.grouped_routing, "expert groups"),
            (router is not None and router.selection_bias and not self.selection_bias, "a selection bias"),
            (spec.shared is not None and not self.shared_expert, "a shared expert"),
            (case.problem.residual and not self.residual, "a residual"),
            *((activation not in self.activations, f"activation {activation}") for activation in activations),
        ]
        reasons = [reason for refuses, reason in refused if refuses]
        return "not declared: " + ", ".join(reasons) if reasons else None
