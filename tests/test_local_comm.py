"""Protects virtual ranks: sums in rank order, uneven parts, and mistakes that end a run at once instead of hanging.

Every run happens in a thread that is joined with a time limit: a hang fails the test, it does not stop the suite.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import pytest
import torch

from moe_ref.contract.comm import CommCall, CountingComm, SoloComm, grid_groups
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.local_comm import CollectiveMismatch, LocalComm, run_virtual_ranks

TIME_LIMIT_SECONDS = 20.0


def run(size: int, body: Callable[[LocalComm], object],
        mode: Callable[[], AbstractContextManager] = nullcontext) -> list:
    """run_virtual_ranks under a wall-clock guard, called inside `mode`."""
    outcome: dict[str, object] = {}

    def guarded() -> None:
        try:
            with mode():
                outcome["results"] = run_virtual_ranks(size, body)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(TIME_LIMIT_SECONDS)
    assert not thread.is_alive(), f"virtual ranks hang: no result within {TIME_LIMIT_SECONDS:g} s"
    if "error" in outcome:
        raise outcome["error"]
    return outcome["results"]


def test_sums_run_in_rank_order() -> None:
    """2^24 + 1 + 1 - 2^24 in fp32 is 0 from the left, 2 in exact arithmetic and 1 from the right."""
    addends = [2.0**24, 1.0, 1.0, -(2.0**24)]
    results = run(4, lambda comm: comm.all_reduce(torch.tensor([addends[comm.rank]])))
    assert [result.item() for result in results] == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sums_run_in_the_tensors_dtype(dtype: torch.dtype) -> None:
    """1 + 2^-p rounds back to 1 where p is the number of significant bits, on every hop."""
    half_ulp = torch.finfo(dtype).eps / 2
    results = run(3, lambda comm: comm.all_reduce(torch.tensor([[1.0, half_ulp, half_ulp][comm.rank]], dtype=dtype)))
    assert all(result.dtype == dtype and result.item() == 1.0 for result in results)


def test_all_gather_takes_uneven_parts() -> None:
    """Ranks hold 0, 1 and 2 rows; everyone gets all three parts in rank order."""
    results = run(3, lambda comm: comm.all_gather(torch.full((comm.rank, 2), float(comm.rank))))
    for parts in results:
        assert [part.tolist() for part in parts] == [[], [[1.0, 1.0]], [[2.0, 2.0]] * 2]
        assert all(part.shape[1] == 2 for part in parts)


def test_reduce_scatter_takes_uneven_parts() -> None:
    """Rows 0..3 of the sum go as 1, 0 and 3 rows; the sum itself is 0 + 1 + 2 times the row number."""
    rows = (1, 0, 3)
    results = run(3, lambda comm: comm.reduce_scatter(comm.rank * torch.arange(4.0), rows))
    assert [result.tolist() for result in results] == [[0.0], [], [3.0, 6.0, 9.0]]


def test_all_to_all_takes_uneven_parts() -> None:
    """Rank r sends r + s rows of the value 10 r + s to rank s; s sees them in the order of their senders."""
    def body(comm: LocalComm) -> list[torch.Tensor]:
        return comm.all_to_all([torch.full((comm.rank + s,), 10.0 * comm.rank + s) for s in range(comm.size)])

    for s, parts in enumerate(run(3, body)):
        assert [part.tolist() for part in parts] == [[10.0 * r + s] * (r + s) for r in range(3)]


def test_results_come_in_rank_order() -> None:
    """Whatever the ranks communicate in between."""
    def body(comm: LocalComm) -> int:
        for _ in range(3):
            comm.all_reduce(torch.ones(1))
        return comm.rank

    assert run(5, body) == [0, 1, 2, 3, 4]
    assert run(1, body) == [0]


def test_ranks_never_interleave() -> None:
    """Between two collectives a rank runs alone: what it notes down stays together, in rank order."""
    notes: list[tuple[int, int]] = []

    def body(comm: LocalComm) -> None:
        for step in range(3):
            for _ in range(4):
                notes.append((step, comm.rank))
            comm.all_reduce(torch.ones(1))

    run(3, body)
    assert notes == [(step, rank) for step in range(3) for rank in range(3) for _ in range(4)]


def test_a_buffer_overwritten_after_a_collective_hurts_nobody() -> None:
    """Rank 0 resumes first and may reuse its memory before the others have read what it sent."""
    def body(comm: LocalComm) -> list[list[float]]:
        buffer = torch.full((3,), float(comm.rank + 1))
        parts = comm.all_gather(buffer)
        buffer.fill_(float("nan"))
        total = comm.all_reduce(torch.full((3,), float(comm.rank + 1)))
        total_again = total.clone()
        total.fill_(float("nan"))
        seen = [part.tolist() for part in parts]
        for part in parts:
            part.fill_(float("nan"))
        return [*seen, total_again.tolist()]

    assert run(3, body) == [[[1.0] * 3, [2.0] * 3, [3.0] * 3, [6.0] * 3]] * 3


def test_arguments_stay_unchanged() -> None:
    """The contract of Comm: every call returns a new tensor."""
    def body(comm: LocalComm) -> bool:
        mine = torch.full((4,), float(comm.rank))
        for result in (comm.all_reduce(mine), comm.reduce_scatter(mine, (2, 2)), *comm.all_gather(mine),
                       *comm.all_to_all([mine, mine])):
            result.add_(100.0)
        return torch.equal(mine, torch.full((4,), float(comm.rank)))

    assert run(2, body) == [True, True]
    solo, mine = SoloComm(), torch.zeros(4)
    for result in (solo.all_reduce(mine), solo.reduce_scatter(mine, (4,)), *solo.all_gather(mine),
                   *solo.all_to_all([mine])):
        result.add_(100.0)
    assert torch.equal(mine, torch.zeros(4))


def other_operation(comm: LocalComm) -> None:
    if comm.rank == 1:
        comm.all_gather(torch.ones(2))
    else:
        comm.all_reduce(torch.ones(2))


def other_shape(comm: LocalComm) -> None:
    comm.all_reduce(torch.ones(3 if comm.rank == 1 else 2))


def other_dtype(comm: LocalComm) -> None:
    comm.all_reduce(torch.ones(2, dtype=torch.bfloat16 if comm.rank == 1 else torch.float32))


def other_rows(comm: LocalComm) -> None:
    comm.reduce_scatter(torch.ones(3), (1, 1, 1) if comm.rank != 1 else (3, 0, 0))


def last_returns_early(comm: LocalComm) -> None:
    comm.all_reduce(torch.ones(2))
    if comm.rank < 2:
        comm.all_reduce(torch.ones(2))


def first_returns_early(comm: LocalComm) -> None:
    comm.all_reduce(torch.ones(2))
    if comm.rank > 0:
        comm.all_reduce(torch.ones(2))


@pytest.mark.parametrize(("body", "words"), [
    (other_operation, ["collective #0", "rank 1 issued all_gather", "rank 0 issued all_reduce"]),
    (other_shape, ["collective #0", "rank 1 issued all_reduce((3,)", "rank 0 issued all_reduce((2,)"]),
    (other_dtype, ["rank 1", "bfloat16", "rank 0", "float32"]),
    (other_rows, ["rank 1", "(3, 0, 0)", "rank 0", "(1, 1, 1)"]),
    (last_returns_early, ["rank 2 returned", "ranks [0, 1] wait in all_reduce #1"]),
    (first_returns_early, ["rank 1 waits in all_reduce #1", "rank 0 has already returned"]),
])
def test_a_mismatch_names_the_ranks_at_once(body: Callable[[LocalComm], None], words: list[str]) -> None:
    """On a real cluster each of these hangs until a timeout and names nobody."""
    with pytest.raises(CollectiveMismatch) as caught:
        run(3, body)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("body", [
    lambda comm: comm.all_to_all([torch.ones(1)] * 3),
    lambda comm: comm.reduce_scatter(torch.ones(4), (1, 2)),
    lambda comm: comm.reduce_scatter(torch.ones(4), (2, 1, 1)),
], ids=["a part too many", "rows that leave one over", "rows for a third rank"])
def test_parts_that_do_not_fit_the_group_are_refused(body: Callable[[LocalComm], object]) -> None:
    """Two ranks: dropping what is left over would be a wrong result without an error."""
    with pytest.raises((CollectiveMismatch, ValueError)):
        run(2, body)


@pytest.mark.parametrize("rows", [(7, -2), (2.5, 2.5), (True, 4)])
def test_rows_that_are_no_counts_are_refused(rows: tuple) -> None:
    """Their sum is right: 5 rows. But a slice to -2 leaves rows out, and nobody has half of one."""
    with pytest.raises(UsageValueError) as caught:
        run(2, lambda comm: comm.reduce_scatter(torch.ones(5), rows))
    assert f"rows {rows}, but should be 2 integers of at least 0 that sum to 5" in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_no_ranks_are_refused(size: int) -> None:
    """An empty list of results would pass for a run."""
    with pytest.raises(UsageValueError, match=f"run_virtual_ranks: size={size}, but should be an integer"):
        run(size, lambda comm: comm.rank)


def gradients_again() -> AbstractContextManager:
    """Inference mode in which the grad mode is switched on again."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode())
    stack.enter_context(torch.enable_grad())
    return stack


