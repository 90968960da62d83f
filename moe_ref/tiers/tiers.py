"""The tiers: smoke, quick, full, nightly, each of pinned cases plus covers, each holding the one before it;
families, pinned layers of released families; encoded, quantised experts under every degree; ranks, every way to spread
a layer on real processes; conformance, what other people's implementations are asked for."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, product

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Dtype, Pattern, Ranks
from moe_ref.models.registry import models
from moe_ref.tiers.axes import AXES, COMBINATIONS, COVER, PATTERNS, PLAIN, SHAPES, SHARED, SPREADS, row_case
from moe_ref.tiers.backward import backward_ids, larger_backward_ids
from moe_ref.tiers.conformance import conformance_cases
from moe_ref.tiers.cover import Row
from moe_ref.tiers.encoded import encoded_cases
from moe_ref.tiers.exact import exact_ids
from moe_ref.tiers.families import family_ids
from moe_ref.tiers.triggers import trigger_ids


@dataclass(frozen=True, kw_only=True)
class PlannedCase:
    """A case, why it exists, and what its ranks are.

    other_batches: it is run in other batches even where rows are not declared to be the same in them.
    """

    case: Case
    purpose: str
    ranks: Ranks = Ranks.LOCAL
    other_batches: bool = False

    @property
    def case_id(self) -> str:
        return format_case(self.case)


@dataclass(frozen=True)
class Tier:
    """Its cases, the fewest that must really run, and the axis pairs they cover of those possible; families: none."""

    name: str
    cases: tuple[PlannedCase, ...]
    minimum_executed: int
    pairs_covered: int
    pairs_possible: int


MINIMUM_EXECUTED = {"smoke": 24, "quick": 250, "full": 280, "nightly": 500, "families": 60, "ranks": 100,
                    "conformance": 20, "encoded": 30}
"""families: what an implementation of softmax routers, expert groups and shared experts can run at least; ranks:
what one of tensor parallelism alone can; encoded: what an implementation of a single scheme can."""

SMOKE_SPREADS = {"ep": Dtype.FP32, "sequence": Dtype.BF16, "whole-shared": Dtype.FP16, "dispatch-uneven": Dtype.BF16}
SMOKE_GRADIENTS = ("v1-T12.H40.I36.E6.K3-fp32-norm-sh19-shgate-res-tp2-bwd",
                   "v1-T12.H40.I36.E6.K3-bf16-norm-sh19-shgate-res-tp2-reducescatter-tokenstp-bwd")
EXACT_OVER_GLOO = "v1-T33.H96.I160.E8.K2-bf16-norm-res-exact-s1-tp4"
OTHER_BATCHES = ("v1-T33.H96.I160.E8.K2-fp32-norm", "v1-T33.H96.I160.E8.K2-bf16-norm-tp2")
"""Run in other batches whatever is declared, so that a record says what holds."""
BIASED = "v1-T21.H48.I40.E8.K2-fp32-norm-mlpbias-sh26-shgate-shmlpbias-outbias-res-tp2"

_TP_AND_DTYPE = tuple(product(AXES["tp"], Dtype))


def _smoke_rows() -> list[tuple[Row, str]]:
    rows = [(PLAIN | {"tp": tp, "dtype": dtype}, f"plain layer, {dtype}, tp {tp}") for tp, dtype in _TP_AND_DTYPE]
    rows += [(PLAIN | {"pattern": pattern, "tp": 2}, f"routing pattern {pattern}") for pattern in PATTERNS]
    rows += [(PLAIN | {"shape": SHAPES[n].name, "tp": tp, "dtype": Dtype.BF16}, SHAPES[n].purpose)
             for n, tp in ((5, 2), (6, 3), (9, 8), (11, 2))]
    rich = PLAIN | {"router": "sigmoid-groups", "shared": "shared-gate", "residual": True}
    rows += [(rich | {"tp": tp, "dtype": dtype}, "DeepSeek-V3 routing, gated shared expert and residual")
             for tp, dtype in ((3, Dtype.FP16), (2, Dtype.BF16))]
    rows += [(PLAIN | {"activation": activation, "shared": "shared", "tp": 2}, f"{activation}, shared expert too")
             for activation in ("gelu", "gelu_tanh")]
    rows.append((PLAIN | {"shape": SHAPES[11].name, "residual": True, "tp": 4}, "residual added once, not tp times"))
    # Every way to spread a layer: plain, as everybody has it, and with shared expert and residual, which come in once.
    spreads = [name for name in SPREADS if name != PLAIN["spread"]]
    rows += [(PLAIN | {"tp": 2, "spread": spread, "dtype": dtype}, f"tp 2: {SPREADS[spread].purpose}")
             for spread, dtype in zip(spreads, cycle(Dtype))]
    rows += [(rich | {"tp": 2, "spread": spread, "dtype": dtype}, f"{SPREADS[spread].purpose}, shared expert, residual")
             for spread, dtype in SMOKE_SPREADS.items()]
    return rows


@cache
def _quick_rows() -> tuple[tuple[Row, str], ...]:
    """Of three tiers; nobody changes a row."""
    rows = _smoke_rows()
    # A pattern needs tokens to show in and experts to spare.
    shapes = [shape for shape in SHAPES if shape.num_tokens > 1 and shape.num_experts - shape.top_k > 1]
    for number, (tp, dtype, pattern) in enumerate(product(AXES["tp"], Dtype, PATTERNS)):
        shape = shapes[number % len(shapes)]
        rows.append((PLAIN | {"tp": tp, "dtype": dtype, "pattern": pattern, "shape": shape.name},
                     f"{pattern} x {dtype} x tp {tp}; {shape.purpose}"))
    rows += [(PLAIN | {"tp": tp, "dtype": dtype, "shape": shape.name}, f"{dtype} x tp {tp}; {shape.purpose}")
             for tp, dtype in _TP_AND_DTYPE for shape in SHAPES]
    rows += [(PLAIN | {"spread": spread, "dtype": dtype, "tp": tp}, f"{dtype} x tp {tp}: {SPREADS[spread].purpose}")
             for spread, dtype, tp in product(SPREADS, Dtype, (1, 2, 3)) if SPREADS[spread].ep > 1 or tp > 1]
    cover = COVER.rows([row for row, _ in rows])
    return *rows, *((row, "pairwise cover of all axes") for row in cover)


def _gloo_cases() -> list[PlannedCase]:
    """Real processes and gloo's own order of summation, on a declared part of the matrix."""
    rows = [PLAIN | {"tp": tp, "dtype": dtype} for tp, dtype in product((2, 3, 4, 8), Dtype)]
    rows += [PLAIN | {"tp": 2, "shape": name, "dtype": Dtype.BF16} for name in ("T0.H64.I96.E4.K2", "T40.H72.I90")]
    rows += [PLAIN | {"tp": 4, "router": "sigmoid-groups", "shared": "shared-gate", "residual": True,
                      "dtype": Dtype.BF16}]
    cases = [row_case(row) for row in rows]
    planned = [PlannedCase(case=replace(case, problem=replace(case.problem, seed=1)), ranks=Ranks.GLOO,
                           purpose="gloo process ranks") for case in cases if case]
    return [*planned, PlannedCase(case=parse_case(EXACT_OVER_GLOO), ranks=Ranks.GLOO,
                                  purpose="exact in any order: that of gloo")]


