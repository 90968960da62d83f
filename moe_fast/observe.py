"""What an observer gets to see: copies in the contract's row order, made only when a trace is given."""

from collections.abc import Iterable

import torch

from moe_fast.kernels.align import Alignment
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.routing import Routing
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


def check_untracked(arguments: Iterable[object]) -> None:
    """Raise UsageValueError if autograd would have to follow: what a traced call returns has no gradient."""
    if torch.is_grad_enabled() and any(isinstance(one, torch.Tensor) and one.requires_grad for one in arguments):
        raise UsageValueError("trace: a Trace is given while gradients are recorded, but a traced call should be under "
                              "torch.no_grad() [moe_fast]")


def record_routing(trace: Trace, routing: Routing) -> None:
    """Logits, ids and weights as the experts will use them."""
    if routing.logits_TE is not None:
        trace.record(Stage.LOGITS, routing.logits_TE)
    trace.record(Stage.IDS, routing.ids_TK)
    trace.record(Stage.WEIGHTS, routing.weights_TK)


def record_routed_rows(trace: Trace | None, alignment: Alignment, act_RI: torch.Tensor,
                       down_RH: torch.Tensor) -> None:
    """act from expert order back to (token, slot) order, and down; rows of dropped slots are zero."""
    if trace is None:
        return
    num_valid = int(alignment.offsets[-1])
    rows = alignment.sorted_rows_R[:num_valid].long()
    ordered_RI = torch.zeros_like(act_RI)
    ordered_RI[rows] = act_RI[:num_valid]
    trace.record(Stage.ACT, ordered_RI)
    trace.record(Stage.DOWN, down_RH.masked_fill(alignment.local_ids_R[:, None] < 0, 0.0))