@pytest.mark.parametrize(("mode", "expected"), [
    (nullcontext, (True, False)), (torch.no_grad, (False, False)), (torch.inference_mode, (False, True)),
    (gradients_again, (True, True)),
])
def test_ranks_compute_in_the_callers_mode(mode: Callable[[], AbstractContextManager],
                                           expected: tuple[bool, bool]) -> None:
    """Both modes belong to a thread; a judge's no_grad must hold in the ranks that it starts."""
    def body(comm: LocalComm) -> tuple[bool, bool]:
        comm.all_reduce(torch.ones(1))
        product = torch.ones(1, requires_grad=True) * 2
        assert product.requires_grad == (expected == (True, False))
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert run(2, body, mode) == [expected] * 2


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_on_one_rank_ends_all(failing: int) -> None:
    """The rank's own exception comes out, with a note that names the rank; nobody waits for it."""
    after: list[int] = []

    def body(comm: LocalComm) -> None:
        comm.all_reduce(torch.ones(1))
        if comm.rank == failing:
            raise KeyError("weights")
        comm.all_reduce(torch.ones(1))
        after.append(comm.rank)

    with pytest.raises(KeyError, match="weights") as caught:
        run(3, body)
    assert caught.value.__notes__ == [f"on rank {failing} of 3"]
    assert after == []


