"""A layer that goes wrong on some numbers of tokens, so that one run of ranks shows what becomes of the next case."""

import os
import signal
import time

import torch

from tests.subjects.base import Call, TorchMoE


class WrongByTokens(TorchMoE):
    """Rank 1, by the number of tokens: raises, leaves the all-reduce out, enters another one, or never comes back."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        if call.rank == 1:
            if len(merged_TH) == 2:
                raise RuntimeError("boom on rank one")
            if len(merged_TH) == 4:
                return merged_TH
            if len(merged_TH) == 5:
                return super().all_reduce(call, torch.cat([merged_TH, merged_TH[:1]]))[:-1]
            if len(merged_TH) == 7:
                time.sleep(3600)
        return super().all_reduce(call, merged_TH)


class DiesWhenTold(TorchMoE):
    """Rank 1 is killed on three tokens where the environment says so."""

    def all_reduce(self, call: Call, merged_TH: torch.Tensor) -> torch.Tensor:
        if call.rank == 1 and len(merged_TH) == 3 and "RANK_ONE_DIES" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().all_reduce(call, merged_TH)


wrong_by_tokens, dies_when_told = WrongByTokens(), DiesWhenTold()
