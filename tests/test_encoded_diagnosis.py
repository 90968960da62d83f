"""Mistakes in reading encoded weights are named: the scales, codes and zero points that were taken instead."""

from dataclasses import replace

import pytest
import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.vocabulary import Verdict
from tests.in_process import judged
from tests.subjects.quantised import QuantisedMoE

SIZES = "v1-T17.H160.I136.E6.K3-bf16"


class NextBlock(QuantisedMoE):
    def of_columns(self, per_block: torch.Tensor, w: Encoded) -> torch.Tensor:
        return super().of_columns(per_block.roll(-1, 1), w)


class LastRow(QuantisedMoE):
    def of_rows(self, scales: torch.Tensor, w: Encoded) -> torch.Tensor:
        return super().of_rows(scales.roll(1, 0), w)


class Halves(QuantisedMoE):
    def numbers(self, w: Encoded) -> torch.Tensor:
        return super().numbers(replace(w, codes=(w.codes >> 4) | (w.codes << 4)))


class ZerosOffByOne(QuantisedMoE):
    def numbers(self, w: Encoded) -> torch.Tensor:
        return super().numbers(w if w.zeros is None else replace(w, zeros=w.zeros + 1))


class Runs(QuantisedMoE):
    def of_columns(self, per_block: torch.Tensor, w: Encoded) -> torch.Tensor:
        return super().of_columns(per_block, replace(w, groups=None))


class NextExpert(QuantisedMoE):
    def gate_up(self, call: object, x_RH: torch.Tensor, w13: Encoded, expert: int) -> torch.Tensor:
        following = call.weights.w13.at((expert + 1) % call.weights.num_experts)
        return super().gate_up(call, x_RH, replace(w13, scales=following.scales), expert)


class SecondInverted(QuantisedMoE):
    def product(self, call: object, rows: tuple, w: Encoded) -> torch.Tensor:
        return super().product(call, rows, replace(w, second_scale=1 / w.second_scale))


MISTAKES = {
    "the next block": (NextBlock(), "mxfp4", "scales of the next block of columns"),
    "the next block, act in codes": (NextBlock(), "fp8block", "block of columns"),
    "the row before": (LastRow(), "int8-norm", "scales of the block of rows before"),
    "halves": (Halves(), "gptq32", "the halves of a byte exchanged"),
    "zeros": (ZerosOffByOne(), "awq32", "zero points one too large"),
    "runs": (Runs(), "gptqorder32", "groups taken for runs of columns"),
    "the next expert": (NextExpert(), "int8", "scales of the next expert (G12)"),
    "a reciprocal": (SecondInverted(), "nvfp4", "a second scale inverted"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    """The stage is act, the first that shows; what is named explains nine tenths of its error and more."""
    subject, words, fault = MISTAKES[name]
    scheme, _, more = words.partition("-")
    line = judged(subject, f"{SIZES}-{scheme}-{more or 'norm'}")
    assert line.verdict is Verdict.MISMATCH
    assert line.first_stage == "act"
    assert line.diagnosis is not None, line.message
    assert fault in line.diagnosis.fault, line.diagnosis
