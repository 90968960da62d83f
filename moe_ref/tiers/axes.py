"""The axes of the matrix and how a row of axis values becomes a case."""

from dataclasses import dataclass, replace

from moe_ref.contract.case import Case, Problem
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import (
    Data,
    Dtype,
    Hosting,
    Pattern,
    Schedule,
    SharedPlacement,
    Storage,
    Tokens,
)
from moe_ref.tiers.cover import Cover, Row


@dataclass(frozen=True)
class Shape:
    """Sizes of a small layer and why they were chosen; num_experts 0 is a dense MLP."""

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    purpose: str

    @property
    def name(self) -> str:
        experts = f".E{self.num_experts}.K{self.top_k}" if self.num_experts else ""
        return f"T{self.num_tokens}.H{self.hidden_size}.I{self.intermediate_size}{experts}"


SHAPES = (
    # Sizes that divide no tile, next to sizes that divide all of them.
    Shape(33, 96, 160, 8, 2, "half-filled tiles in every direction"),
    Shape(17, 80, 72, 5, 3, "five experts: nothing is a power of two"),
    Shape(21, 130, 50, 16, 4, "hidden one step past two tiles, experts with one row"),
    Shape(7, 257, 129, 6, 1, "one past four tiles in hidden, one past two in intermediate; top-1"),
    Shape(64, 64, 128, 4, 2, "everything divides every tile"),
    # The edges of the number of tokens.
    Shape(0, 64, 96, 4, 2, "no token at all"),
    Shape(1, 64, 96, 4, 2, "a single token"),
    # Coincidences, in which a wrong axis or a missing transpose still has the right shape.
    Shape(8, 64, 64, 8, 2, "T = E and H = I"),
    Shape(12, 128, 64, 4, 2, "H = 2 I: w13 and its transpose look alike"),
    # Routing extremes.
    Shape(19, 48, 33, 64, 8, "many experts, most of them empty; 33 columns over 8 ranks"),
    Shape(140, 64, 65, 3, 2, "more rows per expert than the largest row tile"),
    Shape(40, 72, 90, 0, 0, "a dense gated MLP: no router"),
)

@dataclass(frozen=True)
class Spread:
    """How a layer is spread beyond its tp degree; uneven: of the tokens where they are sharded, else of the columns."""

    purpose: str
    ep: int = 1
    schedule: Schedule = Schedule.ALL_REDUCE
    tokens: Tokens = Tokens.REPLICATED
    hosting: Hosting = Hosting.CONTIGUOUS
    shared: SharedPlacement = SharedPlacement.SHARDED
    redundant: bool = False
    uneven: bool = False

    def over(self, tp: int, num_experts: int) -> tuple[Parallel, tuple[int, ...] | None]:
        """The grid for a tp degree, and the shares of the tokens."""
        is_sharded = self.tokens is not Tokens.REPLICATED
        parts = self.ep * tp if is_sharded else tp
        shares = tuple(reversed(range(parts))) if self.uneven and parts > 1 else None
        copies = tuple(sorted({0, num_experts - 1})) if self.redundant else ()
        parallel = Parallel(tp=tp, ep=self.ep, schedule=self.schedule, tokens=self.tokens, hosting=self.hosting,
                            shared=self.shared, redundant=copies, splits=None if is_sharded else shares)
        return parallel, shares if is_sharded else None


ROUTERS = ("softmax", "softmax-norm", "sigmoid-norm-bias", "sigmoid-groups", "softmax-groups")
SHARED = ("none", "shared", "shared-gate")

SPREADS: dict[str, Spread] = {
    "plain": Spread("one all-reduce after the merge"),
    "rows": Spread("one all-reduce before the merge", schedule=Schedule.ALL_REDUCE_ROWS),
    "scatter": Spread("reduce-scatter and all-gather", schedule=Schedule.REDUCE_SCATTER),
    "gather": Spread("no row split: gathers", schedule=Schedule.GATHER),
    "sequence": Spread("tokens sharded over tp", schedule=Schedule.REDUCE_SCATTER, tokens=Tokens.SHARDED_TP),
    "uneven": Spread("uneven shares, the last rank without columns", uneven=True),
    "whole-shared": Spread("a shared expert whole on every rank", shared=SharedPlacement.REPLICATED),
    "ep": Spread("experts over two ranks, tokens on both", ep=2),
    "ep-copies": Spread("experts dealt out in turn to three ranks, two of them twice", ep=3, redundant=True,
                        hosting=Hosting.ROUND_ROBIN),
    "dispatch": Spread("rows travel to their experts and back", ep=2, tokens=Tokens.SHARDED_EP),
    "dispatch-uneven": Spread("uneven tokens over both axes, a rank without any", ep=2, tokens=Tokens.SHARDED,
                              uneven=True, schedule=Schedule.REDUCE_SCATTER),
}

