"""What process ranks say while they work on a case, and what can be concluded from it when they fail.

A rank announces every collective before it enters it and after it has left it. Collectives that do not fit are so
found when the second rank announces its own, whatever the backend makes of them, and a rank that never comes is known.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec


class Entered(msgspec.Struct, frozen=True, tag=True):
    """The rank is about to enter a collective of the group of these ranks."""

    members: tuple[int, ...]
    operation: str
    signature: str

    def __str__(self) -> str:
        return self.operation + self.signature


class Left(msgspec.Struct, frozen=True, tag=True):
    """The rank has left the collective it entered last."""


class Told(msgspec.Struct, frozen=True, tag=True):
    """Progress, for people."""

    text: str


class Returned(msgspec.Struct, frozen=True, tag=True):
    """The rank has done its part; fit is False when it may not serve another case."""

    content: bytes
    fit: bool = True


class Raised(msgspec.Struct, frozen=True, tag=True):
    """The rank raised an error of this type, by its full name, or died, which is kind DIED."""

    kind: str
    message: str
    trace: str = ""


RankMessage = Entered | Left | Told | Returned | Raised


class RankError(Exception):
    """An error of a process rank: its type's full name, message and traceback, and where all ranks were then."""

    def __init__(self, kind: str, message: str, trace: str = "", places: str = "") -> None:
        super().__init__(message)
        self.kind, self.trace, self.places = kind, trace, places


MISMATCH, DIED = "CollectiveMismatch", "RankDied"

_Key = tuple[tuple[int, ...], int]


