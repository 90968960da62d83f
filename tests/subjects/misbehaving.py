"""Implementations that hang, crash, end their process or return what no layer should."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from moe_ref.contract.comm import Groups
from tests.subjects.base import Call, TorchMoE


class Disturbed(TorchMoE):
    """The right layer with something done before it, or to its output."""

    def __init__(self, before: Callable[[int], object] = lambda rank: None,
                 after: Callable[[torch.Tensor], object] = lambda output: output) -> None:
        super().__init__()
        self.before, self.after = before, after

    def moe(self, x_TH, weights, spec, parallel=None, groups=None, **others):
        self.before((groups or Groups()).tp.rank)
        return self.after(super().moe(x_TH, weights, spec, parallel, groups, **others))


class CollectiveSkipped(TorchMoE):
    """Rank 1 leaves the all-reduce out, so that the others wait for it."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        return merged_TH if call.rank == 1 else super().all_reduce(call, merged_TH)


class CollectivesDiffer(TorchMoE):
    """Rank 1 gathers where the others reduce."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        if call.rank == 1:
            return torch.stack(call.groups.tp.all_gather(merged_TH)).sum(0)
        return super().all_reduce(call, merged_TH)


class ShapesDiffer(TorchMoE):
    """Rank 1 reduces one token more than the others."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        if call.rank == 1:
            return super().all_reduce(call, torch.cat([merged_TH, merged_TH[:1]]))[:-1]
        return super().all_reduce(call, merged_TH)


class DiesOnFiveTokens(TorchMoE):
    """Rank 1 is killed before the all-reduce of five tokens; any other number of them is served."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        if call.rank == 1 and len(merged_TH) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().all_reduce(call, merged_TH)


def _sleep_on_rank_one(rank: int) -> None:
    if rank == 1:
        time.sleep(3600)


def _raise(error: BaseException) -> Callable[[int], object]:
    def raise_it(rank: int) -> None:
        raise error
    return raise_it


def _raise_on_rank_two(rank: int) -> None:
    if rank == 2:
        raise RuntimeError("boom on two")


def _print_garbage(rank: int) -> None:
    print("garbage " * 100)
    os.write(1, b"\0\1\2 bytes on the standard output\n" * 1000)
    sys.stdout.flush()


def _import_oracle(rank: int) -> None:
    from moe_ref.oracle.layer import moe
    assert moe


def _take_memory(rank: int) -> None:
    taken = []
    while True:
        taken.append(torch.zeros(2**28, dtype=torch.uint8))


MISBEHAVING = {
    "sleeps": Disturbed(lambda rank: time.sleep(3600)),
    "sleeps_on_rank_one": Disturbed(_sleep_on_rank_one),
    "collective_skipped": CollectiveSkipped(),
    "collectives_differ": CollectivesDiffer(),
    "shapes_differ": ShapesDiffer(),
    "segmentation_fault": Disturbed(lambda rank: ctypes.string_at(0)),
    "ends_the_process": Disturbed(lambda rank: os._exit(0)),
    "takes_memory": Disturbed(_take_memory),
    "prints_garbage": Disturbed(_print_garbage),
    "raises_system_exit": Disturbed(_raise(SystemExit(0))),
    "raises_base_exception": Disturbed(_raise(BaseException("odd"))),
    "raises_on_rank_two": Disturbed(_raise_on_rank_two),
    "imports_the_oracle": Disturbed(_import_oracle),
    "returns_none": Disturbed(after=lambda output: None),
    "returns_tuple": Disturbed(after=lambda output: (output, output)),
    "returns_meta": Disturbed(after=lambda output: output.to("meta")),
    "returns_fp64": Disturbed(after=lambda output: output.double()),
    "returns_narrow": Disturbed(after=lambda output: output[:, :-1]),
    "returns_nan": Disturbed(after=lambda output: output * float("nan")),
    "returns_transposed_storage": Disturbed(after=lambda output: output.T.contiguous().T),
}
TOKENS = {name: 64 + 2 * index for index, name in enumerate(MISBEHAVING)}
"""Which of them a call meets is said by its number of tokens, so that one child can be asked for many.

Half as many, which a case's call with other inputs may have, mean the same.
"""


class ByTokens(TorchMoE):
    """All of them in one."""

    def moe(self, x_TH, weights, spec, parallel=None, groups=None, **others):
        name = next(name for name, tokens in TOKENS.items() if len(x_TH) in (tokens, tokens // 2))
        return MISBEHAVING[name].moe(x_TH, weights, spec, parallel, groups, **others)


by_tokens = ByTokens()
dies_on_five_tokens = DiesOnFiveTokens()
without_numerics = Disturbed()
without_numerics.CAPABILITIES = "none of that type"  # pyrefly: ignore
