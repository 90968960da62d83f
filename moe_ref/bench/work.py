"""Operations and bytes of a layer and of its parts: all that is computed from shapes, and nothing else.

A product of (R, K) and (K, N) has 2 R K N operations, its gradients twice as many (counted so in arXiv 2104.04473,
appendix). R counts routed rows without padding. What an implementation computes again counts for nothing, nor do
activations and sums. Bytes are the least that must move: inputs and results once, weights of experts that have rows,
gradients of all experts; rows between the products may stay on the chip. Rates are therefore of useful work, as in
arXiv 2204.02311, appendix B.
"""

from dataclasses import dataclass

from moe_ref.bench.problem import Operation
from moe_ref.contract.spec import MoESpec


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes to and from memory."""

    flop: float
    num_bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.num_bytes + other.num_bytes)


@dataclass(frozen=True)
class Load:
    """T tokens, R routed rows, experts that have rows, bytes of an element."""

    tokens: int
    rows: int
    visited: int
    itemsize: int


def operation_work(spec: MoESpec, operation: Operation, load: Load) -> Work:
    """Of one operation; collectives are no part of it."""
    if operation is Operation.BACKWARD:
        return _backward(spec, load)
    tokens_moved = Work(0, 2 * load.tokens * spec.hidden_size * load.itemsize)
    total = _experts(spec, load) + tokens_moved
    if operation is Operation.EXPERTS or spec.router is None:
        return total
    # The tokens that the router reads are those that the experts read.
    columns = spec.router.num_choices + (spec.shared.num_gates if spec.shared else 0)
    return total + Work(2 * load.tokens * spec.hidden_size * columns, columns * spec.hidden_size * load.itemsize)


def part_work(spec: MoESpec, part: str, load: Load) -> Work | None:
    """Of the routed experts' `gate_up` (with the activation), `down`, or `combine`; None of any other part.

    Parts hand their rows on through memory: gate_up reads tokens and writes (R, I), down reads that and writes (R, H).
    None of layers with a shared expert too, whose rows an implementation may put through the same kernels.
    """
    if spec.shared is not None:
        return None
    hidden, inner, rows, size = spec.hidden_size, spec.intermediate_size, load.rows, load.itemsize
    projections = spec.experts.num_projections
    if part == "gate_up":
        weights = load.visited * projections * inner * hidden
        return Work(2 * rows * projections * inner * hidden, (weights + load.tokens * hidden + rows * inner) * size)
    if part == "down":
        return Work(2 * rows * inner * hidden, (load.visited * inner * hidden + rows * inner + rows * hidden) * size)
    if part == "combine":
        return Work(2 * rows * hidden, (rows + load.tokens) * hidden * size)
    return None


def _experts(spec: MoESpec, load: Load) -> Work:
    """Products of routed and shared experts, and their weights."""
    matrices = (spec.experts.num_projections + 1) * spec.intermediate_size * spec.hidden_size
    total = Work(2 * load.rows * matrices, load.visited * matrices * load.itemsize)
    if spec.shared is None:
        return total
    shared = (spec.shared.mlp.num_projections + 1) * spec.shared.intermediate_size * spec.hidden_size
    return total + Work(2 * load.tokens * shared, shared * load.itemsize)


def _backward(spec: MoESpec, load: Load) -> Work:
    """Gradients of both factors of every product; x, the gradients of x and of the output, and of every weight."""
    forward = _experts(spec, load)
    whole = _experts(spec, Load(load.tokens, load.rows, spec.num_experts, load.itemsize))
    tokens_moved = 3 * load.tokens * spec.hidden_size * load.itemsize
    return Work(2 * forward.flop, forward.num_bytes + whole.num_bytes + tokens_moved)