class RankWatch:
    """The state of the ranks of one case, from their messages."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ended: dict[int, Returned | Raised] = {}
        self._issued: Counter[tuple[int, tuple[int, ...]]] = Counter()
        # Who has issued each collective, those that some members have not, and the one that members disagree on.
        self._rounds: dict[_Key, dict[int, Entered]] = {}
        self._open: set[_Key] = set()
        self._disagreed: _Key | None = None
        self._inside: dict[int, _Key] = {}
        self._last: dict[int, tuple[Entered, int]] = {}

    def hear(self, rank: int, message: RankMessage) -> None:
        """Take a message of a rank, in the order in which it sent them."""
        if isinstance(message, Entered):
            self._enter(rank, message)
        elif isinstance(message, Left):
            self._inside.pop(rank, None)
        elif isinstance(message, Returned | Raised):
            self.ended[rank] = message

    def _enter(self, rank: int, entered: Entered) -> None:
        key = (entered.members, self._issued[rank, entered.members])
        self._issued[rank, entered.members] += 1
        self._inside[rank], self._last[rank] = key, (entered, key[1])
        requests = self._rounds.setdefault(key, {})
        requests[rank] = entered
        (self._open.discard if len(requests) == len(entered.members) else self._open.add)(key)
        if len({str(one) for one in requests.values()}) > 1:
            self._disagreed = self._disagreed or key

    @property
    def over(self) -> bool:
        """Whether every rank has ended."""
        return len(self.ended) == self.size

    @property
    def finished(self) -> bool:
        """Whether every rank has returned, and nothing was wrong."""
        return self.over and not self.failed

    @property
    def failed(self) -> bool:
        """Whether something is wrong, whatever the other ranks will do."""
        return self.disagree or bool(self._early()) or bool(self.raised())

    @property
    def disagree(self) -> bool:
        """Whether members of a group issued different collectives."""
        return self._disagreed is not None

    @property
    def settled(self) -> bool:
        """Whether no rank is at work: each has ended or waits for members that have not come."""
        return not self.at_work()

    def at_work(self) -> list[int]:
        """Ranks that have not ended and wait for nobody."""
        waiting = self._waiting()
        return [rank for rank in range(self.size) if rank not in self.ended and rank not in waiting]

    def raised(self, kind: str = "") -> list[int]:
        """Ranks that raised an error or died; of one kind of error only, if it is named."""
        return [rank for rank, end in self.ended.items() if isinstance(end, Raised) and kind in ("", end.kind)]

    def _waiting(self) -> dict[int, _Key]:
        """What ranks are in, where a member has not come or did not live to see the end; one that raised waited too."""
        return {rank: key for rank, key in self._inside.items() if key == self._disagreed or any(
            member not in self._rounds[key] or (member in self.ended and self._inside.get(member) == key)
            for member in key[0])}

    def _early(self) -> list[int]:
        """Ranks that returned without a collective which others have issued."""
        return sorted({rank for key in self._open for rank in key[0]
                       if rank not in self._rounds[key] and isinstance(self.ended.get(rank), Returned)})

    def waiting_words(self) -> str:
        """As "ranks [0, 2] wait in all_reduce((5, 32), 'torch.float32') #0 of ranks [0, 1, 2]"; "" if none waits."""
        waiting: dict[_Key, list[int]] = {}
        for rank, key in sorted(self._waiting().items()):
            if rank not in self.raised(DIED):
                waiting.setdefault(key, []).append(rank)
        return "; ".join(f"{rank_words(ranks)} wait{'s' * (len(ranks) == 1)} in {_call_words(*self._last[ranks[0]])}"
                         for key, ranks in waiting.items())

    def mismatch(self) -> tuple[list[int], str]:
        """The ranks to blame and what they did: those few that issued another collective than the rest, that returned
        early, or, when all ranks wait for each other, all of them; no rank and "" when none of this happened."""
        if self._disagreed is not None:
            return self._disagreement(self._disagreed)
        if self.raised():
            return [], ""
        if early := self._early():
            # The root of a broadcast waits for nobody.
            key = min(key for key in self._open if set(early) & (set(key[0]) - set(self._rounds[key])))
            ranks = sorted(self._rounds[key])
            issued = f"{rank_words(ranks)} issued {_call_words(self._rounds[key][ranks[0]], key[1])}"
            return early, f"{rank_words(early)} returned, but {self.waiting_words() or issued}"
        if self.settled and self._waiting():
            return sorted(self._waiting()), f"no rank can go on: {self.waiting_words()}"
        return [], ""

    def _disagreement(self, key: _Key) -> tuple[list[int], str]:
        issued: dict[str, list[int]] = {}
        for rank, entered in sorted(self._rounds[key].items()):
            issued.setdefault(str(entered), []).append(rank)
        # The few differ from the many; of as many, the later ones from the first.
        many, *few = sorted(issued, key=lambda text: (-len(issued[text]), issued[text]))
        odd = few[0]
        members, number = key
        group = "" if len(members) == self.size else f" of ranks {list(members)}"
        return issued[odd], (f"collective #{number}{group}: {rank_words(issued[odd])} issued {odd}, "
                             f"but {rank_words(issued[many])} issued {many}")

    def answers(self, places: str) -> list[bytes | RankError]:
        """What each rank returned, or its error; `places` goes with the errors of those to blame."""
        blamed, text = self.mismatch()
        return [RankError(MISMATCH, text, places=places) if rank in blamed else self._answer(rank, places)
                for rank in range(self.size)]

    def _answer(self, rank: int, places: str) -> bytes | RankError:
        end = self.ended.get(rank)
        if isinstance(end, Returned):
            return end.content
        # What a backend makes of a mismatch, or of a member's death, is not where the trouble began.
        if end is None or self.disagree or (self.raised(DIED) and end.kind != DIED and rank in self._inside):
            return RankError("RankStopped", "was waiting for a rank that failed")
        waiting = self.waiting_words() if end.kind == DIED else ""
        return RankError(end.kind, f"{end.message}; {waiting}" if waiting else end.message, end.trace, places)

    def places(self, ranks: Iterable[int], frames: Mapping[int, str]) -> str:
        """One line for ranks in the same place: where in the code, and in or after which collective."""
        lines: dict[str, list[int]] = {}
        for rank in ranks:
            where = "before any collective"
            if rank in self._last:
                where = f"{'in' if rank in self._inside else 'after'} {_call_words(*self._last[rank])}"
            frame = "returned" if isinstance(self.ended.get(rank), Returned) else frames.get(rank, "no stack")
            lines.setdefault(f"{frame}, {where}", []).append(rank)
        return "\n".join(f"{rank_words(ranks)}: {text}" for text, ranks in lines.items())


def _call_words(entered: Entered, number: int) -> str:
    return f"{entered} #{number} of ranks {list(entered.members)}"


def rank_words(ranks: list[int]) -> str:
    """As "rank 1" or "ranks [0, 2]"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"
