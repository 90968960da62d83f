"""Protects TorchComm and process ranks: gloo collectives on forked processes, errors and hangs of single ranks."""

import glob
import os
import tempfile
import time
from pathlib import Path

import msgspec
import pytest
import torch

from moe_ref.contract.torch_comm import TorchComm
from moe_ref.verify.child.process_ranks import RankError, RanksHung, run_process_ranks


def met(comm: TorchComm) -> bytes:
    """Returns once all ranks are connected: one that ends before makes the others fail in gloo's set-up."""
    comm.all_reduce(torch.ones(1))
    return b"done"


def collectives(comm: TorchComm, device: torch.device) -> bytes:
    """Every collective with uneven parts, and the arguments afterwards; as JSON."""
    rank, size = comm.rank, comm.size
    rows = tuple(range(size))
    mine, table = torch.full((rank, 2), float(rank)), (rank + 1) * torch.arange(float(sum(rows)))
    sent = [torch.full((rank + s,), 10.0 * rank + s) for s in range(size)]
    shown = {
        "sum": comm.all_reduce(torch.full((2,), rank + 1.0)).tolist(),
        "gathered": [part.tolist() for part in comm.all_gather(mine)],
        "widths": [list(part.shape) for part in comm.all_gather(mine)],
        "scattered": comm.reduce_scatter(table, rows).tolist(),
        "exchanged": [part.tolist() for part in comm.all_to_all(sent)],
        "bf16": comm.all_reduce(torch.tensor([[1.0, 2.0**-9, 2.0**-9][rank]], dtype=torch.bfloat16)).tolist(),
        "transposed": comm.all_reduce(torch.arange(6.0).reshape(2, 3).T).tolist(),
        "kept": [mine.tolist(), table.tolist()],
    }
    return msgspec.json.encode(shown)


@pytest.mark.parametrize("size", [2, 3])
def test_all_four_collectives_uneven(size: int) -> None:
    """The same results as virtual ranks give; sums of small integers are exact in any order."""
    answers = run_process_ranks(size, "gloo", "cpu", 60.0, collectives)
    total = sum(range(1, size + 1))
    starts = [sum(range(rank)) for rank in range(size)]
    for rank, answer in enumerate(answers):
        assert isinstance(answer, bytes), answer
        shown = msgspec.json.decode(answer)
        assert shown["sum"] == [float(total)] * 2
        assert shown["gathered"] == [[[float(r)] * 2] * r for r in range(size)]
        assert shown["widths"] == [[r, 2] for r in range(size)]
        assert shown["scattered"] == [float(total * row) for row in range(starts[rank], starts[rank] + rank)]
        assert shown["exchanged"] == [[10.0 * r + rank] * (r + rank) for r in range(size)]
        # 1 + 2^-9 is a tie and goes back to 1; of three addends the small ones may be added first, or in fp32.
        assert shown["bf16"] in ([[1.0]] if size == 2 else [[1.0], [1.0 + 2.0**-7], [1.0 + 2.0**-8]])
        assert shown["transposed"] == [[float(size * (row + 3 * column)) for column in (0, 1)] for row in range(3)]
        assert shown["kept"] == [[[float(rank)] * 2] * rank, [(rank + 1) * float(n) for n in range(sum(range(size)))]]


def test_an_error_is_reported_on_its_rank() -> None:
    """Rank 1 fails while the others wait for it; the call returns soon, not after the time limit."""
    def body(comm: TorchComm, device: torch.device) -> bytes:
        if comm.rank == 1:
            raise ZeroDivisionError("no such tile")
        comm.all_reduce(torch.ones(1))
        return b"done"

    started = time.monotonic()
    answers = run_process_ranks(3, "gloo", "cpu", 60.0, body)
    assert time.monotonic() - started < 30.0
    assert isinstance(answers[1], RankError)
    assert (answers[1].kind, str(answers[1])) == ("builtins.ZeroDivisionError", "no such tile")
    assert 'raise ZeroDivisionError("no such tile")' in answers[1].trace
    assert all(isinstance(answers[rank], RankError) for rank in (0, 2))


def test_a_killed_rank_is_told_from_a_failed_one() -> None:
    """A crash in native code leaves no Python error; the rank is still named, by its place."""
    def body(comm: TorchComm, device: torch.device) -> bytes:
        met(comm)
        if comm.rank == 0:
            os._exit(7)
        return b"done"

    answers = run_process_ranks(2, "gloo", "cpu", 30.0, body)
    assert isinstance(answers[0], RankError)
    assert answers[0].kind == "died"
    assert answers[1] == b"done" or isinstance(answers[1], RankError)


def test_a_hung_rank_raises() -> None:
    """Rank 1 never answers: after the limit the call raises, names it, and leaves no process behind."""
    def body(comm: TorchComm, device: torch.device) -> bytes:
        met(comm)
        if comm.rank == 1:
            time.sleep(600)
        return b"done"

    started = time.monotonic()
    with pytest.raises(RanksHung, match=r"ranks \[1\] of 2 did not answer within 4 s"):
        run_process_ranks(2, "gloo", "cpu", 4.0, body)
    assert time.monotonic() - started < 20.0


def test_no_rendezvous_file_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nightly run starts hundreds of groups; none may leave a file in the temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_process_ranks(2, "gloo", "cpu", 30.0, lambda comm, device: met(comm))
    assert glob.glob(str(tmp_path / "*")) == []
