"""Hypothesis strategies that draw cases, not tensors: what a search finds is a case id, which replays for ever.

Everything shrinks towards the smallest layer: no token, sizes of 1, one expert, fp32, one rank and no option.
"""

from collections.abc import Callable
from dataclasses import replace

from hypothesis import HealthCheck, find, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.case import Case, Problem
from moe_ref.contract.case_id import format_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.exact import exact_faults
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, Capacity, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Data, Dtype, Pattern, Ranks, Schedule, Tokens

Scope = Capabilities
"""What a layer declares bounds what is drawn for it, so that few draws are thrown away."""


def flag(draw: st.DrawFn, scope: Scope, feature: Feature) -> bool:
    """Whether to use an option, where the layer has it."""
    return feature in scope.features and draw(st.booleans())


@st.composite
def routers(draw: st.DrawFn, scope: Scope) -> Router:
    """Routers of at most 8 experts, with a few options each."""
    experts = draw(st.integers(1, 8))
    router = Router(num_experts=experts, top_k=draw(st.integers(1, experts)),
                    score=draw(st.sampled_from(scope.scores)), renormalize=draw(st.booleans()),
                    selection_bias="score" if flag(draw, scope, Feature.SELECTION_BIAS) else None,
                    scaling_factor=draw(st.sampled_from([1.0, 2.5])))
    if experts % 2 == 0 and router.top_k <= experts // 2 and flag(draw, scope, Feature.GROUPS):
        return replace(router, num_groups=2, num_groups_kept=1)
    options = {Feature.LOGIT_BIAS: {"logit_bias": True}, Feature.ZERO_EXPERTS: {"num_zero_experts": 2},
               Feature.LEARNED_SCALE: {"learned_scale": "expert"},
               Feature.LOGIT_CAP: {"logit_softcap": 2.0, "logit_scale": 0.5},
               Feature.CAPACITY: {"capacity": Capacity(tokens=2)}}
    return replace(router, **options.get(draw(st.sampled_from([None, *options])), {}))


@st.composite
def mlps(draw: st.DrawFn, scope: Scope) -> MLP:
    """Experts with an option or two."""
    gated = not flag(draw, scope, Feature.NOT_GATED)
    mlp = MLP(activation=draw(st.sampled_from(scope.activations)), gated=gated,
              bias=flag(draw, scope, Feature.MLP_BIAS), limit=1.0 if flag(draw, scope, Feature.LIMIT) else None)
    return replace(mlp, up_offset=1.0) if gated and flag(draw, scope, Feature.SCALED_SWIGLU) else mlp


@st.composite
def specs(draw: st.DrawFn, scope: Scope) -> MoESpec:
    """Layers of at most 48 columns."""
    routed = not flag(draw, scope, Feature.DENSE)
    router, experts, shared = draw(routers(scope)) if routed else None, draw(mlps(scope)), None
    if flag(draw, scope, Feature.SHARED_EXPERT):
        shared = SharedExpert(intermediate_size=draw(st.sampled_from([1, 6, 24])),
                              gate=draw(st.sampled_from(["none", "sigmoid"])))
    on_input = router is not None and flag(draw, scope, Feature.WEIGHT_ON_INPUT)
    if on_input and router is not None:
        router, experts = replace(router, num_zero_experts=0), replace(experts, bias=False)
    return MoESpec(hidden_size=draw(st.integers(1, 48)), intermediate_size=draw(st.integers(1, 48)), router=router,
                   experts=experts, shared=shared, output_bias=flag(draw, scope, Feature.OUTPUT_BIAS),
                   weight_on="input" if on_input else "output")


@st.composite
def parallels(draw: st.DrawFn, scope: Scope) -> Parallel:
    """At most three ranks over tp and two over ep, in every schedule."""
    tp = draw(st.integers(1, min(3, scope.max_tp)))
    splits = draw(st.sampled_from([None, tuple(range(1, tp + 1))])) if tp > 1 else None
    schedule = draw(st.sampled_from(scope.schedules))
    ep = 1 if schedule is Schedule.GATHER else draw(st.integers(1, min(2, scope.max_ep)))
    tokens = [one for one in scope.tokens if ep > 1 or not one.over_ep]
    if schedule is not Schedule.REDUCE_SCATTER:
        tokens = [one for one in tokens if not one.over_tp]
    tokens = [Tokens.REPLICATED] if schedule is Schedule.GATHER else tokens
    return Parallel(tp=tp, ep=ep, splits=splits, schedule=schedule, tokens=draw(st.sampled_from(tokens)),
                    hosting=draw(st.sampled_from(scope.hostings if ep > 1 else scope.hostings[:1])),
                    shared=draw(st.sampled_from(scope.shared_placements)))


@st.composite
def problems(draw: st.DrawFn, scope: Scope, dtypes: tuple[Dtype, ...], most_tokens: int) -> Problem:
    """A layer and its data."""
    spec, residual = draw(specs(scope)), flag(draw, scope, Feature.RESIDUAL)
    data = draw(st.sampled_from([Data.UNIT, Data.OUTLIER] + [Data.EXACT] * (not exact_faults(spec, residual))))
    patterns = [one for one in Pattern if one is not Pattern.EMPTY or spec.num_choices - spec.top_k >= 2]
    pattern = draw(st.sampled_from(patterns)) if spec.router and data is not Data.EXACT else Pattern.UNIFORM
    return Problem(spec=spec, num_tokens=draw(st.integers(0, most_tokens)), dtype=draw(st.sampled_from(dtypes)),
                   pattern=pattern, data=data, residual=residual, seed=draw(st.integers(0, 3)))


@st.composite
def cases(draw: st.DrawFn, scope: Scope, dtypes: tuple[Dtype, ...] = tuple(Dtype), most_tokens: int = 16,
          fits: Callable[[Case], bool] = lambda case: True) -> Case:
    """Cases that a layer declares to take; fits: what else is wanted of them. Never a model's, forward only."""
    try:
        case = Case(problem=draw(problems(scope, dtypes, most_tokens)), parallel=draw(parallels(scope)),
                    storage=draw(st.sampled_from(scope.storages)))
    except UsageValueError:
        reject()
    if scope.refusal(case, Ranks.LOCAL, "cpu") is not None or not fits(case):
        reject()
    return case


def searched(examples: int) -> settings:
    """The same bounded number of examples every time."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


def smallest_failure(strategy: st.SearchStrategy[Case], fails: Callable[[Case], bool], examples: int = 200) -> str:
    """The id of the smallest case that fails; empty where none of the examples does."""
    try:
        return format_case(find(strategy, fails, settings=searched(examples)))
    except NoSuchExample:
        return ""
