"""Encoded experts in the layout of vLLM's and SGLang's fused_experts_impl mean what they mean in the contract."""

import pytest
import torch

from moe_ref.adapters.fused_moe_encoded import INT4, fused_moe_arguments
from moe_ref.contract.encoded import unpacked
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.vocabulary import Scheme
from moe_ref.oracle.decode import decode
from tests.made_encoded import drawn, same


def part(scheme: Scheme, columns: tuple[int, int], hidden: int = 160) -> QuantisedWeights:
    """Three experts, of 384 columns of the activation these."""
    w13, w2 = drawn(scheme, (3, 2, 384, hidden), seed=1), drawn(scheme, (3, hidden, 384), seed=2)
    return QuantisedWeights(scheme=scheme, w13=w13.rows(columns), w2=w2.columns(columns))


@pytest.mark.parametrize("columns", [(0, 384), (192, 384), (96, 192)])
@pytest.mark.parametrize("scheme", INT4)
def test_four_bits(scheme: Scheme, columns: tuple[int, int]) -> None:
    """As their kernel reads them: (code - zero point) * scale of column // group; zero points in pairs of rows.

    160 columns of the tokens, and parts of the activation's from 192 and 96, leave groups of 32.
    """
    weights = part(scheme, columns)
    given = fused_moe_arguments(weights, int8_rows=False)
    group = given["block_shape"][1]
    assert group == 32
    for name, matrix in (("w1", decode(weights.w13).flatten(1, 2)), ("w2", decode(weights.w2))):
        num_columns = matrix.shape[-1]
        codes_ENK = unpacked(given[name], num_columns).double()
        of_K = torch.arange(num_columns) // group
        zeros_ENK = torch.tensor(8.0)
        if (pairs := given[f"{name}_zp"]) is not None:
            row_N = torch.arange(matrix.shape[1])
            zeros_ENK = (pairs[:, row_N // 2] >> (row_N % 2 * 4)[:, None] & 15)[..., of_K].double()
        assert same((codes_ENK - zeros_ENK) * given[f"{name}_scale"][..., of_K].double(), matrix)


def test_groups_stay_whole_where_they_can() -> None:
    """Smaller ones cost the kernel loads."""
    weights = part(Scheme.GPTQ, (128, 384), hidden=256)
    assert fused_moe_arguments(weights, int8_rows=False)["block_shape"] == [0, 128]


def test_parts_of_small_groups_are_refused() -> None:
    """A cut at 48 leaves groups of 16, which neither library takes."""
    with pytest.raises(UsageValueError, match="16 columns to a group, but should be 32 or more"):
        fused_moe_arguments(part(Scheme.AWQ, (0, 48)), int8_rows=False)


@pytest.mark.parametrize("scheme", [Scheme.FP8_ROW, Scheme.INT8])
def test_rows(scheme: Scheme) -> None:
    """A scale of each row, gate's before up's."""
    weights = part(scheme, (0, 384))
    given = fused_moe_arguments(weights, int8_rows=False)
    assert same(given["w1"].double() * given["w1_scale"].double(), decode(weights.w13).flatten(1, 2))
    assert same(given["w2"].double() * given["w2_scale"].double(), decode(weights.w2))


def test_int8_with_and_without_rounded_rows() -> None:
    """The same weights in two ways."""
    weights = part(Scheme.INT8, (0, 384))
    assert fused_moe_arguments(weights, int8_rows=False)["use_int8_w8a16"] is True
    rounded = fused_moe_arguments(weights, int8_rows=True)
    assert (rounded["use_int8_w8a8"], rounded["per_channel_quant"]) == (True, True)


def test_blocks() -> None:
    """Whole blocks of 128 rows: those of up begin where a block does."""
    weights = part(Scheme.FP8_BLOCK, (128, 384), hidden=256)
    given = fused_moe_arguments(weights, int8_rows=False)
    for name, matrix in (("w1", decode(weights.w13).flatten(1, 2)), ("w2", decode(weights.w2))):
        scale_ENK = given[f"{name}_scale"].double().repeat_interleave(128, 1).repeat_interleave(128, 2)
        assert same(given[name].double() * scale_ENK, matrix)
