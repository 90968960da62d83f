"""Protects the text id of a case: it is the case, it never changes its meaning, and a wrong one says what is wrong."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_ref.contract.case import Case, Problem
from moe_ref.contract.case_id import cut_experts, format_case, format_problem, parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, Capacity, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Data, Direction, Dtype, Pattern, Storage
from moe_ref.models.registry import find_model, models
from moe_ref.tiers.tiers import tier
from tests.nightly import examples

STORED = {
    "v1-T33.H96.I160.E8.K2-fp32-norm":
        Problem(spec=MoESpec(hidden_size=96, intermediate_size=160,
                             router=Router(num_experts=8, top_k=2, renormalize=True)),
                num_tokens=33, dtype=Dtype.FP32),
    "v1-T0.H64.I96.E4.K2-bf16":
        Problem(spec=MoESpec(hidden_size=64, intermediate_size=96, router=Router(num_experts=4, top_k=2)),
                num_tokens=0, dtype=Dtype.BF16),
    "v1-T40.H72.I90-fp16-gelutanh-res-s7":
        Problem(spec=MoESpec(hidden_size=72, intermediate_size=90, experts=MLP(activation="gelu_tanh")),
                num_tokens=40, dtype=Dtype.FP16, residual=True, seed=7),
    "v1-T9.H64.I64.E16.K4-bf16-sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-gelu-sh35-shgate-shgelu-ties-outlier":
        Problem(spec=MoESpec(hidden_size=64, intermediate_size=64,
                             router=Router(num_experts=16, top_k=4, score="sigmoid", renormalize=True,
                                           renormalize_epsilon=1e-20, selection_bias="score", num_groups=4,
                                           num_groups_kept=2, group_score="top2_sum", scaling_factor=2.5),
                             experts=MLP(activation="gelu"),
                             shared=SharedExpert(intermediate_size=35, gate="sigmoid", mlp=MLP(activation="gelu"))),
                num_tokens=9, dtype=Dtype.BF16, pattern=Pattern.TIES, data=Data.OUTLIER),
    "v1-mixtral.8x7b.T32.E4-bf16":
        Problem(spec=cut_experts(find_model("mixtral.8x7b").spec, 4), num_tokens=32, dtype=Dtype.BF16,
                model="mixtral.8x7b"),
    "v1-T9.H64.I64.E16.K4-fp32-norm-eps1em12-sqrtsoftplus-biaslogit-epsclamp-expertscale-routerbias-logitscale0.5-"
    "logitcap1.5-capfactor1.25-capweight-capseq16-capafter-relu2-nogate-mlpbias-outbias-large":
        Problem(spec=MoESpec(hidden_size=64, intermediate_size=64, output_bias=True, router=Router(
            num_experts=16, top_k=4, score="sqrt_softplus", renormalize=True, renormalize_epsilon=1e-12,
            selection_bias="logit", epsilon_rule="clamp", learned_scale="expert", logit_bias=True, logit_scale=0.5,
            logit_softcap=1.5, capacity=Capacity(factor=1.25, priority="weight", sequence_length=16,
                                                 renormalize_after=True)),
            experts=MLP(activation="relu_squared", gated=False, bias=True)),
                num_tokens=9, dtype=Dtype.FP32, data=Data.LARGE),
    "v1-T9.H64.I64.E16.K4-fp32-sigmoid-learnscale-zero4-cap8-capchoice-limit7-limitafter-alpha1.702-up1-"
    "sh36-shgatecap2-shupcap2.5-shrouter2-shmean-nonfinite":
        Problem(spec=MoESpec(hidden_size=64, intermediate_size=64, router=Router(
            num_experts=16, top_k=4, score="sigmoid", learned_scale="layer", num_zero_experts=4,
            capacity=Capacity(tokens=8, priority="choice")),
            experts=MLP(limit=7, limit_at="after", sigmoid_scale=1.702, up_offset=1),
            shared=SharedExpert(intermediate_size=36, mlp=MLP(gate_softcap=2, up_softcap=2.5), gate="router",
                                num_experts=2, merge="mean")),
                num_tokens=9, dtype=Dtype.FP32, data=Data.NON_FINITE),
    "v1-T9.H64.I64.E16.K4-fp32-g4.2-fillzero-relu-upm0.5-sh36-shrelu-shnogate-shmlpbias-weightinput":
        Problem(spec=MoESpec(hidden_size=64, intermediate_size=64, weight_on="input", router=Router(
            num_experts=16, top_k=4, num_groups=4, num_groups_kept=2, group_fill="zero"),
            experts=MLP(activation="relu", up_offset=-0.5),
            shared=SharedExpert(intermediate_size=36, mlp=MLP(activation="relu", gated=False, bias=True))),
                num_tokens=9, dtype=Dtype.FP32),
    "v1-T33.H96.I160.E8.K2-bf16-norm-sh83-res-exact":
        Problem(spec=MoESpec(hidden_size=96, intermediate_size=160,
                             router=Router(num_experts=8, top_k=2, renormalize=True),
                             shared=SharedExpert(intermediate_size=83)),
                num_tokens=33, dtype=Dtype.BF16, data=Data.EXACT, residual=True),
}
"""Ids as they stand in records of earlier versions; these lines may be added to, never edited."""

sizes = st.integers(1, 10**6)
numbers = st.floats(min_value=1e-300, max_value=1e300, allow_nan=False)


some = st.sampled_from


@st.composite
def capacities(draw: st.DrawFn, renormalize: bool) -> Capacity:
    given_tokens = draw(st.booleans())
    return Capacity(tokens=draw(sizes) if given_tokens else None, factor=None if given_tokens else draw(numbers),
                    priority=draw(some(["token", "choice", "weight"])), sequence_length=draw(st.none() | sizes),
                    renormalize_after=renormalize and draw(st.booleans()))


@st.composite
def routers(draw: st.DrawFn) -> Router:
    """Routers in which any option may stand beside any other; what is not defined together is drawn again."""
    num_groups, group_size = draw(st.just(1) | st.integers(1, 8)), draw(st.integers(2, 16))
    kept, renormalize = draw(st.integers(1, num_groups)), draw(st.booleans())
    epsilon = draw(st.just(0.0) | numbers)
    options = {
        "score": draw(some(["softmax", "sigmoid", "sqrt_softplus"])), "logit_bias": draw(st.booleans()),
        "logit_scale": draw(st.just(1.0) | numbers), "logit_softcap": draw(st.just(0.0) | numbers),
        "selection_bias": draw(some([None, "score", "logit"])), "group_score": draw(some(["max", "top2_sum"])),
        "group_fill": draw(some(["minus_inf", "zero"])), "renormalize": renormalize, "renormalize_epsilon": epsilon,
        "epsilon_rule": draw(some(["add", "clamp"])) if renormalize and epsilon else "add",
        "scaling_factor": draw(st.just(1.0) | numbers), "learned_scale": draw(some([None, "layer", "expert"])),
        "num_zero_experts": draw(st.just(0) | st.integers(0, 99)) if num_groups == 1 else 0,
        "capacity": draw(st.none() | capacities(renormalize))}
    try:
        return Router(num_experts=num_groups * group_size, top_k=draw(st.integers(1, kept * group_size)),
                      num_groups=num_groups, num_groups_kept=kept, **options)
    except UsageValueError:
        assume(False)
        raise


@st.composite
def mlps(draw: st.DrawFn) -> MLP:
    limit, gated = draw(st.none() | numbers), draw(st.booleans())
    caps = limit is None
    silu = draw(st.booleans())
    return MLP(activation="silu" if silu else draw(some(["gelu", "gelu_tanh", "relu", "relu_squared"])), gated=gated,
               bias=draw(st.booleans()), limit=limit,
               limit_at=draw(some(["before", "after"])) if limit is not None else "before",
               sigmoid_scale=draw(st.just(1.0) | numbers) if silu else 1.0,
               up_offset=draw(st.just(0.0) | numbers | numbers.map(lambda number: -number)) if gated else 0.0,
               gate_softcap=draw(st.just(0.0) | numbers) if silu and caps else 0.0,
               up_softcap=draw(st.just(0.0) | numbers) if gated and caps else 0.0)


@st.composite
def shared_experts(draw: st.DrawFn) -> SharedExpert:
    gate, mlp = draw(some(["none", "sigmoid", "router"])), draw(mlps())
    count = draw(st.integers(1, 4)) if gate == "router" else 1
    return SharedExpert(intermediate_size=count * draw(sizes), gate=gate, num_experts=count,
                        mlp=replace(mlp, bias=False) if gate == "router" else mlp,
                        merge=draw(some(["sum", "mean"])))


specs = st.builds(MoESpec, hidden_size=sizes, intermediate_size=sizes, router=st.none() | routers(), experts=mlps(),
                  shared=st.none() | shared_experts(), weight_on=some(["output", "output", "input"]),
                  output_bias=st.booleans())


@st.composite
def parallels(draw: st.DrawFn) -> Parallel:
    tp = draw(st.integers(1, 16))
    shares = st.lists(st.integers(1, 99), min_size=tp, max_size=tp).map(tuple)
    return Parallel(tp=tp, splits=draw(st.none() | shares))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    options = {"num_tokens": draw(st.integers(0, 10**6)), "dtype": draw(st.sampled_from(Dtype)),
               "data": draw(st.sampled_from(Data)), "residual": draw(st.booleans()),
               "seed": draw(st.integers(0, 2**32 - 1)), "pattern": draw(st.sampled_from(Pattern))}
    try:
        spec = draw(specs)
        if spec.router is None:
            options["pattern"] = Pattern.UNIFORM
        problem = Problem(spec=spec, **options)
    except UsageValueError:
        assume(False)
    direction = Direction.FORWARD if problem.data in (Data.NON_FINITE, Data.EXACT) else draw(st.sampled_from(Direction))
    return Case(problem=problem, parallel=draw(parallels()), storage=draw(st.sampled_from(Storage)),
                direction=direction)


@given(cases())
@settings(max_examples=examples(300), deadline=None, derandomize=True)
def test_every_case_survives_its_text(case: Case) -> None:
    """parse(format(case)) == case, for cases nobody thought of; the text keeps to its alphabet."""
    text = format_case(case)
    assert re.fullmatch(r"[A-Za-z0-9.-]+", text)
    assert parse_case(text) == case
    assert format_case(parse_case(text)) == text


def test_every_planned_case_survives_its_text() -> None:
    """The ids of all tiers, which are what people paste."""
    for planned in tier("nightly").cases:
        assert re.fullmatch(r"[A-Za-z0-9.-]+", planned.case_id)
        assert parse_case(planned.case_id) == planned.case


@pytest.mark.parametrize("name", list(models()))
def test_every_model_can_be_named_whole_and_cut(name: str) -> None:
    """A name with dots and digits must not be read as sizes."""
    whole = parse_case(f"v1-{name}.T4-bf16").problem
    assert (whole.spec, whole.num_tokens) == (models()[name].spec, 4)
    if whole.spec.num_experts > 2:
        cut = parse_case(f"v1-{name}.T4.E2-bf16-tp2")
        assert cut.problem.spec.num_experts == 2
        assert cut.problem.spec.hidden_size == whole.spec.hidden_size
        assert format_case(cut) == f"v1-{name}.T4.E2-bf16-tp2"


@pytest.mark.parametrize("text", STORED)
def test_stored_ids_keep_their_meaning(text: str) -> None:
    """A record of last year must name the same case today."""
    assert parse_case(text) == Case(problem=STORED[text])
    assert format_case(Case(problem=STORED[text])) == text


def test_ranks_leave_the_inputs_alone() -> None:
    """Cases that differ in parallelism share the problem's part of the id, from which inputs are drawn."""
    one, spread = (parse_case(f"v1-T33.H96.I160.E8.K2-fp32-norm{end}") for end in ("", "-tp2-split60.40"))
    assert spread.parallel == Parallel(tp=2, splits=(60, 40))
    assert format_problem(one.problem) == format_problem(spread.problem) == format_case(one)


