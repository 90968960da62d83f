"""Which kernels compute a scheme: those that round rows to codes too, or those that decode weights alone.

traced: codes and scales of rows are returned as well, where there are any.
"""

from moe_fast.operators.decoded import decoded_act_rows, decoded_down_rows, decoded_mlp_rows
from moe_fast.operators.encoded_arguments import EncodedDown, EncodedGateUp, EncodedMLP
from moe_fast.operators.encoded_rows import EncodedActRows, EncodedDownRows, EncodedRows
from moe_fast.operators.scaled import SCHEMES, scaled_act_rows, scaled_down_rows, scaled_mlp_rows


def encoded_mlp_rows(mlp: EncodedMLP, traced: bool) -> EncodedRows:
    """Both products."""
    return scaled_mlp_rows(mlp, traced) if mlp.w13.scheme in SCHEMES else decoded_mlp_rows(mlp)


def encoded_gate_up_rows(given: EncodedGateUp, traced: bool) -> EncodedActRows:
    """The first product."""
    return scaled_act_rows(given, traced) if given.w13.scheme in SCHEMES else decoded_act_rows(given)


def encoded_down_rows(given: EncodedDown, traced: bool) -> EncodedDownRows:
    """The second product."""
    return scaled_down_rows(given, traced) if given.w2.scheme in SCHEMES else decoded_down_rows(given)
