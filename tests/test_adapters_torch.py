"""torch's own grouped products as implementations."""

import pytest
import torch

from moe_ref.adapters.torch_scaled import SCALED_GROUPED_MM, _rowwise
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import Ranks, Stage, Verdict
from moe_ref.verify.run.subjects import load_subject
from tests.adapter_runs import LAYER
from tests.in_process import judged
from tests.subjects.swapped import torch_grouped_mm

CASES = (f"{LAYER}-bf16-norm-tp2-bwd", f"{LAYER}-fp16-norm", f"{LAYER}-fp32-norm-holes-exact")


@pytest.mark.parametrize("case", CASES)
def test_grouped_mm(case: str) -> None:
    line = judged(load_subject("torch.grouped_mm"), case)
    assert line.verdict == Verdict.PASS, line.message


def test_a_planted_mistake_is_seen() -> None:
    """Agreement says something only where the adapter's own mistakes would show."""
    line = judged(torch_grouped_mm, CASES[0])
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.ACT), line.message


def test_what_scaled_grouped_mm_is_judged_in() -> None:
    """Forward in bf16, by the products of rounded rows; on a GPU."""
    refusals = [SCALED_GROUPED_MM.CAPABILITIES.refusal(parse_case(f"{LAYER}-{words}"), Ranks.LOCAL, "cuda")
                for words in ("bf16-norm", "fp16-norm", "bf16-norm-bwd")]
    assert refusals == [None, "not declared: dtype fp16", "not declared: direction bwd"]


def test_rowwise_operands() -> None:
    """The one part of that adapter that a CPU can run: codes times scales are the numbers, to 4 bits; zeros stay."""
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    values[2] = 0
    codes, scales = _rowwise(values)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, (5,))
    floor = values.abs().amax(-1, keepdim=True).double() / 448 * 2.0**-10
    error = (codes.double() * scales.double()[:, None] - values.double()).abs()
    assert bool((error <= torch.maximum(values.double().abs() * (2.0**-4 + 2.0**-20), floor)).all())
