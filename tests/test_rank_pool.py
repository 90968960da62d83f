"""Protects the pool of process ranks: many cases on the same ranks, failures that are named and end with their case."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import Groups
from moe_ref.inputs.shards import build_shards
from moe_ref.verify.child.process_ranks import RankPool, RanksHung
from moe_ref.verify.child.rank_watch import Entered, Left, RankError, RankWatch, Returned

ONES = torch.ones(4)


def _place(groups: Groups) -> bytes:
    """Where this rank is, and what its groups add up to; the world is more than the grid."""
    tp, ep = groups.tp, groups.ep
    assert dist.get_world_size() > tp.size * ep.size
    number = torch.tensor([float(groups.rank)])
    return msgspec.json.encode([groups.rank, tp.all_reduce(number).tolist(), ep.all_reduce(number).tolist()])


def _waits_for_rank_one(groups: Groups, instead: Callable[[], object]) -> bytes:
    """All ranks meet once; then rank 1 does something else where the others reduce."""
    groups.tp.all_reduce(ONES)
    if groups.rank == 1:
        instead()
    else:
        groups.tp.all_reduce(ONES)
    return b""


def _raise() -> None:
    raise ZeroDivisionError("no such tile")


def _crossed(groups: Groups) -> bytes:
    """Half of a 2x2 grid enters tp first, half ep, so that everyone waits for a neighbour."""
    for group in (groups.tp, groups.ep) if groups.rank in (0, 3) else (groups.ep, groups.tp):
        group.all_reduce(ONES)
    return b""


def _own_collectives(groups: Groups) -> bytes:
    """A subject that calls torch.distributed itself, and rank 1 does not."""
    if groups.rank != 1:
        dist.all_reduce(ONES.clone(), group=groups.tp.group)  # type: ignore[attr-defined]
    else:
        time.sleep(3600)
    return b""


def _own_group(groups: Groups) -> bytes:
    dist.new_group([0, 1])
    return b""


BODIES: dict[str, Callable[[Groups], bytes]] = {
    "place": _place,
    "other operation": lambda groups: _waits_for_rank_one(groups, lambda: groups.tp.all_gather(ONES)),
    "other shape": lambda groups: _waits_for_rank_one(groups, lambda: groups.tp.all_reduce(torch.ones(9))),
    "other dtype": lambda groups: _waits_for_rank_one(groups, lambda: groups.tp.all_reduce(ONES.double())),
    "early return": lambda groups: _waits_for_rank_one(groups, lambda: None),
    "exit": lambda groups: _waits_for_rank_one(groups, lambda: os._exit(7)),
    "segmentation fault": lambda groups: _waits_for_rank_one(groups, lambda: ctypes.string_at(0)),
    "kill": lambda groups: _waits_for_rank_one(groups, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "error": lambda groups: _waits_for_rank_one(groups, _raise),
    "sleep": lambda groups: _waits_for_rank_one(groups, lambda: time.sleep(3600)),
    "crossed": _crossed,
    "own collectives": _own_collectives,
    "own group": _own_group,
}


def _body(groups: Groups, device: torch.device, job: bytes, tell: Callable[[str], None]) -> bytes:
    tell("at work")
    return BODIES[job.decode()](groups)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """One pool for all tests, as a child has one for all cases."""
    made = RankPool(_body)
    yield made
    made.close()


def _check_places(answers: list[bytes | RankError], tp: int, ep: int) -> None:
    for rank, answer in enumerate(answers):
        assert isinstance(answer, bytes), answer
        row, column = divmod(rank, tp)
        assert msgspec.json.decode(answer) == [rank, [float(sum(range(row * tp, row * tp + tp)))],
                                               [float(sum(range(column, tp * ep, tp)))] if ep > 1 else [float(rank)]]


GRIDS = [(2, 1), (3, 1), (4, 1), (2, 2), (8, 1), (2, 4), (1, 2), (1, 1)]


def test_many_cases_on_the_same_ranks(pool: RankPool) -> None:
    """24 cases of 1 to 8 ranks: 9 processes are forked, one to spare, and none of them twice."""
    seconds: dict[str, list[float]] = {}
    for tp, ep in GRIDS * 3:
        started = time.monotonic()
        _check_places(pool.run(tp, b"place", ep=ep), tp, ep)
        seconds.setdefault(f"{tp}x{ep}", []).append(time.monotonic() - started)
    assert pool.num_forked == 9
    print("ms per case:", {grid: [round(1000 * one, 1) for one in times] for grid, times in seconds.items()})


HERE = "tests/test_rank_pool.py"
REDUCED, WAIT = "all_reduce((4,), 'torch.float32')", "wait in all_reduce((4,), 'torch.float32') #1 of ranks [0, 1, 2]"

# What rank 1 does; the kind of its error; its message; words of where all ranks were.
FAILURES = {
    "other operation": ("CollectiveMismatch", "collective #1: rank 1 issued all_gather((), 'torch.float32'), "
                        f"but ranks [0, 2] issued {REDUCED}", f"ranks [0, 2]: in _waits_for_rank_one, {HERE}:"),
    "other shape": ("CollectiveMismatch", "collective #1: rank 1 issued all_reduce((9,), 'torch.float32'), "
                    f"but ranks [0, 2] issued {REDUCED}", "in all_reduce((9,), 'torch.float32') #1 of ranks [0, 1, 2]"),
    "other dtype": ("CollectiveMismatch", "collective #1: rank 1 issued all_reduce((4,), 'torch.float64'), "
                    f"but ranks [0, 2] issued {REDUCED}", "all_reduce((4,), 'torch.float64') #1 of ranks [0, 1, 2]"),
    "early return": ("CollectiveMismatch", f"rank 1 returned, but ranks [0, 2] {WAIT}",
                     f"rank 1: returned, after {REDUCED} #0"),
    "exit": ("RankDied", f"rank 1 ended with exit code 7; ranks [0, 2] {WAIT}", "rank 1: no stack, after all_reduce"),
    "segmentation fault": ("RankDied", f"rank 1 was killed by SIGSEGV; ranks [0, 2] {WAIT}", "rank 1: in string_at, "),
    "kill": ("RankDied", f"rank 1 was killed by SIGKILL; ranks [0, 2] {WAIT}",
             f"ranks [0, 2]: in _waits_for_rank_one, {HERE}:"),
    "error": ("builtins.ZeroDivisionError", "no such tile", f"rank 1: in _raise, {HERE}:"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_named_and_the_next_case_passes(pool: RankPool, failure: str) -> None:
    """Rank, collective and stack within seconds of a limit of a minute; then new ranks, none of the old left."""
    kind, message, places = FAILURES[failure]
    pool.run(3, b"place")
    old = _ranks_of(os.getpid())
    started = time.monotonic()
    answers = pool.run(3, failure.encode(), time_limit=60.0)
    assert time.monotonic() - started < 15.0
    first, second, third = answers
    assert isinstance(second, RankError)
    assert (second.kind, str(second)) == (kind, message)
    assert places in second.places
    for other in (first, third):
        assert isinstance(other, RankError)
        assert str(other) == "was waiting for a rank that failed"
    assert not _ranks_of(os.getpid())
    _check_places(pool.run(3, b"place"), 3, 1)
    assert not set(old) & set(_ranks_of(os.getpid()))


def test_a_rank_that_sleeps_is_named_when_time_is_up(pool: RankPool) -> None:
    """The limit is the caller's; the text has the sleeper's line and the collective of those who wait."""
    with pytest.raises(RanksHung) as raised:
        pool.run(3, b"sleep", time_limit=2.0)
    first, sleeper, others = str(raised.value).splitlines()
    assert first == f"rank 1 of 3 did not answer within 2 s; ranks [0, 2] {WAIT}"
    assert sleeper.startswith(f"rank 1: in <lambda>, {HERE}:")
    assert sleeper.endswith(f"after {REDUCED} #0 of ranks [0, 1, 2]")
    assert others.startswith(f"ranks [0, 2]: in _waits_for_rank_one, {HERE}:")
    _check_places(pool.run(3, b"place"), 3, 1)


def test_ranks_that_wait_for_each_other_are_found_before_the_limit(pool: RankPool) -> None:
    """A cycle over both axes of a grid: every collective fits, and none can complete."""
    started = time.monotonic()
    answers = pool.run(2, b"crossed", ep=2, time_limit=60.0)
    assert time.monotonic() - started < 15.0
    for answer in answers:
        assert isinstance(answer, RankError)
        assert str(answer).startswith(f"no rank can go on: rank 0 waits in {REDUCED} #0 of ranks [0, 1]; rank 1 waits")


def test_collectives_called_past_the_groups_show_their_stacks(pool: RankPool) -> None:
    """A subject that uses torch.distributed itself cannot be followed: the limit ends it, and its frames are named."""
    with pytest.raises(RanksHung, match=r"ranks \[0, 1, 2\] of 3 did not answer within 2 s") as raised:
        pool.run(3, b"own collectives", time_limit=2.0)
    assert f"in _own_collectives, {HERE}:" in str(raised.value)


def test_a_subject_with_groups_of_its_own_gets_ranks_of_its_own(pool: RankPool) -> None:
    """c10d counts groups to name them, so ranks that made some cannot make the next ones with ranks that did not."""
    _check_places(pool.run(2, b"place"), 2, 1)
    forked = pool.num_forked
    assert pool.run(2, b"own group") == [b"", b""]
    _check_places(pool.run(3, b"place"), 3, 1)
    assert pool.num_forked == forked + 4


def test_a_rank_that_died_between_two_cases_fails_neither(pool: RankPool) -> None:
    """Whatever ended it, the second case is not to blame and gets new ranks."""
    _check_places(pool.run(2, b"place"), 2, 1)
    idle = _ranks_of(os.getpid())
    os.kill(idle[0], signal.SIGKILL)
    os.waitid(os.P_PID, idle[0], os.WEXITED | os.WNOWAIT)
    _check_places(pool.run(2, b"place"), 2, 1)
    assert not set(idle) & set(_ranks_of(os.getpid()))


def test_progress_comes_from_the_first_rank_only(pool: RankPool) -> None:
    """Otherwise eight ranks would tell the same eight times."""
    told: list[str] = []
    pool.run(3, b"place", tell=told.append)
    assert told == ["at work"]


@pytest.mark.parametrize("text", ["tp3", "tp2-ep2"])
def test_a_rank_alone_makes_the_weights_it_has_among_all(text: str) -> None:
    """Every process rank makes its own shard; together they are the shards that virtual ranks are handed."""
    case = parse_case(f"v1-T5.H32.I48.E4.K2-bf16-norm-sh32-{text}")
    shards = build_shards(case.problem, case.parallel)
    for rank, shard in enumerate(shards):
        alone, = build_shards(case.problem, case.parallel, only=frozenset([rank]))
        for (name, tensor), (other_name, other) in zip(shard.named_tensors(), alone.named_tensors(), strict=True):
            assert name == other_name
            assert torch.equal(tensor, other), name


def test_the_odd_rank_out_of_four_is_blamed_in_any_order() -> None:
    """Three ranks that agree outweigh one that came first; of two against two, the later ones are blamed."""
    everyone = (0, 1, 2, 3)
    for order, odd, blamed in (((0, 1, 2, 3), {0}, [0]), ((3, 2, 1, 0), {2}, [2]), ((0, 1, 2, 3), {1, 3}, [1, 3])):
        watch = RankWatch(4)
        for rank in order:
            watch.hear(rank, Entered(everyone, "broadcast" if rank in odd else "all_reduce", "((4,), 'torch.float32')"))
        assert watch.disagree
        assert watch.mismatch()[0] == blamed


def test_a_collective_that_a_fast_rank_has_left_still_counts() -> None:
    """The root of a broadcast leaves before the others come; what they issue is compared all the same."""
    watch = RankWatch(2)
    watch.hear(0, Entered((0, 1), "broadcast", "((4,), 'torch.float32')"))
    watch.hear(0, Left())
    watch.hear(0, Returned(b""))
    assert not watch.failed
    watch.hear(1, Entered((0, 1), "broadcast", "((5,), 'torch.float32')"))
    assert watch.failed
    assert watch.mismatch() == ([1], "collective #0: rank 1 issued broadcast((5,), 'torch.float32'), "
                                     "but rank 0 issued broadcast((4,), 'torch.float32')")


def test_a_collective_that_nobody_waits_in_is_missed_all_the_same() -> None:
    """Some roots of a broadcast need no one else, so that both ranks end although one has left it out."""
    watch = RankWatch(2)
    for rank, message in ((0, Entered((0, 1), "broadcast", "((4,), 'torch.float32')")), (0, Left()), (0, Returned(b"")),
                          (1, Returned(b""))):
        assert not watch.failed
        watch.hear(rank, message)
    assert watch.over
    assert not watch.finished
    assert watch.mismatch() == (
        [1], "rank 1 returned, but rank 0 issued broadcast((4,), 'torch.float32') #0 of ranks [0, 1]")


def _ranks_of(process: int) -> list[int]:
    """Live children of a process that multiprocessing forked: they have its command line."""
    mine, found = Path(f"/proc/{process}/cmdline").read_bytes(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == process and state != "Z" and (folder / "cmdline").read_bytes() == mine:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


ORPHANS = """
import os, time
from moe_ref.verify.child.process_ranks import RankPool

def body(groups, device, job, tell):
    return str(os.getpid()).encode()

pool = RankPool(body)
print(*(answer.decode() for answer in pool.run(3)), flush=True)
time.sleep(600)
"""


def test_no_rank_outlives_its_parent() -> None:
    """A parent that is killed cannot end its ranks, so they end themselves."""
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        ranks = [int(number) for number in parent.stdout.readline().split()]
        assert len(ranks) == 3
        assert set(ranks) < set(_ranks_of(parent.pid))
        parent.kill()
    deadline = time.monotonic() + 10
    while (left := [rank for rank in ranks if _lives(rank)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_file_stays_behind_and_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nightly run forks hundreds of ranks; ranks meet in memory, so that even killed ones leave nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = RankPool(_body)
    open_before = len(os.listdir("/proc/self/fd"))
    _check_places(made.run(2, b"place"), 2, 1)
    assert not list(tmp_path.iterdir())
    made.close()
    assert len(os.listdir("/proc/self/fd")) == open_before
