"""What an observer gets to see: copies in the contract's row order, made only when a trace is given."""

import torch

from moe_fast.kernels.align import Alignment
from moe_ref.contract.routing import Routing
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


def record_routing(trace: Trace | None, routing: Routing) -> None:
    """Logits, ids and weights as the experts will use them."""
    if trace is None:
        return
    if routing.logits_TE is not None:
        trace.record(Stage.LOGITS, routing.logits_TE)
    trace.record(Stage.IDS, routing.ids_TK)
    trace.record(Stage.WEIGHTS, routing.weights_TK)


def record_routed_rows(trace: Trace | None, alignment: Alignment, act_RI: torch.Tensor, down_RH: torch.Tensor,
                       ids_TK: torch.Tensor, num_experts: int) -> None:
    """act from expert order back to (token, slot) order, and down; rows of dropped slots are zero."""
    if trace is None:
        return
    num_valid = int(alignment.offsets[-1])
    rows = alignment.sorted_rows_R[:num_valid].long()
    ordered_RI = torch.zeros_like(act_RI)
    ordered_RI[rows] = act_RI[:num_valid]
    trace.record(Stage.ACT, ordered_RI)
    dropped_R = ((ids_TK < 0) | (ids_TK >= num_experts)).reshape(-1, 1)
    trace.record(Stage.DOWN, down_RH.masked_fill(dropped_R, 0.0))
