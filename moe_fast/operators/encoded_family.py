"""Which kernels compute a scheme: those that round rows to codes too, or those that decode weights alone."""

from moe_fast.operators.decoded import decoded_act_rows, decoded_down_rows, decoded_mlp_rows
from moe_fast.operators.encoded_arguments import EncodedDown, EncodedGateUp, EncodedMLP
from moe_fast.operators.encoded_rows import EncodedActRows, EncodedDownRows, EncodedRows
from moe_ref.contract.vocabulary import Scheme

SCALED = frozenset({Scheme.FP8_TENSOR, Scheme.FP8_ROW, Scheme.FP8_BLOCK, Scheme.MXFP8})
"""Schemes whose products have two operands in e4m3."""


def encoded_mlp_rows(mlp: EncodedMLP) -> EncodedRows:
    """Both products."""
    if mlp.w13.scheme in SCALED:
        from moe_fast.operators.scaled import scaled_mlp_rows
        return scaled_mlp_rows(mlp)
    return decoded_mlp_rows(mlp)


def encoded_gate_up_rows(given: EncodedGateUp) -> EncodedActRows:
    """The first product."""
    if given.w13.scheme in SCALED:
        from moe_fast.operators.scaled import scaled_act_rows
        return scaled_act_rows(given)
    return decoded_act_rows(given)


def encoded_down_rows(given: EncodedDown) -> EncodedDownRows:
    """The second product."""
    if given.w2.scheme in SCALED:
        from moe_fast.operators.scaled import scaled_down_rows
        return scaled_down_rows(given)
    return decoded_down_rows(given)
