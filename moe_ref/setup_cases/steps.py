"""The ladder: each step is a case or two that add one thing, in the smallest sizes that a subject declares to take."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.case import Case, Problem
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Direction, Dtype, Pattern

WIDEST = (Dtype.FP32, Dtype.FP16, Dtype.BF16)
"""The first that a subject takes is the one in which a mistake is farthest from a rounding."""

LEAST_SIZE = 16
"""Narrower layers leave numbers that hypotheses share by chance."""

NUM_EXPERTS = 4
"""Every order of which can be tried."""


@dataclass(frozen=True)
class Step:
    """One step: its name, what a pass shows, its cases, and the steps without which it says nothing."""

    name: str
    shows: str
    cases: tuple[Case, ...]
    stands_on: tuple[str, ...]
    only_runs: bool = False
    """Shape and dtype alone are asked for; numbers are the next step's."""
    named: tuple[str, ...] = ()
    """What each of its cases is about, where they differ by more than numbers of tokens."""


@dataclass(frozen=True)
class Base:
    """What all steps have in common: the mathematics, the unit of sizes, the dtype, and whether logits can be given."""

    spec: MoESpec
    size: int
    dtype: Dtype
    injects: bool
    plain: bool = False
    """Whether no mathematics is asked for in particular, so that weights are asked for renormalised and not."""
    options: tuple[tuple[str, MoESpec, bool], ...] = ()
    """Declared options with a case of their own: name, spec, whether with a residual."""

    def case(self, tokens: int, hidden: int, inner: int, top_k: int, pattern: Pattern = Pattern.UNIFORM,
             parallel: Parallel | None = None, spec: MoESpec | None = None, **others: object) -> Case:
        """A case of these sizes, in units; the pattern falls away where logits cannot be given."""
        sized = resized(spec or self.spec, hidden * self.size, inner * self.size, top_k)
        pattern = pattern if self.injects and sized.router is not None else Pattern.UNIFORM
        residual = bool(others.pop("residual", False))
        problem = Problem(spec=sized, num_tokens=tokens, dtype=self.dtype, pattern=pattern, residual=residual)
        return Case(problem=problem, parallel=parallel or Parallel(), **others)  # pyrefly: ignore


def resized(spec: MoESpec, hidden: int, inner: int, top_k: int) -> MoESpec:
    """The same mathematics in other sizes, with few experts where they form no groups."""
    router, shared = spec.router, spec.shared
    if router is not None:
        experts = NUM_EXPERTS if router.num_groups == 1 else router.num_experts
        router = replace(router, num_experts=experts, top_k=min(top_k, router.top_k, experts))
    if shared is not None:
        shared = replace(shared, intermediate_size=inner * shared.num_experts)
    return replace(spec, hidden_size=hidden, intermediate_size=inner, router=router, shared=shared)


