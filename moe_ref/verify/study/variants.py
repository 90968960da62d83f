"""Ten right layers of one contract that differ in order, reduction, machine, and in what they show."""

from dataclasses import dataclass
from functools import partial

from moe_ref.contract.vocabulary import Dtype, Stage
from moe_ref.numerics.summation import matmul
from moe_ref.simulated.layer import STAGES, SimulatedLayer
from moe_ref.simulated.reduction import Reduction
from moe_ref.simulated.subjects import on_device
from moe_ref.verify.study.draws import Chooser, Draw
from moe_ref.verify.study.judging import Judged, judged

REDUCTIONS: tuple[Reduction, ...] = ("ring", "tree", "once", "rank_order")
FUSED = tuple(stage for stage in STAGES if stage is not Stage.GATE_UP)
"""What a kernel shows that keeps gate and up in registers."""
HIDING: tuple[tuple[Stage, ...], ...] = (
    (Stage.IDS, Stage.WEIGHTS, Stage.DOWN), (Stage.IDS, Stage.ACT, Stage.MERGED), (Stage.MERGED,),
    (Stage.LOGITS, Stage.IDS, Stage.WEIGHTS), (Stage.IDS, Stage.WEIGHTS, Stage.GATE_UP, Stage.DOWN))
"""What layers show that hide some of their stages."""


@dataclass(frozen=True)
class Variant:
    """A right layer, the hardware class that its sums belong to, and the stages that it shows."""

    name: str
    layer: SimulatedLayer
    hardware: str = "cpu"
    shown: tuple[Stage, ...] = STAGES

    def run(self, draw: Draw) -> Judged:
        """What the harness says of it."""
        ranks = self.layer.run(draw.case, draw.inputs)
        return judged(draw.case, draw.inputs, ranks, draw.numerics, self.hardware, self.shown)


def variants(draw: Draw) -> tuple[Variant, ...]:
    """Every order on a CPU, one that hides some stages and one that hides all, and two truncating tensor cores.

    Which reduction goes with which, where rings start and what is hidden changes from draw to draw. Operands of fp32,
    activations that are not stored among them, are no tensor core's: the devices add their products in fp32.
    """
    choose, stored = Chooser(draw.number), draw.numerics.storage
    dtype = draw.case.problem.dtype if Stage.ACT in stored else Dtype.FP32
    first, seed = choose.one("reduction", range(4)), draw.number
    block = choose.one("block", (8, 16, 32, 64, 128))
    orders = {
        "sequential": partial(matmul, order="sequential"), "reversed": partial(matmul, order="reversed"),
        "blocked": partial(matmul, order="blocked", block=block), "pairwise": partial(matmul, order="pairwise"),
        "split_k": partial(matmul, order="split_k", parts=choose.one("parts", (2, 4, 8)), seed=seed),
        "shuffled": partial(matmul, order="shuffled", seed=seed)}
    some, black = choose.one("partly hidden", tuple(orders)), choose.one("black box", tuple(orders))
    products = [("sequential", orders["sequential"], "cpu", STAGES), ("reversed", orders["reversed"], "cpu", FUSED),
                ("blocked", orders["blocked"], "cpu", FUSED), ("pairwise", orders["pairwise"], "cpu", STAGES),
                ("split_k", orders["split_k"], "cpu", STAGES), ("shuffled", orders["shuffled"], "cpu", FUSED),
                (f"{some}, partly hidden", orders[some], "cpu", choose.one("hiding", HIDING)),
                (f"{black}, black box", orders[black], "cpu", ()),
                ("hopper", on_device("sm90")(dtype), "sm90", FUSED if draw.number % 2 else STAGES),
                ("ampere", on_device("sm80")(dtype), "sm80", STAGES if draw.number % 2 else FUSED)]
    layers = [SimulatedLayer(draw.numerics, product, REDUCTIONS[(first + place) % 4], rotation=seed % 8)
              for place, (_, product, _, _) in enumerate(products)]
    return tuple(Variant(name, layer, hardware, shown)
                 for layer, (name, _, hardware, shown) in zip(layers, products, strict=True))
