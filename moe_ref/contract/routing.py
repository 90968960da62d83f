"""What a router hands to the experts."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routing:
    """Expert ids and weights per token and slot; a whole one can always be injected.

    ids_TK: integer; [0, E) are experts, [E, E + Z) identity experts; any other id, by convention -1 (dropped or
    not local), contributes nothing and gets no gradient. weights_TK: floating point. logits_TE: x @ router^T plus
    its bias, (T, E + Z), if known. shared_TS: weights of the shared expert's gates, if it has any.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    logits_TE: torch.Tensor | None = None
    shared_TS: torch.Tensor | None = None
