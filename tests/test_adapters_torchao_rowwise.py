"""torchao's fp8 rowwise training as an implementation: a CPU has neither its Triton kernels nor torch's product, so
its autograd function is judged with stand-ins that do what their documentation says; skipped where it is not installed.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.vocabulary import Dtype, Verdict
from tests.adapter_mistakes import require
from tests.in_process import judged

require("torchao.fp8_rowwise")

from moe_ref.adapters.torchao_rowwise import FP8_ROWWISE, product  # noqa: E402

CASES = ("v1-T33.H64.I96.E6.K2-bf16-norm-bwd", "v1-T33.H64.I96.E6.K2-bf16-norm-tp2-bwd",
         "v1-T12.H64.I32.E6.K2-bf16-norm-zipf-outlier-bwd")
MODULE = "torchao.prototype.moe_training.fp8_grouped_mm"


def scaled(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes along `dim`, and the scales to encode with, rounded down to a power of two (float8_utils.amax_to_scale)."""
    amax = values.abs().amax(dim, keepdim=True).double().clamp(min=1e-12)
    scale = torch.exp2(torch.floor(torch.log2((448.0 / amax).float())))
    return (values.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def column_major(codes: torch.Tensor) -> torch.Tensor:
    """The same numbers with the last two axes the other way round in memory."""
    return codes.transpose(-2, -1).contiguous().transpose(-2, -1)


def rows(values: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return scaled(values, -1)


def columns(b_EKN: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a transposed weight, (E, K, N), along K."""
    codes, scale = scaled(b_EKN, -2)
    return column_major(codes), scale


def transposed(b_EKN: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight itself, (E, N, K), along N."""
    return columns(b_EKN.transpose(-2, -1))


def of_groups(one_RN: torch.Tensor, other_RK: torch.Tensor, ends: torch.Tensor, *arguments: object,
              **options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both along the rows of each group, scales of one group after the other."""
    found: list[torch.Tensor] = []
    for values in (one_RN, other_RK):
        parts = [scaled(part, 0) if len(part) else (part.to(torch.float8_e4m3fn), torch.ones(1, part.shape[1]))
                 for part in torch.tensor_split(values, ends[:-1].long())]
        found += [column_major(torch.cat([codes for codes, _ in parts])), torch.cat([one[0] for _, one in parts])]
    return found[0], found[1], found[2], found[3]


def grouped(a: torch.Tensor, b: torch.Tensor, a_scales: torch.Tensor, b_scales: torch.Tensor, ends: torch.Tensor, *,
            out_dtype: torch.dtype, use_fast_accum: bool) -> torch.Tensor:
    """torch._scaled_grouped_mm: rows by groups with b (E, K, N), or sums over groups with b (R, K)."""
    cuts = ends[:-1].long()
    if b.dim() == 3:
        parts = torch.tensor_split(a.float() * a_scales[:, None], cuts)
        return torch.cat([part @ (one.float() * scale) for part, one, scale in zip(parts, b, b_scales, strict=True)]
                         ).to(out_dtype)
    ones, others = (torch.tensor_split(one.float(), cuts, dim) for one, dim in ((a, 1), (b, 0)))
    scales = zip(a_scales.unflatten(0, (len(ends), -1)), b_scales.unflatten(0, (len(ends), -1)), strict=True)
    return torch.stack([one @ other * first[:, None] * second for one, other, (first, second)
                        in zip(ones, others, scales, strict=True)]).to(out_dtype)


@pytest.fixture(autouse=True)
def on_a_cpu() -> Iterator[None]:
    """Stand-ins in place of its four kernels and of the product."""
    with ExitStack() as stack:
        for name, stand_in in (("rowwise_2d_scale_and_cast", rows), ("colwise_3d_scale_and_cast", columns),
                               ("rowwise_3d_transpose_rhs", transposed),
                               ("per_group_colwise_scales_dual", of_groups)):
            stack.enter_context(mock.patch(f"{MODULE}.triton_fp8_{name}", stand_in))
        stack.enter_context(mock.patch.object(torch, "_scaled_grouped_mm", grouped))
        yield


def subject(**numerics: object) -> object:
    """The adapter, let onto a CPU, with its contract changed."""
    given: Numerics = FP8_ROWWISE.CAPABILITIES.numerics[Dtype.BF16]
    changed = {Dtype.BF16: replace(given, **numerics)}  # type: ignore[arg-type]
    return replace(FP8_ROWWISE, CAPABILITIES=replace(FP8_ROWWISE.CAPABILITIES, devices=("cpu",), numerics=changed))


@pytest.mark.parametrize("case", CASES)
def test_its_autograd_function_is_what_is_declared(case: str) -> None:
    """Forward and backward, with groups that are padded and without rows."""
    line = judged(subject(), case, runs=1)
    assert line.verdict is Verdict.PASS, line.message


def test_its_scales_are_powers_of_two() -> None:
    """Under scales in fp32 it fails at once, in the forward pass."""
    assert judged(subject(products="fp8_row"), CASES[0], runs=1).verdict is Verdict.MISMATCH


def test_padding_takes_rows_apart_and_together_again() -> None:
    """Groups of 3, 0 and 17 rows: each row by its own matrix."""
    generator = torch.Generator().manual_seed(5)
    rows_RK, w_ENK = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((20, 16), (3, 32, 16)))
    got = product(rows_RK, w_ENK.transpose(1, 2), torch.tensor([3, 0, 17]))
    want = torch.cat([rows_RK[:3] @ w_ENK[0].T, rows_RK[3:] @ w_ENK[2].T])
    assert float((got - want).float().norm() / want.float().norm()) < 0.06
