"""A right layer whose tokens travel to their experts as scale times value, to the bit."""

from dataclasses import replace

import torch

from tests.subjects.encoded import GROUP, encoded, shuffled, unshuffled
from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_call import ParallelCall, Routed, Served
from tests.subjects.parallel_variants import UNCOUNTED


class EncodedRows(ParallelMoE):
    """Scales travel row by row beside the values, and are brought into the kernel's order where they arrive."""

    promises = UNCOUNTED

    def dispatched(self, call: ParallelCall, group: Routed) -> Served:
        hidden = group.x_TH.shape[1]
        values_1TH, scales_1TQ = encoded(group.x_TH[None], torch.arange(hidden))
        served = super().dispatched(call, replace(group, x_TH=torch.cat([values_1TH, scales_1TQ.float()], 2)[0]))
        values_RH, scales_RQ = served.x_RH[:, :hidden], served.x_RH[:, hidden:]
        scales_1QR = unshuffled(self.swizzled(call, scales_RQ[None]), scales_RQ.shape[1], len(scales_RQ))
        return replace(served, x_RH=(values_RH * scales_1QR[0, torch.arange(hidden) // GROUP].T).to(group.x_TH.dtype))

    def swizzled(self, call: ParallelCall, scales_1RQ: torch.Tensor) -> torch.Tensor:
        return shuffled(scales_1RQ, call.spec.hidden_size)


encoded_rows = EncodedRows()