def base_of(capabilities: Capabilities, spec: MoESpec | None = None) -> Base:
    """The common part for a subject: its widest dtype, its plainest layer unless a spec is given.

    Raises UsageValueError where what it declares can be asked for nothing.
    """
    faults = [] if capabilities.numerics else ["numerics is empty, but should hold a Numerics for each dtype it takes"]
    faults += ["activations is empty, but should name one at least"] * (not capabilities.activations)
    dense = not capabilities.scores and Feature.DENSE not in capabilities.features
    faults += ["scores is empty, but should name one at least, or features a layer without a router"] * dense
    if faults:
        raise UsageValueError(f"CAPABILITIES of {capabilities.name}: " + "; ".join(faults))
    dtype = next(one for one in WIDEST if one in capabilities.numerics)
    unit = math.lcm(capabilities.hidden_multiple, capabilities.intermediate_multiple)
    size = unit * -(-LEAST_SIZE // unit)
    chosen = spec or plainest(capabilities)
    options = tuple(declared_options(capabilities, chosen)) if spec is None else ()
    return Base(chosen, size, dtype, capabilities.injected_logits, spec is None, options)


def plainest(capabilities: Capabilities) -> MoESpec:
    """A layer without any option that must be declared, silu and softmax where they are taken."""
    scores, activations = capabilities.scores, capabilities.activations
    activation = "silu" if "silu" in activations else activations[0]
    router = None
    if scores:
        score = "softmax" if "softmax" in scores else scores[0]
        router = Router(num_experts=NUM_EXPERTS, top_k=2, score=score, renormalize=True)  # pyrefly: ignore
    return MoESpec(hidden_size=LEAST_SIZE, intermediate_size=LEAST_SIZE, router=router,
                   experts=MLP(activation=activation))  # pyrefly: ignore


def declared_options(capabilities: Capabilities, spec: MoESpec) -> Iterator[tuple[str, MoESpec, bool]]:
    """What is declared beside the plainest layer and is an argument or a word that an adapter hands on, each alone."""
    features, router, experts = capabilities.features, spec.router, spec.experts
    for name in capabilities.activations:
        if name != experts.activation:
            yield name, replace(spec, experts=MLP(activation=name)), False  # pyrefly: ignore
    for name in capabilities.scores:
        if router is not None and name != router.score:
            yield name, replace(spec, router=replace(router, score=name)), False  # pyrefly: ignore
    if router is not None and Feature.LOGIT_BIAS in features:
        yield "router bias", replace(spec, router=replace(router, logit_bias=True)), False
    if router is not None and Feature.SELECTION_BIAS in features:
        yield "selection bias", replace(spec, router=replace(router, selection_bias="score")), False
    if Feature.MLP_BIAS in features:
        yield "biases of experts", replace(spec, experts=replace(experts, bias=True)), False
    if Feature.SHARED_EXPERT in features:
        yield "shared expert", replace(spec, shared=SharedExpert(intermediate_size=1, mlp=experts)), False
    if Feature.RESIDUAL in features:
        yield "residual", spec, True


def ladder(base: Base, capabilities: Capabilities) -> tuple[Step, ...]:
    """All steps after the first, which is that the subject loads."""
    one_hot, case = Pattern.ONE_HOT, base.case
    router, top_k = base.spec.router, base.spec.top_k
    plain = ("shape", "gate and up", "w2")
    steps = [
        Step("shape", "one token through one expert: shape and dtype of the output", (case(1, 2, 3, 1, one_hot),), (),
             only_runs=True),
        Step("gate and up", "rows and orientation of w13", (case(1, 2, 1, 1, one_hot),), ("shape",)),
        Step("w2", "orientation of w2", (case(1, 1, 1, 1, one_hot),), ("shape", "gate and up"))]
    if router is not None:
        others = [replace(router, renormalize=not router.renormalize)] * base.plain
        specs = [base.spec, *(replace(base.spec, router=one) for one in others)]
        steps += [
            Step("experts", "their order", (case(16, 1, 2, 1, one_hot),), plain),
            Step("routing weights", "which, where, renormalised or not",
                 tuple(case(8, 1, 2, top_k, Pattern.ZIPF, spec=one) for one in specs), (*plain, "experts"),
                 named=tuple(_renormalised(one) for one in specs)),
            Step("router", "its own choice", (case(16, 1, 2, top_k),), (*plain, "experts", "routing weights"))]
    known = tuple(step.name for step in steps)
    if base.options:
        options = tuple(case(8, 1, 2, top_k, spec=spec, residual=residual) for _, spec, residual in base.options)
        names = tuple(name for name, _, _ in base.options)
        steps.append(Step("options", ", ".join(names), options, known, named=names))
    steps.append(Step("calls", "other numbers of tokens, repeated calls",
                      tuple(case(tokens, 1, 2, top_k) for tokens in (33, 1, 0)), known))
    ranks = [case(9, 1, 4, top_k, parallel=Parallel(tp=2), spec=spec, residual=residual)
             for spec, residual in ((base.spec, False), *_once_only(base))]
    steps.append(Step("two ranks", "shards and all-reduce", tuple(ranks), known,
                      named=("plain", "with what must come in once")))
    steps.append(Step("gradients", "of everything that is handed over",
                      (case(9, 1, 2, top_k, direction=Direction.BACKWARD),), known))
    return tuple(steps)


def _renormalised(spec: MoESpec) -> str:
    return "renormalised" if spec.router is not None and spec.router.renormalize else "not renormalised"


def _once_only(base: Base) -> Iterator[tuple[MoESpec, bool]]:
    """A layer with all that several ranks must add once between them, where any of it is declared."""
    options = {name: spec for name, spec, _ in base.options}
    spec = base.spec
    if "biases of experts" in options:
        spec = replace(spec, experts=options["biases of experts"].experts)
    if "shared expert" in options:
        spec = replace(spec, shared=options["shared expert"].shared)
    if spec != base.spec or "residual" in options:
        yield spec, "residual" in options


def square_twins(case: Case) -> Iterator[Case]:
    """The same case in sizes where a matrix that is not transposed still fits: I = H, 2 I = H."""
    spec, size = case.problem.spec, min(case.problem.spec.hidden_size, case.problem.spec.intermediate_size)
    for hidden in (size, 2 * size):
        sized = resized(spec, hidden, size, spec.top_k)
        if sized != spec:
            yield replace(case, problem=replace(case.problem, spec=sized))
