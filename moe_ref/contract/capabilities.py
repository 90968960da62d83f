"""What an implementation declares of itself: what it can do, what it promises, how it rounds. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from moe_ref.contract.case import Case, Problem
from moe_ref.contract.exact import LONG_SUMS, NARROW
from moe_ref.contract.features import Feature, features_of, traits_of
from moe_ref.contract.schemes import cuts_blocks
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import (
    Data,
    Direction,
    Dtype,
    Format,
    Hosting,
    Pattern,
    Ranks,
    Schedule,
    Scheme,
    SharedPlacement,
    Stage,
    Storage,
    Tokens,
)

Products = Literal["exact", "tf32", "tf32x3", "mxfp8", "fp8_tensor", "fp8_row", "fp8_row_e8m0", "fp8_block", "int8_row"]
ROUNDED_OPERANDS: tuple[Products, ...] = ("mxfp8", "fp8_tensor", "fp8_row", "fp8_row_e8m0", "fp8_block", "int8_row")
"""Those that round operands to 8 bits under scales."""
ROUNDED_GRADIENTS: tuple[Products, ...] = ("fp8_row", "fp8_row_e8m0")
"""Those of them that say what the products of a backward pass multiply: one scale for each row along the sum."""
E4M3_OPERANDS: tuple[Products, ...] = ("mxfp8", "fp8_tensor", "fp8_row", "fp8_row_e8m0", "fp8_block")
"""Those of them whose codes are e4m3."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """The rounding contract of a forward pass for one dtype; part of the record, never of the case id.

    storage: stage -> format its rows are rounded to (nearest, even) when stored; a stage left out is kept
    in registers and belongs to the group that ends at the next stored stage.
    `permute` are the rows that the first product takes, where the routing weight is on the input.
    products: what long products of a layer in fp32 multiply: "exact", operands as they are; "tf32", rounded or cut to
    tf32 as the hardware does; "tf32x3", three products of tf32 parts. In any dtype "mxfp8": both
    operands of experts are rounded to e4m3 in blocks of 32 along the sum, each under its largest magnitude over 448,
    rounded up to a power of two; forward only. Of encoded weights the other operand alone is rounded. "fp8_row",
    "fp8_block", "int8_row": to e4m3, or to int8, under a scale in fp32 for every row that a rank holds, or for every
    128 of its columns: the largest magnitude over 448 or 127. "fp8_row_e8m0": as fp8_row, scales rounded up to a power
    of two. Of both the backward pass rounds the operands of each product anew, along its sum: docs/backward.md.
    "fp8_tensor": to e4m3 under the input scale that the weights name; what is beyond saturates.
    promoted_after: how many products in e4m3 a matrix unit adds up before their sum joins a register in fp32, since
    units for 8 bits may keep few bits of it; None: the whole sum is the unit's; 1: codes are decoded first, and
    multiplied in the case's dtype or wider.
    gradient_rows: of a backward pass that rounds operands: gate and up are columns of one product ("both"), or each has
    a product of its own.
    decoded: format to which the numbers that codes stand for are rounded before a product; None: codes are multiplied,
    their scales join exactly.
    accumulate: format of every long sum, in any order. reduce: format of partial sums between ranks.
    weight_at: "down": the routing weight multiplies in the down product's accumulator, before the store;
    "merge": down rows are stored without it and weighted when they are summed; "act": it multiplies the
    activation before that is stored, so that `act` and `down` hold weighted rows.
    activation: format to which every elementwise step inside the activation is rounded (a sigmoid, tanh or erf is
    one step); None: only its end. merge: format to which the product weight * row and the running sum over slots
    and shared expert are rounded after every step; None: they are kept in the accumulation format.
    """

    storage: dict[Stage, Format]
    products: Products = "exact"
    accumulate: Format = Format.FP32
    reduce: Format = Format.FP32
    weight_at: Literal["down", "merge", "act"] = "down"
    activation: Format | None = None
    merge: Format | None = None
    decoded: Format | None = None
    promoted_after: int | None = None
    gradient_rows: Literal["both", "each"] = "both"


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Declared by a subject; what is not declared here is `unsupported`, never guessed.

    stages:                      the stages it records in `trace`, beyond the output
    features:                    options of the mathematics, beyond the activations and scores named
    storages:                    orders of weights in memory that it reads through strides
    directions:                  with the backward one, what it returns is differentiable in all that it is handed
    max_tp, max_ep:              the largest degrees
    tokens, hostings, redundant, shared_placements, schedules: what of Parallel it works under
    deterministic:               the same bits whenever it is run again
    equal_ranks:                 every rank returns the same bits, gradients of what ranks hold alike included
    lower_id_ties:               exact ties go to the lower expert id
    injected_routing:            takes a whole routing in place of its router's, which exact data need
    batch_invariant:             a token's row has the same bits whatever else is in the batch, and in whatever order
    collectives_through_groups:  it communicates through `groups` only, so calls can be counted
    injected_logits:             takes logits in place of those of its router, which all patterns but uniform need
    absent_ids:                  takes ids that name no expert, as -1, whose slots then contribute nothing
    hidden_multiple:             hidden_size must be a multiple of it
    intermediate_multiple:       so must every tp rank's share of intermediate_size; above 1, none may be empty
    needs:                       what a spec must have, as `traits_of` names it: a block may always renormalise
    schemes:                     encoded weights that it takes, with the numerics of each dtype
    whole_blocks:                a rank's part of an encoded matrix must end where a block does
    others:                      further declarations, for cases that those before refuse: a library of blocks of which
                                 each rounds in its own way is one implementation; they promise what the first one does
    """

    name: str
    version: str
    numerics: dict[Dtype, Numerics]
    stages: tuple[Stage, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    scores: tuple[str, ...] = ("softmax",)
    features: tuple[Feature, ...] = ()
    directions: tuple[Direction, ...] = (Direction.FORWARD,)
    max_tp: int = 1
    max_ep: int = 1
    tokens: tuple[Tokens, ...] = (Tokens.REPLICATED,)
    hostings: tuple[Hosting, ...] = (Hosting.CONTIGUOUS,)
    redundant: bool = False
    shared_placements: tuple[SharedPlacement, ...] = (SharedPlacement.SHARDED,)
    storages: tuple[Storage, ...] = (Storage.OUT_IN,)
    schedules: tuple[Schedule, ...] = (Schedule.ALL_REDUCE,)
    ranks: tuple[Ranks, ...] = (Ranks.LOCAL,)
    devices: tuple[str, ...] = ("cpu", "cuda")
    deterministic: bool = False
    equal_ranks: bool = False
    lower_id_ties: bool = False
    injected_routing: bool = False
    batch_invariant: bool = False
    collectives_through_groups: bool = False
    injected_logits: bool = True
    absent_ids: bool = True
    hidden_multiple: int = 1
    intermediate_multiple: int = 1
    needs: tuple[str, ...] = ()
    schemes: dict[Scheme, dict[Dtype, Numerics]] = field(default_factory=dict)
    whole_blocks: bool = False
    others: tuple["Capabilities", ...] = ()

    def numerics_of(self, problem: Problem) -> Numerics | None:
        """The rounding contract for a problem; None where its dtype or scheme is not declared."""
        of_scheme = self.numerics if problem.scheme is Scheme.PLAIN else self.schemes.get(problem.scheme, {})
        return of_scheme.get(problem.dtype)

    def contract(self, problem: Problem) -> Numerics:
        """numerics_of a problem that is not refused."""
        numerics = self.numerics_of(problem)
        assert numerics is not None
        return numerics

    def serving(self, case: Case, ranks: Ranks, device: str) -> "Capabilities":
        """The declaration that `case` is judged by: the first that does not refuse it, or this one."""
        return next((one for one in (self, *self.others) if one._refusal(case, ranks, device) is None), self)

    def refusal(self, case: Case, ranks: Ranks, device: str) -> str | None:
        """Why `case` is not supported, or None when it is; of several declarations the one that comes closest says."""
        refusals = [one._refusal(case, ranks, device) for one in (self, *self.others)]
        return None if None in refusals else min(filter(None, refusals), key=lambda refusal: refusal.count(","))

    def _refusal(self, case: Case, ranks: Ranks, device: str) -> str | None:
        refused = [
            *self._refused_scheme(case),
            (case.direction not in self.directions, f"direction {case.direction}"),
            (case.parallel.tp > self.max_tp, f"tp {case.parallel.tp} above {self.max_tp}"),
            (case.parallel.ep > self.max_ep, f"ep {case.parallel.ep}" + f" above {self.max_ep}" * (self.max_ep > 1)),
            (case.parallel.tokens not in self.tokens, f"tokens {case.parallel.tokens}"),
            (case.parallel.hosting not in self.hostings, f"hosting {case.parallel.hosting}"),
            (bool(case.parallel.redundant) and not self.redundant, "redundant experts"),
            (case.parallel.shared not in self.shared_placements, f"shared expert {case.parallel.shared}"),
            (case.storage not in self.storages, f"weights stored as {case.storage}"),
            (case.parallel.schedule not in self.schedules, f"schedule {case.parallel.schedule}"),
            (ranks not in self.ranks, f"{ranks} ranks"),
            (device not in self.devices, f"device {device}"),
            (case.problem.residual and Feature.RESIDUAL not in self.features, str(Feature.RESIDUAL)),
            *self._refused_exact(case), *self._refused_sizes(case), *self._refused_backward(case),
        ]
        reasons = [reason for refuses, reason in refused if refuses] + self._refused_mathematics(case.problem.spec)
        return "not declared: " + ", ".join(reasons) if reasons else None

    def _refused_scheme(self, case: Case) -> list[tuple[bool, str]]:
        """Dtypes and schemes without a contract, and cuts inside blocks."""
        problem = case.problem
        dtype, scheme = problem.dtype, problem.scheme
        if scheme is Scheme.PLAIN:
            return [(dtype not in self.numerics, f"dtype {dtype}")]
        declared = self.schemes.get(scheme)
        if declared is None:
            return [(True, f"scheme {scheme}")]
        return [(dtype not in declared, f"dtype {dtype} with scheme {scheme}"),
                (self.whole_blocks and cuts_blocks(case), f"a cut inside a block of {scheme}")]

    def _refused_exact(self, case: Case) -> list[tuple[bool, str]]:
        """What of exact data a contract cannot hold: exactness is proven for 8 stored bits and sums in fp32."""
        numerics = self.numerics_of(case.problem)
        if case.problem.data is not Data.EXACT or numerics is None:
            return []
        stored = [*numerics.storage.values(), numerics.reduce, numerics.activation, numerics.merge]
        return [(case.problem.spec.router is not None and not self.injected_routing, "an injected routing"),
                (numerics.accumulate not in LONG_SUMS, f"exact data with sums in {numerics.accumulate}"),
                (numerics.products in ROUNDED_OPERANDS, "exact data with operands in e4m3"),
                *((one in stored, f"exact data with rows in {one}") for one in NARROW)]

    def _refused_backward(self, case: Case) -> list[tuple[bool, str]]:
        """Gradients whose products have operands in blocks: no contract says what they multiply."""
        numerics = self.numerics_of(case.problem)
        rounds = numerics is not None and numerics.products in set(ROUNDED_OPERANDS) - set(ROUNDED_GRADIENTS)
        return [(rounds and case.direction is Direction.BACKWARD, "gradients with operands in e4m3")]

    def _refused_sizes(self, case: Case) -> list[tuple[bool, str]]:
        """Logits and ids that cannot be handed over, and sizes that are no multiple."""
        problem, spec = case.problem, case.problem.spec
        injects = spec.router is not None and problem.pattern is not Pattern.UNIFORM and problem.data is not Data.EXACT
        multiple = self.intermediate_multiple
        widths = {stop - start for start, stop in case.parallel.ranges(spec.intermediate_size)}
        return [(injects and not self.injected_logits, "injected logits"),
                (problem.pattern is Pattern.HOLES and not self.absent_ids, "ids that name no expert"),
                (spec.hidden_size % self.hidden_multiple != 0,
                 f"hidden size {spec.hidden_size}, no multiple of {self.hidden_multiple}"),
                *((width % multiple != 0 or (multiple > 1 and width == 0),
                   f"a rank's intermediate size {width}, no multiple of {multiple}") for width in sorted(widths))]

    def refused_mathematics(self, spec: MoESpec) -> list[str]:
        """What of a spec is not declared, in words; of several declarations by the one that comes closest."""
        # No min with a key: torch.compile traces this, and cannot follow one (torch 2.13).
        fewest = self._refused_mathematics(spec)
        for other in self.others:
            refused = other._refused_mathematics(spec)
            fewest = refused if len(refused) < len(fewest) else fewest
        return fewest

    def _refused_mathematics(self, spec: MoESpec) -> list[str]:
        activations = [spec.experts.activation] + ([spec.shared.mlp.activation] if spec.shared else [])
        reasons = [f"activation {name}" for name in dict.fromkeys(activations) if name not in self.activations]
        if spec.router and spec.router.score not in self.scores:
            reasons.append(f"score {spec.router.score}")
        reasons += sorted(str(feature) for feature in features_of(spec) - set(self.features))
        return reasons + [f"a layer without {need}" for need in self.needs if need not in traits_of(spec)]