COMBINATIONS = (
    "tp2-ep2-allreducerows", "tp2-ep2-reducescatter", "tp2-ep2-wholeshared", "tp2-ep2-tokensep-wholeshared",
    "tp2-ep2-reducescatter-tokensboth-wholeshared", "ep2-tokensep-copy0.7", "ep2-tokensep-roundrobin",
    "tp2-ep2-split3.1", "tp2-split0.1", "tp3-split0.2.1-reducescatter",
    "tp2-ep2-reducescatter-tokenstp-share0.1",
    "tp2-split3.1-gather", "tp2-ep2-allreducerows-tokensep", "tp2-ep2-reducescatter-tokensep", "ep3-copy0.0",
    "ep2-copy0",
    "ep3-tokensep-share0.2.1-roundrobin-copy7.7-wholeshared", "tp2-ep2-split0.1-tokensep-roundrobin",
)
"""Spreads that differ from the plain one in several ways at once, where each way alone can be right and their meeting
wrong; the empty rank comes first here."""

PATTERNS = (Pattern.UNIFORM, Pattern.ZIPF, Pattern.ONE_HOT, Pattern.EMPTY, Pattern.ALL_TO_ONE, Pattern.TIES)
"""Those that any router and any data can meet; cases of the others are pinned."""

AXES: dict[str, tuple] = {
    "shape": tuple(shape.name for shape in SHAPES), "dtype": tuple(Dtype), "tp": (1, 2, 3, 4, 8),
    "pattern": PATTERNS, "router": ROUTERS, "activation": ("silu", "gelu", "gelu_tanh"), "shared": SHARED,
    "residual": (False, True), "data": (Data.UNIT, Data.OUTLIER),
    "storage": (Storage.OUT_IN, Storage.IN_OUT, Storage.INTERLEAVED, Storage.IN_OUT_INTERLEAVED),
    "spread": tuple(SPREADS),
}
"""Every axis and its values, the plainest first."""

PLAIN: Row = {name: values[0] for name, values in AXES.items()} | {"router": "softmax-norm"}


def shape_named(name: object) -> Shape:
    """The shape of that name."""
    return next(shape for shape in SHAPES if shape.name == name)


def row_case(row: Row) -> Case | None:
    """The case of a row; None where its values exclude each other (a dense layer has no routing pattern)."""
    shape = shape_named(row["shape"])
    if shape.num_experts == 0:
        if row["pattern"] is not Pattern.UNIFORM or row["router"] != PLAIN["router"]:
            return None
    mlp = MLP(activation=row["activation"])  # pyrefly: ignore
    shared = None
    if row["shared"] != "none":
        gate = "sigmoid" if row["shared"] == "shared-gate" else "none"
        shared = SharedExpert(intermediate_size=shape.intermediate_size // 2 + 3, mlp=mlp, gate=gate)
    try:
        spec = MoESpec(hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
                       router=_router(row["router"], shape), experts=mlp, shared=shared)
        spread = SPREADS[str(row["spread"])]
        if row["tp"] == 1 and spread.ep == 1 and spread.uneven:
            return None
        parallel, token_shares = spread.over(int(str(row["tp"])), shape.num_experts or 1)
        problem = Problem(spec=spec, num_tokens=shape.num_tokens, dtype=Dtype(row["dtype"]),
                          pattern=Pattern(row["pattern"]), data=Data(row["data"]), residual=bool(row["residual"]))
    except UsageValueError:
        return None
    return Case(problem=problem, parallel=parallel, token_shares=token_shares, storage=Storage(row["storage"]))


def _router(kind: object, shape: Shape) -> Router | None:
    if shape.num_experts == 0:
        return None
    plain = Router(num_experts=shape.num_experts, top_k=shape.top_k, renormalize="norm" in str(kind))
    if kind in ("softmax", "softmax-norm"):
        return plain
    if kind == "sigmoid-norm-bias":
        return replace(plain, score="sigmoid", selection_bias="score")
    groups = next((n for n in (4, 3, 2) if shape.num_experts % n == 0 and shape.num_experts // n > 1), None)
    if groups is None:
        raise UsageValueError(f"{shape.num_experts} experts form no groups")
    # Fewer groups than experts are kept: the K best would always lie in the K best groups.
    kept = max(-(-shape.top_k * groups // shape.num_experts), min(-(-groups // 2), shape.top_k - 1))
    grouped = replace(plain, num_groups=groups, num_groups_kept=kept)
    if kind == "softmax-groups":
        return replace(grouped, scaling_factor=16.0)
    return replace(grouped, score="sigmoid", selection_bias="score", group_score="top2_sum", renormalize=True,
                   renormalize_epsilon=1e-20, scaling_factor=2.5)


COVER = Cover(AXES, tuple(PLAIN | {"shape": shape.name, "tp": tp} for shape in SHAPES for tp in (1, 2)),
              lambda row: row_case(row) is not None)
"""Of otherwise plain rows one takes whatever is possible: any shape, one rank and two."""
