"""How a layer is spread over ranks: sizes, shards and the logical placement of every parameter."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from moe_ref.contract.errors import is_integer, positive_faults, raise_faults
from moe_ref.contract.vocabulary import Schedule


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Tensor- and expert-parallel degrees, the schedule of the reduction, and uneven shares.

    splits: one positive share per tp rank, e.g. (60, 40); None means equal shares. A size N is cut at
    ceil(N * shares so far / all shares), so 32 over 3 ranks is 11, 11, 10 and every element has one owner.
    Expert parallelism (ep > 1) is part of the contract; no package here runs it yet and each says so.
    """

    tp: int = 1
    ep: int = 1
    schedule: Schedule = Schedule.ALL_REDUCE
    splits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        faults = positive_faults(tp=self.tp, ep=self.ep)
        # Ranks compare the text of their Parallel, so equal ones are brought into one form.
        if isinstance(self.schedule, str) and self.schedule in tuple(Schedule):
            object.__setattr__(self, "schedule", Schedule(self.schedule))
        else:
            faults.append(f"schedule={self.schedule!r}, but should be one of {', '.join(Schedule)}")
        if isinstance(self.splits, list | tuple):
            object.__setattr__(self, "splits", tuple(self.splits))
        raise_faults("Parallel", faults + self._split_faults())

    def _split_faults(self) -> list[str]:
        if self.splits is None:
            return []
        if not isinstance(self.splits, tuple):
            return [f"splits={self.splits!r}, but should be a tuple of one share per rank, or None"]
        faults = []
        if len(self.splits) != self.tp:
            faults.append(f"splits has {len(self.splits)} shares, but should have one per rank, tp={self.tp}")
        if not all(is_integer(share) and share > 0 for share in self.splits):
            faults.append(f"splits={self.splits}, but shares should be positive integers")
        return faults

    def check_rank(self, rank: int) -> None:
        """Raise UsageValueError unless `rank` is an integer in [0, tp)."""
        if not is_integer(rank) or not 0 <= rank < self.tp:
            raise_faults("Parallel", [f"rank={rank!r}, but should be an integer of at least 0 and below "
                                      f"tp={self.tp}"])

    def ranges(self, size: int) -> tuple[tuple[int, int], ...]:
        """[start, stop) of each tp rank along an axis of `size` elements."""
        shares = self.splits or (1,) * self.tp
        total = sum(shares)
        cuts = [0] + [-(-size * so_far // total) for so_far in accumulate(shares)]
        return tuple(pairwise(cuts))


@dataclass(frozen=True)
class Placement:
    """Logical placement of one parameter.

    "colwise" cuts the output features, "rowwise" the input features, whatever the storage order;
    the dims say which tensor dimension holds them (None: the parameter has no such features).
    """

    kind: Literal["colwise", "rowwise", "replicated"]
    input_dim: int | None
    output_dim: int | None

    @property
    def shard_dim(self) -> int | None:
        """The tensor dimension that is cut over tp ranks; None when every rank holds all of it."""
        return {"colwise": self.output_dim, "rowwise": self.input_dim, "replicated": None}[self.kind]


PLACEMENTS = {
    "w13_EGIH": Placement("colwise", input_dim=3, output_dim=2),
    "w2_EHI": Placement("rowwise", input_dim=2, output_dim=1),
    "w13_bias_EGI": Placement("colwise", input_dim=None, output_dim=2),
    "w2_bias_EH": Placement("rowwise", input_dim=None, output_dim=1),
    "router_EH": Placement("replicated", input_dim=1, output_dim=0),
    "router_bias_E": Placement("replicated", input_dim=None, output_dim=0),
    "selection_bias_E": Placement("replicated", input_dim=None, output_dim=0),
    "weight_scale_E": Placement("replicated", input_dim=None, output_dim=0),
    "shared_w13_GIH": Placement("colwise", input_dim=2, output_dim=1),
    "shared_w2_HI": Placement("rowwise", input_dim=1, output_dim=0),
    "shared_w13_bias_GI": Placement("colwise", input_dim=None, output_dim=1),
    "shared_w2_bias_H": Placement("rowwise", input_dim=None, output_dim=0),
    "shared_gate_SH": Placement("replicated", input_dim=1, output_dim=0),
    "output_bias_H": Placement("replicated", input_dim=None, output_dim=0),
}
"""Every parameter of MoEWeights. w13 is cut along I inside each half G: a cut of a merged 2I axis
would give rank 0 nothing but gate rows. A rowwise bias has no input features to cut: every rank holds it, and
rank 0 alone adds it, since the partial sums of all ranks are added up."""
