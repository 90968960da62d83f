"""Frames between the harness and a child: JSON header plus safetensors bytes; nothing is ever unpickled."""

from typing import BinaryIO

import msgspec
import torch
from safetensors.torch import load, save

from moe_ref.contract.vocabulary import Stage


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """First frame of a child: the subject's capabilities as JSON, or why it could not be loaded."""

    capabilities: str = ""
    source_digest: str = ""
    usage_error: str = ""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Run one case; time_limit, in seconds, is for the whole answer, of which process ranks get less.

    other_batches: its tokens in other batches too, on virtual ranks alone. ticket: what the reply must show, so that no
    other frame passes for it.
    """

    case: str
    ranks: str
    device: str
    runs: int
    time_limit: float
    other_batches: bool = False
    ticket: str = ""


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank did: collectives as (operation, elements, bytes), or its error in one line and in full.

    kind of error: "usage" (the contract's checks refused a call), "struct" (what came back is not what
    it should be), "hang" (process ranks did not answer in time), or "" (anything else). left: see Reply.
    """

    calls: list[tuple[str, int, int]] = []
    error: str = ""
    kind: str = ""
    traceback: str = ""
    left: list[str] = []


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a child is doing; any number of these precede a reply."""

    text: str


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to a request; the tensors of every rank travel in the payload.

    batches: by name of another batch "same bits", "rows differ" or an error. left: functions and defaults of the
    process that calls have replaced, so that it may serve no other case. untraced: whether the last run in the payload
    is the output of a call without a trace, which has other bits than the first run's.
    """

    ranks: list[RankReport]
    ticket: str = ""
    left: list[str] = []
    runs: int = 0
    same_bits: bool | None = None
    differing_stages: list[str] = []
    changed_inputs: list[str] = []
    untraced: bool = False
    batches: dict[str, str] = {}
    guard: dict[str, str] = {}
    inputs_digest: str = ""
    seconds: float = 0.0


RankTensors = dict[Stage, torch.Tensor]


def write_frame(stream: BinaryIO, header: msgspec.Struct, payload: bytes = b"") -> None:
    """One frame: two 8-byte lengths, header, payload."""
    text = msgspec.json.encode(header)
    stream.write(len(text).to_bytes(8, "little") + len(payload).to_bytes(8, "little") + text + payload)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[bytes, bytes]:
    """Header and payload; raises EOFError when the other side is gone."""
    lengths = _read(stream, 16)
    return (_read(stream, int.from_bytes(lengths[:8], "little")),
            _read(stream, int.from_bytes(lengths[8:], "little")))


def _read(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise EOFError(f"stream ended after {len(content)} of {count} bytes")
    return content


def pack_runs(runs: list[list[RankTensors]]) -> bytes:
    """safetensors bytes under the names run.rank.stage."""
    return save({f"{run}.{rank}.{stage}": tensor.contiguous().cpu() for run, ranks in enumerate(runs)
                 for rank, tensors in enumerate(ranks) for stage, tensor in tensors.items()})


def unpack_runs(payload: bytes, num_ranks: int) -> list[list[RankTensors]]:
    """The tensors of every run and rank; no run at all for an empty payload."""
    runs: dict[int, list[RankTensors]] = {}
    for name, tensor in (load(payload) if payload else {}).items():
        run, rank, stage = name.split(".")
        runs.setdefault(int(run), [{} for _ in range(num_ranks)])[int(rank)][Stage(stage)] = tensor
    return [runs[run] for run in sorted(runs)]
