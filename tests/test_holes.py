"""Slots that name no expert: a layer may show their rows or leave them out, but must add nothing for them."""

import pytest
import torch

from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage, Verdict
from tests.in_process import judged
from tests.subjects.base import Call, TorchMoE

CASE = "v1-T33.H96.I160.E8.K2-bf16-norm-holes-exact"
ROWS = (Stage.GATE_UP, Stage.ACT, Stage.DOWN)


class NamedRowsOnly(TorchMoE):
    """Shows the rows of slots with an expert, and no others; `short`: one fewer."""

    def __init__(self, short: int = 0) -> None:
        super().__init__()
        self.short = short

    def moe(self, x_TH, weights, spec, parallel=None, groups=None, *, trace=None, **others):
        own = Trace()
        output = super().moe(x_TH, weights, spec, parallel, groups, trace=own, **others)
        ids_R = own.tensors[Stage.IDS].flatten()
        named_R = ((ids_R >= 0) & (ids_R < spec.num_experts)).nonzero().flatten()
        for stage, tensor in own.tensors.items():
            if trace is not None:
                trace.record(stage, tensor[named_R[self.short:]] if stage in ROWS else tensor)
        return output


class LastExpertServes(TorchMoE):
    """-1 counts from the end."""

    def merge(self, call: Call, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return super().merge(call, torch.where(ids_TK == -1, call.spec.num_experts - 1, ids_TK), weights_TK)


@pytest.mark.parametrize("subject", [TorchMoE(), NamedRowsOnly()], ids=["all rows", "named rows"])
def test_either_way_to_show_rows_is_right(subject: TorchMoE) -> None:
    assert judged(subject, CASE).verdict == Verdict.PASS


def test_a_row_too_few_is_a_fault() -> None:
    line = judged(NamedRowsOnly(short=1), CASE)
    assert line.verdict == Verdict.STRUCT
    assert "act: shape (49, 160), but should be (66, 160)" in line.message


def test_an_expert_for_nobody_is_a_fault() -> None:
    line = judged(LastExpertServes(), CASE)
    assert line.verdict == Verdict.MISMATCH
    assert "exact probe" in line.message