PLAIN = "v1-T33.H96.I160.E8.K2-bf16"


@pytest.mark.parametrize(("text", "words"), [
    ("", ["should be v1-SIZES-DTYPE"]),
    ("v2-T33.H96.I160.E8.K2-bf16", ["should be v1-SIZES-DTYPE"]),
    ("v1-T33.H96.I160.E8.K2", ["should be v1-SIZES-DTYPE"]),
    ("v1-T33.H96.I160.E8.K2-fp8", ["dtype 'fp8'", "fp32, fp16, bf16"]),
    ("v1-H96.I160.E8.K2-bf16", ["sizes 'H96.I160.E8.K2'", "T33.H96.I160.E8.K2"]),
    ("v1-T33.H96.I160.E8-bf16", ["sizes 'T33.H96.I160.E8'"]),
    ("v1-T33.H96.I160.E8.K9-bf16", ["top_k=9", "num_experts=8"]),
    ("v1-T33.H0.I160.E8.K2-bf16", ["hidden_size=0", "at least 1"]),
    ("v1-mistral.T4-bf16", ["unknown model 'mistral'", "mixtral.8x7b"]),
    ("v1-mixtral.8x7b.T4.E9-bf16", ["experts cut to 9", "has 8"]),
    (f"{PLAIN}-nrom", ["unknown word 'nrom'"]),
    (f"{PLAIN}-tpx", ["unknown word 'tpx'"]),
    (f"{PLAIN}-", ["unknown word ''"]),
    (f"{PLAIN}-scale1e-3", ["unknown word 'scale1e'"]),
    (f"{PLAIN}-norm-norm", ["'norm' says norm a second time"]),
    (f"{PLAIN}-zipf-ties", ["'ties' says pattern a second time"]),
    (f"{PLAIN}-tp2-split1.2.3", ["splits has 3 shares", "tp=2"]),
    (f"{PLAIN}-tp2-split0.0", ["splits=(0, 0)", "one of them above"]),
    (f"{PLAIN}-g3.1", ["num_groups=3", "num_experts=8"]),
    (f"{PLAIN}-tp2-norm", ["canonical", f"'{PLAIN}-norm-tp2'"]),
    (f"{PLAIN}-tp1", ["canonical", f"'{PLAIN}'"]),
    (f"{PLAIN}-s0", ["canonical", f"'{PLAIN}'"]),
    (f"{PLAIN}-uniform", ["canonical", f"'{PLAIN}'"]),
    (f"{PLAIN}-scale1", ["canonical", f"'{PLAIN}'"]),
    (f"{PLAIN}-shgate", ["canonical", f"'{PLAIN}'"]),
    (f"{PLAIN}-s4294967296", ["seed=4294967296", "2^32"]),
    ("v1-T033.H96.I160.E8.K2-bf16", ["canonical", f"'{PLAIN}'"]),
    ("v1-T40.H72.I90-bf16-norm", ["norm need a router"]),
    ("v1-T40.H72.I90-bf16-ties", ["pattern ties", "without a router"]),
    ("v1-T4.H8.I8.E4.K3-bf16-empty", ["pattern empty", "E=4", "K=3"]),
    (f"{PLAIN}-limitafter", ["limit_at='after'", "no limit"]),
    (f"{PLAIN}-capchoice", ["canonical", f"'{PLAIN}'"]),
    (f"{PLAIN}-cap8-capfactor1.25", ["tokens=8, factor=1.25", "exactly one"]),
    (f"{PLAIN}-sigmoid-sqrtsoftplus", ["canonical", f"'{PLAIN}-sigmoid'"]),
    (f"{PLAIN}-sh64-shgate-shrouter2", ["shared.gate='router'", "softmax"]),
    (f"{PLAIN}-shlimit7", ["canonical", f"'{PLAIN}'"]),
    (f"{PLAIN}-limitm7", ["unknown word 'limitm7'"]),
    (f"{PLAIN}-relu-relu2", ["canonical", f"'{PLAIN}-relu'"]),
    (f"{PLAIN}-mlpbias-weightinput", ["weight_on='input'", "bias"]),
    ("v1-T40.H72.I90-bf16-cap8-zero2", ["cap, zero need a router"]),
    ("v1-mixtral.8x7b.T4-bf16-norm", ["canonical", "'v1-mixtral.8x7b.T4-bf16'"]),
    ("v1-mixtral.8x7b.T4.E8-bf16", ["canonical", "'v1-mixtral.8x7b.T4-bf16'"]),
])
def test_a_wrong_id_is_told_what_is_wrong(text: str, words: list[str]) -> None:
    """Each kind of mistake has its own message, with the offending word or number in it."""
    with pytest.raises(UsageValueError) as caught:
        parse_case(text)
    for word in words:
        assert word in str(caught.value)


