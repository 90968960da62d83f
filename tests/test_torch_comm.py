"""Protects TorchComm on gloo: every collective with any parts and dtypes, and the order of its additions."""

from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from moe_ref.contract.comm import Comm, Groups, WorldComm
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.local_comm import run_virtual_ranks
from moe_ref.contract.torch_comm import TorchComm
from moe_ref.verify.child.process_ranks import RankPool

SIZES = [2, 3, 4]
SUMMED = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
MOVED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int8, torch.int16, torch.bool,
         torch.complex64, *SUMMED]


def _part(rank: int, rows: int, dtype: torch.dtype, *, by: int = 0, width: int = 3) -> torch.Tensor:
    """Values of several magnitudes, so that the order of additions shows; the same for a rank wherever it runs."""
    generator = torch.Generator().manual_seed(100 * rank + by)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values *= 4.0**torch.randint(-4, 4, (rows, width), generator=generator)
    return (values * 8).to(dtype) if dtype.is_floating_point or dtype.is_complex else (values * 8).long().to(dtype)


def _bits(tensors: list[torch.Tensor]) -> list:
    copies = [one.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for one in tensors]
    return [[list(one.shape), str(one.dtype), bytes(copy.tolist()).hex()]
            for one, copy in zip(tensors, copies, strict=True)]


