"""How a layer is spread over a grid of ranks: degrees, schedule, shares, and who holds which experts and tokens."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from moe_ref.contract.errors import is_integer, positive_faults, raise_faults
from moe_ref.contract.vocabulary import Hosting, Schedule, SharedPlacement, Tokens

Range = tuple[int, int]
"""[start, stop)."""

_WORDS = {"schedule": Schedule, "tokens": Tokens, "hosting": Hosting, "shared": SharedPlacement}


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """A grid of ep x tp ranks, rank = ep rank * tp + tp rank, and what each of them does.

    splits: one share per tp rank, e.g. (60, 40) or (1, 0); None means equal shares. A size N is cut at
    ceil(N * shares so far / all shares), so 32 over 3 ranks is 11, 11, 10 and every element has one owner.
    hosting: how experts go to ep ranks. redundant: experts of which there is one copy more each time they are named;
    the copies follow the E experts as E, E + 1 ... and are dealt out with them. tokens: who holds a token when the
    layer is called. shared: whether the shared expert is cut or whole on every rank; where tokens are replicated over
    ep it is cut over the whole grid, otherwise over tp. The gather schedule is for ep = 1 and replicated tokens;
    tokens sharded over tp go with reduce_scatter.
    """

    tp: int = 1
    ep: int = 1
    schedule: Schedule = Schedule.ALL_REDUCE
    splits: tuple[int, ...] | None = None
    tokens: Tokens = Tokens.REPLICATED
    hosting: Hosting = Hosting.CONTIGUOUS
    redundant: tuple[int, ...] = ()
    shared: SharedPlacement = SharedPlacement.SHARDED

    def __post_init__(self) -> None:
        faults = positive_faults(tp=self.tp, ep=self.ep)
        # Ranks compare the text of their Parallel, so equal ones are brought into one form.
        for name, words in _WORDS.items():
            value = getattr(self, name)
            if isinstance(value, str) and value in tuple(words):
                object.__setattr__(self, name, words(value))
            else:
                faults.append(f"{name}={value!r}, but should be one of {', '.join(words)}")
        for name in ("splits", "redundant"):
            if isinstance(getattr(self, name), list | tuple):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        faults += self._split_faults() + self._redundant_faults()
        raise_faults("Parallel", faults or self._combination_faults())

    def _split_faults(self) -> list[str]:
        if self.splits is None:
            return []
        if not isinstance(self.splits, tuple):
            return [f"splits={self.splits!r}, but should be a tuple of one share per rank, or None"]
        faults = []
        if len(self.splits) != self.tp:
            faults.append(f"splits has {len(self.splits)} shares, but should have one per rank, tp={self.tp}")
        return faults + share_faults("splits", self.splits)

    def _redundant_faults(self) -> list[str]:
        if isinstance(self.redundant, tuple) and all(is_integer(e) and e >= 0 for e in self.redundant):
            return []
        return [f"redundant={self.redundant!r}, but should be a tuple of expert numbers of at least 0"]

    def _combination_faults(self) -> list[str]:
        faults = []
        if self.tokens.over_tp and self.schedule is not Schedule.REDUCE_SCATTER:
            faults.append(f"tokens={self.tokens} with schedule={self.schedule}, but tokens sharded over tp are "
                          "gathered and their sums scattered, which is schedule=reduce_scatter")
        if self.schedule is Schedule.GATHER and (self.ep > 1 or self.tokens is not Tokens.REPLICATED):
            faults.append(f"schedule=gather with ep={self.ep} and tokens={self.tokens}, but it cuts columns over tp "
                          "alone: ep=1 and replicated tokens")
        named = [name for name, given in (("tokens", self.tokens.over_ep), ("redundant", bool(self.redundant)),
                                          ("hosting", self.hosting is not Hosting.CONTIGUOUS)) if given]
        if self.ep == 1 and named:
            faults.append(f"{', '.join(named)} given, but with ep=1 one rank hosts every expert")
        return faults

    @property
    def size(self) -> int:
        """Ranks of the grid."""
        return self.ep * self.tp

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(ep rank, tp rank) of a rank of the grid."""
        self.check_rank(rank)
        return divmod(rank, self.tp)

    def check_rank(self, rank: int) -> None:
        """Raise UsageValueError unless `rank` is an integer in [0, ep * tp)."""
        if not is_integer(rank) or not 0 <= rank < self.size:
            grid = f"tp={self.tp}" if self.ep == 1 else f"ep*tp={self.ep}*{self.tp}"
            raise_faults("Parallel", [f"rank={rank!r}, but should be an integer of at least 0 and below {grid}"])

    def ranges(self, size: int) -> tuple[Range, ...]:
        """The part of each tp rank along an axis of `size` elements."""
        return cut(size, self.splits or (1,) * self.tp)

    def shared_ranges(self, size: int) -> tuple[Range, ...]:
        """The part of each rank of the grid of the shared expert's intermediate axis."""
        if self.shared is SharedPlacement.REPLICATED:
            return ((0, size),) * self.size
        shares = self.splits or (1,) * self.tp
        return cut(size, shares) * self.ep if self.tokens.over_ep else cut(size, shares * self.ep)

    def check_redundant(self, num_experts: int) -> None:
        """Raise UsageValueError for a redundant expert that is none of the num_experts."""
        if self.redundant and max(self.redundant) >= num_experts:
            raise_faults("Parallel", [f"redundant={self.redundant}, but the layer has experts 0 to {num_experts - 1}"])

    def hosted(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """The experts of each ep rank in the order in which its weights hold them; a copy has its expert's number.

        Raises UsageValueError for a redundant expert that is none of the num_experts.
        """
        self.check_redundant(num_experts)
        experts = (*range(num_experts), *self.redundant)
        if self.hosting is Hosting.ROUND_ROBIN:
            return tuple(experts[rank::self.ep] for rank in range(self.ep))
        return tuple(experts[start:stop] for start, stop in cut(len(experts), (1,) * self.ep))


def share_faults(name: str, shares: tuple[int, ...]) -> list[str]:
    """A fault unless shares are integers of at least 0 and one is above 0."""
    if all(is_integer(share) and share >= 0 for share in shares) and any(shares):
        return []
    return [f"{name}={shares}, but shares should be integers of at least 0, one of them above"]


def cut(size: int, shares: tuple[int, ...]) -> tuple[Range, ...]:
    """`size` elements by shares: each cut is at ceil(size * shares so far / all shares)."""
    total = sum(shares)
    return tuple(pairwise([0] + [-(-size * so_far // total) for so_far in accumulate(shares)]))
