"""Right layers of all kinds, one per number: the same number is the same layer and the same inputs, everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case, Problem
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec, Router
from moe_ref.contract.vocabulary import Dtype, Format, Pattern, Stage
from moe_ref.inputs.build import Inputs
from moe_ref.inputs.philox import random_words
from moe_ref.simulated.subjects import usual_numerics
from moe_ref.verify.study.data import StudyData, study_inputs

LONG_EVERY = 40
"""One draw in so many has sums of 4096 terms and more."""
ALIKE_EVERY = 16
"""One draw in so many has outputs that are nearly equal, and many of them, since what is alike in their errors shows in
sums over all. Other kinds of data are as likely as each other."""
LONG, SHORT = (4096, 4096, 8192, 16384), (16, 24, 33, 48)
WIDTHS = (16, 20, 24, 33, 40, 48, 64, 64, 72, 96, 100, 127, 128, 192, 256, 320, 511, 512, 1024, 2048)
LARGEST = 3_000_000
"""Products of one layer, so that a run takes tenths of a second; fewer tokens where it is wide."""

CONTRACTS = ("stored_rows", "gate_up_stored", "registers", "fp32_partials", "weight_at_merge", "every_step")

_Choice = TypeVar("_Choice")


def numerics_of(contract: str, dtype: Dtype) -> Numerics:
    """A rounding contract by its name in CONTRACTS.

    stored_rows: the usual one. gate_up_stored: gate and up too. registers: the output alone. fp32_partials: what
    travels between ranks is fp32. weight_at_merge: rows are weighted when they are summed. every_step: as torch
    operators.
    """
    usual, model = usual_numerics(dtype), Format(dtype.value)
    if contract == "stored_rows":
        return usual
    if contract == "gate_up_stored":
        return replace(usual, storage={**usual.storage, Stage.GATE_UP: model})
    if contract == "registers":
        return Numerics(storage={Stage.REDUCED: model})
    if contract == "fp32_partials":
        return replace(usual, reduce=Format.FP32, storage={**usual.storage, Stage.MERGED: Format.FP32})
    if contract == "weight_at_merge":
        return replace(usual, weight_at="merge")
    assert contract == "every_step"
    return replace(usual, weight_at="merge", activation=model, merge=model,
                   storage={**usual.storage, Stage.GATE_UP: model, Stage.LOGITS: model, Stage.WEIGHTS: model})


@dataclass(frozen=True)
class Draw:
    """One layer: its case, the distribution of its inputs and its rounding contract."""

    number: int
    case: Case
    data: StudyData
    contract: str

    @property
    def numerics(self) -> Numerics:
        """The contract for the case's dtype."""
        return numerics_of(self.contract, self.case.problem.dtype)

    @cached_property
    def inputs(self) -> Inputs:
        """Tokens, weights and whatever is injected."""
        return study_inputs(self.case.problem, self.data)


@dataclass(frozen=True)
class Chooser:
    """Independent choices that belong to one draw, each by the name of its axis."""

    number: int

    def one(self, axis: str, options: Sequence[_Choice]) -> _Choice:
        """One of the options, all as likely."""
        return options[int(random_words("study", axis, self.number, 1)[0]) % len(options)]


def draw(number: int) -> Draw:
    """The layer of a number."""
    choose = Chooser(number)
    alike = choose.one("alike", (True,) + (False,) * (ALIKE_EVERY - 1))
    hidden, intermediate, num_tokens, experts = _many_outputs(choose) if alike else _sizes(choose)
    router = _router(choose, experts)
    mlp = MLP(activation=choose.one("activation", ("silu", "silu", "gelu", "gelu_tanh")),
              bias=choose.one("bias", (False, False, False, True)))
    pattern = Pattern.UNIFORM if router is None else choose.one("pattern", _patterns(router))
    spec = MoESpec(hidden_size=hidden, intermediate_size=intermediate, router=router, experts=mlp)
    dtype = choose.one("dtype", (Dtype.BF16, Dtype.BF16, Dtype.FP16, Dtype.FP32))
    problem = Problem(spec=spec, num_tokens=num_tokens, dtype=dtype, pattern=pattern,
                      residual=choose.one("residual", (False, False, True)), seed=number)
    tp = choose.one("tp", (1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8))
    uneven = tp > 1 and choose.one("uneven", (False, False, True))
    splits = tuple(choose.one(f"share {rank}", (1, 2, 3, 4)) for rank in range(tp)) if uneven else None
    case = Case(problem=problem, parallel=Parallel(tp=tp, splits=splits))
    others = tuple(one for one in StudyData if one is not StudyData.ALIKE)
    data = StudyData.ALIKE if alike else choose.one("data", others)
    return Draw(number, case, data, choose.one("contract", CONTRACTS))


def _many_outputs(choose: Chooser) -> tuple[int, int, int, int]:
    """The same, for up to 24576 outputs."""
    hidden, intermediate = (choose.one(f"{name} of many", (128, 256, 512)) for name in ("hidden", "intermediate"))
    return hidden, intermediate, choose.one("many tokens", (24, 32, 48)), choose.one("few experts", (0, 2, 4))


def _sizes(choose: Chooser) -> tuple[int, int, int, int]:
    """Hidden and intermediate size, tokens and experts; 0 experts for a dense layer."""
    if choose.one("long", (True,) + (False,) * (LONG_EVERY - 1)):
        long, short = choose.one("long width", LONG), choose.one("short width", SHORT)
        hidden, intermediate = choose.one("long axis", ((long, short), (short, long)))
        return hidden, intermediate, choose.one("few tokens", (1, 2, 3)), 2
    hidden, intermediate = choose.one("hidden", WIDTHS), choose.one("intermediate", WIDTHS)
    num_tokens = choose.one("tokens", (1, 3, 5, 8, 12, 16, 17, 24, 33))
    affordable = max(1, LARGEST // (6 * hidden * intermediate))
    return hidden, intermediate, min(num_tokens, affordable), choose.one("experts", (0, 2, 3, 4, 4, 5, 8, 12))


def _router(choose: Chooser, experts: int) -> Router | None:
    if experts == 0:
        return None
    renormalize = choose.one("renormalize", (True, True, False))
    return Router(num_experts=experts, top_k=min(experts, choose.one("top_k", (1, 2, 2, 3, 4))),
                  score=choose.one("score", ("softmax", "softmax", "sigmoid")), renormalize=renormalize,
                  scaling_factor=choose.one("scaling", (1.0, 1.0, 2.5)))


def _patterns(router: Router) -> tuple[Pattern, ...]:
    """Half of the layers compute their own logits."""
    injected = (Pattern.ZIPF, Pattern.TIES, Pattern.ONE_HOT, Pattern.ALL_TO_ONE)
    spare = router.num_experts - router.top_k >= 2
    return (Pattern.UNIFORM,) * 5 + injected + (Pattern.EMPTY,) * spare
