"""What a router hands to the experts."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routing:
    """Expert ids and weights per token and slot; a whole one can always be injected.

    ids_TK: integer; an id outside [0, E) contributes nothing. weights_TK: floating point.
    logits_TE: the scores the choice came from, if known. shared_TS: gate of the shared expert, S = 1.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    logits_TE: torch.Tensor | None = None
    shared_TS: torch.Tensor | None = None