SPREAD_DEGREES = {1: (2, 3, 4, 8), 2: (1, 2, 4), 3: (1, 2)}
"""tp degrees that process ranks are tried at, by ep degree."""


def _rank_cases() -> list[PlannedCase]:
    """Every way to spread a layer on 2, 3, 4, 6 and 8 processes, three dtypes, two layers each."""
    grids = [(name, tp) for name, spread in SPREADS.items() for tp in SPREAD_DEGREES[spread.ep]]
    shapes = [shape for shape in SHAPES if shape.num_experts > 2]
    planned = []
    for number, ((spread, tp), dtype, layer) in enumerate(product(grids, Dtype, range(2))):
        row = PLAIN | {"spread": spread, "tp": tp, "dtype": dtype, "shape": shapes[number % len(shapes)].name,
                       "pattern": PATTERNS[number // 2 % len(PATTERNS)]}
        row |= {"shared": SHARED[1 + number // 2 % 2], "residual": True} if layer else {}
        case = row_case(row) or row_case(row | {"pattern": Pattern.UNIFORM})
        assert case is not None
        planned.append(PlannedCase(case=case, ranks=Ranks.GLOO, purpose=f"{SPREADS[spread].purpose}, tp {tp}"))
    planned += _combination_cases(Ranks.GLOO)
    return planned + [replace(one, ranks=Ranks.GLOO) for one in _pinned(backward_ids()) if one.case.parallel.size > 1]


def _combination_cases(ranks: Ranks) -> list[PlannedCase]:
    """Ways to spread a layer that meet each other, plain and with all that must come in once."""
    layers = (("norm", "plain"), ("norm-sh83-shgate-res", "shared expert, gate and residual"))
    return [PlannedCase(case=parse_case(f"v1-T33.H96.I160.E8.K2-{dtype}-{words}-{spread}"), ranks=ranks,
                        purpose=f"{spread}: {what}")
            for (spread, (words, what)), dtype in zip(product(COMBINATIONS, layers), cycle(Dtype))]


QUICK_MODELS = ("olmoe.1b.7b.T8.E4-bf16-tp2", "granite3.1b.a400m.T16.E8-bf16-tp4", "qwen3.30b.a3b.T4.E8-bf16-tp8",
                "deepseek.v2.lite.T4.E4-fp16-tp2", "qwen3.30b.a3b.T4.E4-fp32")
"""Real widths that two cores manage in seconds; experts are cut in number, never in width."""

FULL_MODELS = ("mixtral.8x7b", "qwen1.5.moe.a2.7b", "qwen3.30b.a3b", "qwen3.next.80b.a3b", "olmoe.1b.7b", "deepseek.v2",
               "deepseek.v3", "glm4.5.air", "gptoss.20b", "llama4.scout", "minimax.m2", "nemotron3.nano.30b.a3b")
"""Whole layers for a GPU runner: other widths, routers and expert counts each. A nightly run takes every model."""

WHOLE_LAYER_TOKENS = 32


def _model_cases(tier_name: str) -> list[PlannedCase]:
    texts = [(f"v1-{text}", "published widths, fewer experts") for text in QUICK_MODELS]
    # A model whose router is outside the specification has a stand-in there, which is no published layer.
    names = [name for name, model in models().items() if model.routing != "injected"]
    chosen = {"quick": (), "full": FULL_MODELS, "nightly": names}[tier_name]
    texts += [(f"v1-{name}.T{WHOLE_LAYER_TOKENS}-bf16{tp}", f"{models()[name].title}, one whole layer")
              for name in chosen for tp in ("", "-tp8")]
    return [PlannedCase(case=parse_case(text), purpose=purpose) for text, purpose in texts]


def _seeds(planned: Iterable[PlannedCase], seed: int) -> list[PlannedCase]:
    return [replace(one, case=replace(one.case, problem=replace(one.case.problem, seed=seed)))
            for one in planned if not one.case.problem.model and one.ranks is Ranks.LOCAL]


@cache
def tier(name: str) -> Tier:
    """The tier of that name; raises UsageValueError that lists the names."""
    if name not in MINIMUM_EXECUTED:
        raise UsageValueError(f"unknown tier {name!r}; known: {', '.join(MINIMUM_EXECUTED)}")
    if name == "families":
        return _families()
    if name == "encoded":
        return Tier(name, tuple(PlannedCase(case=case, purpose=purpose) for case, purpose in encoded_cases("encoded")),
                    MINIMUM_EXECUTED[name], 0, 0)
    if name == "conformance":
        planned = [replace(one, ranks=Ranks.GLOO if one.case.parallel.size > 1 else Ranks.LOCAL)
                   for one in _pinned([(case.case_id, case.purpose) for case in conformance_cases()])]
        return Tier(name, tuple(planned), MINIMUM_EXECUTED[name], 0, 0)
    if name == "ranks":
        return Tier(name, tuple({one.case_id: one for one in _rank_cases()}.values()), MINIMUM_EXECUTED[name], 0, 0)
    rows = _smoke_rows() if name == "smoke" else _quick_rows()
    planned = [PlannedCase(case=case, purpose=purpose) for row, purpose in rows if (case := row_case(row))]
    planned.append(PlannedCase(case=parse_case(BIASED), purpose="biases of w2 and output added once, not tp times"))
    planned += _pinned(exact_ids(name))
    gradients = _pinned(backward_ids())
    if name == "smoke":
        planned += _gloo_cases()[:2] + [one for one in gradients if one.case_id in SMOKE_GRADIENTS]
    else:
        planned += _combination_cases(Ranks.LOCAL) + _gloo_cases() + gradients + _model_cases(name)
        planned += _pinned([*trigger_ids(), *larger_backward_ids()])
    if name == "nightly":
        planned += [one for seed in (2, 3) for one in _seeds(planned, seed)]
    planned += [PlannedCase(case=case, purpose=purpose) for case, purpose in encoded_cases(name)]
    unique = {one.case_id: one for one in reversed(planned)}
    cases = tuple(replace(one, other_batches=one.case_id in OTHER_BATCHES)
                  for one in reversed(list(unique.values())))
    covered, possible = set().union(*(COVER.pairs(row) for row, _ in rows if row_case(row))), COVER.possible
    return Tier(name, cases, MINIMUM_EXECUTED[name], len(covered & possible), len(possible))


def _pinned(named: list[tuple[str, str]]) -> list[PlannedCase]:
    return [PlannedCase(case=parse_case(text), purpose=purpose) for text, purpose in named]


def _families() -> Tier:
    planned = tuple(_pinned([*family_ids(), *exact_ids("families"), *backward_ids(whole_spec=True)]))
    return Tier("families", planned, MINIMUM_EXECUTED["families"], 0, 0)


def with_tp(planned: PlannedCase, tp: int) -> PlannedCase:
    """The same problem at another tensor-parallel degree; shares are for one degree and become equal ones."""
    parallel = replace(planned.case.parallel, tp=tp, splits=None)
    return replace(planned, case=replace(planned.case, parallel=parallel, token_shares=None))
