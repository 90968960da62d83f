"""What an observer gets to see: copies in the contract's row order, made only when a trace is given."""

from collections.abc import Iterable, Mapping

import torch

from moe_fast.kernels.align import Alignment
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.routing import Routing
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage


def check_untracked(arguments: Iterable[object]) -> None:
    """Raise UsageValueError if autograd would have to follow: what a traced call returns has no gradient."""
    if _is_tracked(arguments):
        raise UsageValueError("trace: a Trace is given while gradients are recorded, but a traced call should be under "
                              "torch.no_grad() [moe_fast]")


def check_forward_only(arguments: Iterable[object]) -> None:
    """Raise UsageTypeError if autograd would have to follow: codes have no gradient."""
    if _is_tracked(arguments):
        raise UsageTypeError("an argument requires a gradient, but experts that are encoded have a forward pass alone: "
                             "should be under torch.no_grad() [moe_fast]")


def _is_tracked(arguments: Iterable[object]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(one, torch.Tensor) and one.requires_grad for one in arguments)


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


def record_codes(trace: Trace | None, alignment: Alignment, codes: Mapping[Stage, torch.Tensor]) -> None:
    """Codes and scales of rows, which are in (token, slot) order, as numbers in fp32; zero for dropped slots."""
    if trace is not None:
        for stage, tensor in codes.items():
            trace.record(stage, tensor.to(torch.float32).masked_fill(alignment.local_ids_R[:, None] < 0, 0.0))