def test_calls_are_counted_as_they_are_issued() -> None:
    """Elements and bytes of what a rank hands over; the counter passes everything else through."""
    def body(comm: LocalComm) -> list[CommCall]:
        counting = CountingComm(comm)
        assert (counting.rank, counting.size) == (comm.rank, 2)
        counting.all_reduce(torch.ones(3, 5, dtype=torch.bfloat16))
        counting.all_gather(torch.ones(2))
        counting.reduce_scatter(torch.ones(4), (3, 1))
        counting.all_to_all([torch.ones(1), torch.ones(2)])
        return counting.calls

    assert run(2, body)[1] == [CommCall("all_reduce", 15, 30), CommCall("all_gather", 2, 8),
                               CommCall("reduce_scatter", 4, 16), CommCall("all_to_all", 3, 12)]


def test_a_grid_of_groups() -> None:
    """tp groups are rows of the grid and ep groups its columns; each sums over its own members only."""

    def body(world: LocalComm) -> tuple:
        groups = grid_groups(world, tp=3, ep=2)
        value = torch.tensor([10.0**world.rank])
        return groups.rank, groups.tp.all_reduce(value).item(), groups.ep.all_reduce(value).item()

    assert run(6, body) == [(rank, [111.0, 111000.0][rank // 3], 10.0**(rank % 3) * 1001) for rank in range(6)]


def test_groups_need_not_move_together() -> None:
    """One row of the grid makes three calls while the other makes one; the column's call waits for both."""

    def body(world: LocalComm) -> float:
        groups = grid_groups(world, tp=2, ep=2)
        total = torch.ones(1)
        for _ in range(3 if groups.ep.rank == 0 else 1):
            total = groups.tp.all_reduce(total)
        return groups.ep.all_reduce(total).item()

    assert run(4, body) == [10.0] * 4


def test_groups_that_wait_for_each_other() -> None:
    """Ranks 0 and 3 wait for their rows, 1 and 2 for their columns: nobody can go on, and each is named."""

    def body(world: LocalComm) -> torch.Tensor:
        groups = grid_groups(world, tp=2, ep=2)
        first, second = (groups.tp, groups.ep) if world.rank in (0, 3) else (groups.ep, groups.tp)
        return second.all_reduce(first.all_reduce(torch.ones(1)))

    with pytest.raises(CollectiveMismatch, match="no rank can go on") as caught:
        run(4, body)
    for rank in range(4):
        assert f"ranks [{rank}] wait in all_reduce #0" in str(caught.value)


def test_a_member_that_has_returned() -> None:
    """Rank 3 leaves its column alone in a call; the other groups are not to blame."""

    def body(world: LocalComm) -> None:
        groups = grid_groups(world, tp=2, ep=2)
        groups.tp.all_reduce(torch.ones(1))
        if world.rank != 3:
            groups.ep.all_reduce(torch.ones(1))

    with pytest.raises(CollectiveMismatch, match=r"rank 3 returned, but ranks \[1\] wait in all_reduce #0"):
        run(4, body)


def test_a_grid_of_another_size() -> None:
    """Six ranks are no 2 x 2 grid."""
    with pytest.raises(UsageValueError, match=r"6 ranks, but ep\*tp is 2\*2"):
        run(6, lambda world: grid_groups(world, tp=2, ep=2))


def test_broadcast_is_rank_zeros() -> None:
    """Whatever the others hold, and a copy for each."""
    results = run(3, lambda comm: comm.broadcast(torch.full((2,), float(comm.rank))))
    assert [result.tolist() for result in results] == [[0.0, 0.0]] * 3
    assert len({result.data_ptr() for result in results}) == 3


def test_as_many_ranks_as_the_contract_allows() -> None:
    """64 virtual ranks as an 8 x 8 grid."""

    def body(world: LocalComm) -> float:
        groups = grid_groups(world, tp=8, ep=8)
        return groups.ep.all_reduce(groups.tp.all_reduce(torch.tensor([float(world.rank)]))).item()

    assert run(64, body) == [float(sum(range(64)))] * 64
