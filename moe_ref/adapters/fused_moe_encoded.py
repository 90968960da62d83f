"""Encoded weights as fused_experts_impl of vLLM and of SGLang take them, by the same names, and the rows it rounds.

fp8row, int8: codes (E, N, K), scales (E, N, 1). fp8block: scales (E, N / 128, K / 128). int4: two codes to a byte along
K, the even one low, as in the contract; scales (E, N, K / group); zero points (E, N / 2, K / group), two rows to a
byte. Both matrices have groups of one size: where a rank's part is not whole groups of 128, smaller ones are made of
each, as MoeWNA16Method of vLLM does (group_size_div_factor), whose smallest is 32.
"""

from math import gcd

import torch

from moe_ref.adapters.experts_layer import EncodedCall
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme, Stage

INT4 = (Scheme.GPTQ, Scheme.GPTQ_32, Scheme.AWQ, Scheme.AWQ_32)
LEAST_GROUP = 32
_OPTIONS: dict[Scheme, dict[str, object]] = {
    Scheme.FP8_ROW: {"use_fp8_w8a8": True, "per_channel_quant": True},
    Scheme.FP8_BLOCK: {"use_fp8_w8a8": True, "block_shape": [128, 128]},
}


def fused_moe_arguments(weights: QuantisedWeights, int8_rows: bool) -> dict[str, object]:
    """w1, w2, their scales and zero points, and the options that say what they are.

    int8_rows: of int8, whether rows are rounded too (W8A8). UsageValueError for parts that are no whole groups of 32.
    """
    w13, w2, scheme = weights.w13, weights.w2, weights.scheme
    matrices = {"w1": w13.codes.flatten(1, 2), "w2": w2.codes}
    if scheme in INT4:
        size = _group_size(w13, w2)
        return {**matrices, "use_int4_w4a16": True, "block_shape": [0, size],
                "w1_scale": _over_groups(w13, w13.scales, size).flatten(1, 2),
                "w2_scale": _over_groups(w2, w2.scales, size),
                "w1_zp": None if w13.zeros is None else _row_pairs(_over_groups(w13, w13.zeros, size).flatten(1, 2)),
                "w2_zp": None if w2.zeros is None else _row_pairs(_over_groups(w2, w2.zeros, size))}
    int8 = {"use_int8_w8a8": True, "per_channel_quant": True} if int8_rows else {"use_int8_w8a16": True}
    return {**matrices, **_OPTIONS.get(scheme, int8), "w1_scale": w13.scales.flatten(1, 2), "w2_scale": w2.scales}


def _group_size(w13: Encoded, w2: Encoded) -> int:
    """Columns of the largest groups of which those of both matrices are made."""
    size = ENCODINGS[w13.scheme].columns
    assert size is not None
    size = gcd(size, *(number for one in (w13, w2) for number in (one.num_columns, one.column_start)))
    raise_faults("fused_moe_encoded", [] if size >= LEAST_GROUP else [
        f"{size} columns to a group, but should be {LEAST_GROUP} or more"])
    return size


def _over_groups(matrix: Encoded, per_block: torch.Tensor, size: int) -> torch.Tensor:
    """What stands beside every group of `size` columns."""
    columns = ENCODINGS[matrix.scheme].columns
    assert columns is not None
    first = matrix.column_start // size
    return per_block.repeat_interleave(columns // size, -1)[..., first:first + matrix.num_columns // size].contiguous()


def _row_pairs(zeros: torch.Tensor) -> torch.Tensor:
    """(E, N, groups) -> (E, N / 2, groups), the even row in the low half of a byte."""
    return (zeros[:, 0::2] | zeros[:, 1::2] << 4).contiguous()


def show_operands(call: EncodedCall, products: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Record codes and scales of the rows that both products took: one of each token, and one of each slot."""
    served_R = call.served_TK.flatten()
    for (codes, scales), first in zip(products, (True, False), strict=True):
        repeats = call.ids_TK.shape[1] if first else 1
        call.record(Stage.PERMUTE_CODES if first else Stage.ACT_CODES,
                    codes.float().repeat_interleave(repeats, 0)[served_R])
        call.record(Stage.PERMUTE_SCALES if first else Stage.ACT_SCALES,
                    scales.repeat_interleave(repeats, 0)[served_R])