@given(st.text(alphabet="v1-T.HIEK0248bfp6tpnormsg\u0663", max_size=40))
@settings(max_examples=examples(300), deadline=None, derandomize=True)
def test_no_text_is_read_as_something_else(text: str) -> None:
    """Whatever parses is canonical; everything else is wrong use, never another exception."""
    try:
        case = parse_case(text)
    except UsageValueError:
        return
    assert format_case(case) == text


def test_wrong_use_is_reported_for_endless_digits() -> None:
    """Python refuses to read integers of more than 4300 digits; the caller still gets a UsageValueError."""
    with pytest.raises(UsageValueError):
        parse_case("v1-T" + "9" * 5000 + ".H96.I160.E8.K2-bf16")


@pytest.mark.parametrize("build", [
    lambda: Case(problem=parse_case(PLAIN).problem, parallel=Parallel(ep=2)),
    lambda: Case(problem=Problem(spec=STORED["v1-T40.H72.I90-fp16-gelutanh-res-s7"].spec, num_tokens=4,
                                 dtype=Dtype.BF16, model="mixtral.8x7b")),
    lambda: Case(problem=Problem(spec=MoESpec(hidden_size=8, intermediate_size=8, router=Router(
        num_experts=4, top_k=2, renormalize_epsilon=float("inf"))), num_tokens=4, dtype=Dtype.BF16)),
], ids=["expert parallel", "a model's name on another spec", "infinite epsilon"])
def test_what_an_id_cannot_say_is_refused(build: object) -> None:
    """Otherwise two different cases would share an id; refusing it anywhere on the way is right."""
    try:
        case = build()
        text = format_case(case)
    except UsageValueError:
        return
    assert parse_case(text) == case