def sums(comm: Comm) -> list:
    """Every collective that adds, over every dtype that can be added; even, uneven and empty parts."""
    shown, size = [], comm.size
    for dtype in SUMMED:
        tensor = _part(comm.rank, 12, dtype)
        cuts = [[12 // size] * size, [12 - size + 1, *[1] * (size - 1)], [0] * (size - 1) + [12]]
        shown += [comm.all_reduce(one) for one in (tensor, tensor[:0], tensor.T, tensor[1, 1])]
        shown += [comm.reduce_scatter(tensor, rows) for rows in cuts]
        shown += [comm.reduce_scatter(tensor[:, 1], cuts[1]), comm.reduce_scatter(tensor[:0], [0] * size)]
    return _bits(shown)


def moves(comm: Comm) -> list:
    """Every collective that moves, over every dtype; uneven and empty parts, strided and flat tensors."""
    shown, rank, size = [], comm.rank, comm.size
    for dtype in MOVED:
        whole = _part(rank, 2 * size, dtype)
        for tensor in (whole[:rank], whole[:, :2], whole[:0], whole[:, :0], whole[:rank + 1, 1], whole[None, ::2]):
            shown += comm.all_gather(tensor)
        one_to_one = [2 * size if rank == to == 0 else 0 for to in range(size)]
        for rows in ([rank + to for to in range(size)], [0] * size, one_to_one):
            shown += comm.all_to_all([whole[:count] for count in rows])
        shown += comm.all_to_all([whole[:to].flatten() for to in range(size)])
        shown += [comm.broadcast(tensor) for tensor in (whole, whole.T, whole[:0], whole[1, 1])]
    return _bits(shown)


def kept(comm: Comm) -> list:
    """The arguments after every collective; they are to be what they were."""
    tensor, parts = _part(comm.rank, comm.size, torch.float32), [ONES[:to] for to in range(comm.size)]
    for result in (comm.all_reduce(tensor), *comm.all_gather(tensor), comm.reduce_scatter(tensor, [1] * comm.size),
                   *comm.all_to_all(parts), comm.broadcast(tensor)):
        result.fill_(-1.0)
    assert torch.equal(tensor, _part(comm.rank, comm.size, torch.float32))
    assert torch.equal(ONES, torch.ones(8))
    return []


ONES = torch.ones(8)


def plain_sums(comm: Comm) -> list:
    """The backend's own additions of floating point numbers: all_reduce, and an uneven reduce_scatter."""
    size = comm.size
    rows = [60 - size + 1, *[1] * (size - 1)]
    return [[comm.all_reduce(_part(comm.rank, 60, dtype)).double().tolist(),
             comm.reduce_scatter(_part(comm.rank, 60, dtype), rows).double().tolist()] for dtype in SUMMED[:4]]


def divided(world: WorldComm) -> list:
    """Halves of four ranks, and halves of those, which ranks of the other half know nothing of."""
    half = world.subgroup([[0, 1], [2, 3]])
    assert isinstance(half, TorchComm)
    alone = half.subgroup([[0], [1]])
    again = world.subgroup([[0, 1], [2, 3]])
    assert isinstance(again, TorchComm)
    assert again.group is half.group
    number = torch.tensor([float(world.rank)])
    return [half.rank, half.size, half.all_reduce(number).tolist(), alone.size, alone.all_gather(number)[0].tolist()]


def refused(comm: TorchComm) -> list:
    """Wrong use is refused on the rank that errs, before anything is sent."""
    words = []
    for call in (lambda: comm.subgroup([[1, 0]]), lambda: comm.subgroup([[0], [0, 1]]), lambda: comm.subgroup([[0]]),
                 lambda: comm.reduce_scatter(ONES, [4, 3]), lambda: comm.reduce_scatter(ONES, [9, -1]),
                 lambda: comm.all_to_all([ONES])):
        with pytest.raises(UsageValueError) as raised:
            call()
        words.append(str(raised.value))
    return words


def _ordered(check: Callable[[Comm], list]) -> Callable[[TorchComm], list]:
    return lambda comm: check(TorchComm(comm.group, ordered=True))


CHECKS: dict[str, Callable[[TorchComm], list]] = {
    "ordered sums": _ordered(sums), "moves": moves, "kept": kept, "ordered kept": _ordered(kept),
    "plain sums": plain_sums, "divided": divided, "refused": refused,
}


def _body(groups: Groups, device: torch.device, job: bytes, tell: Callable[[str], None]) -> bytes:
    assert isinstance(groups.tp, TorchComm)
    return msgspec.json.encode(CHECKS[job.decode()](groups.tp))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Process ranks for all tests."""
    made = RankPool(_body)
    yield made
    made.close()


def _shown(pool: RankPool, size: int, check: str) -> list[list]:
    answers = pool.run(size, check.encode())
    errors = [f"{answer}\n{answer.trace}" for answer in answers if not isinstance(answer, bytes)]
    assert not errors, errors[0]
    return [msgspec.json.decode(answer) for answer in answers if isinstance(answer, bytes)]


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("size", SIZES)
def test_ordered_sums_are_those_of_virtual_ranks(pool: RankPool, size: int) -> None:
    """Bit for bit, so that a run on processes can be compared with a run on threads."""
    assert _shown(pool, size, "ordered sums") == run_virtual_ranks(size, sums)


def test_the_order_of_additions_shows_in_the_data_compared() -> None:
    """With three ranks in reverse the sums of every floating point dtype differ: the test above has power."""
    for dtype in SUMMED[:4]:
        parts = [_part(rank, 12, dtype) for rank in range(3)]
        assert not torch.equal(parts[0] + parts[1] + parts[2], parts[2] + parts[1] + parts[0])


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("size", SIZES)
def test_what_moves_arrives_with_every_bit(pool: RankPool, size: int) -> None:
    """Also fp8, which gloo refuses, parts that differ in length, and parts of nothing."""
    assert _shown(pool, size, "moves") == run_virtual_ranks(size, moves)


@pytest.mark.parametrize("check", ["kept", "ordered kept"])
def test_results_are_new_tensors(pool: RankPool, check: str) -> None:
    """Overwriting a result must not reach an argument."""
    assert _shown(pool, 3, check) == [[], [], []]


@pytest.mark.parametrize("size", SIZES)
def test_the_backends_own_sums_are_sums_in_some_order(pool: RankPool, size: int) -> None:
    """Within (n - 1) u / (1 - (n - 1) u) * sum|.| of the exact sum, the bound of every order (Higham 2002, 4.2)."""
    shown = _shown(pool, size, "plain sums")
    for index, dtype in enumerate(SUMMED[:4]):
        parts = torch.stack([_part(rank, 60, dtype).double() for rank in range(size)])
        additions = (size - 1) * torch.finfo(dtype).eps / 2
        # A double holds these sums of four fp64 with an error of its own, as large as the bound's.
        slack = additions / (1 - additions) * parts.abs().sum(0) * (2 if dtype == torch.float64 else 1)
        start = [0, *(60 - size + rank for rank in range(1, size))]
        for rank in range(size):
            whole, part = (torch.tensor(values, dtype=torch.float64) for values in shown[rank][index])
            assert ((whole - parts.sum(0)).abs() <= slack).all()
            here = slice(start[rank], start[rank] + len(part))
            assert len(part) == (60 - size + 1 if rank == 0 else 1)
            assert ((part - parts.sum(0)[here]).abs() <= slack[here]).all()
            # An addend left out would be seen.
            assert ((parts[1:].sum(0) - parts.sum(0)).abs() > slack).any()
        assert all(shown[rank][index][0] == shown[0][index][0] for rank in range(size))


def test_groups_are_divided_again_and_made_once(pool: RankPool) -> None:
    """Ranks count within the group; the same parts asked for again cost nothing."""
    halves = [[rank % 2, 2, [1.0 if rank < 2 else 5.0], 1, [float(rank)]] for rank in range(4)]
    assert _shown(pool, 4, "divided") == halves


def test_wrong_use_is_refused_with_the_numbers(pool: RankPool) -> None:
    """What was given and what the group needs."""
    for words in _shown(pool, 2, "refused"):
        assert "parts [[1, 0]], but they should be ascending and hold each of 2 ranks once" in words[0]
        assert "parts [[0], [0, 1]], but" in words[1]
        assert "parts [[0]], but" in words[2]
        assert words[3:5] == [f"reduce_scatter: rows {rows}, but should be 2 integers of at least 0 that sum to 8"
                              for rows in ((4, 3), (9, -1))]
        assert words[5] == "all_to_all: 1 parts, but should be one per rank, 2"
