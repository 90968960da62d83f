"""What a layer lets an observer see."""

from dataclasses import dataclass, field

import torch

from moe_ref.contract.vocabulary import Stage


@dataclass
class Trace:
    """Copies of stage tensors of one rank; recording never selects another kernel.

    Routed rows come in (token, slot) order, so `act` is (T*K, I) and `down` is (T*K, H), the latter
    with the routing weight applied unless Numerics.weight_at says otherwise.
    """

    tensors: dict[Stage, torch.Tensor] = field(default_factory=dict)

    def record(self, stage: Stage, tensor: torch.Tensor) -> None:
        """Keep a copy; an unknown stage, or one recorded twice, is an error of the implementation."""
        stage = Stage(stage)
        if stage in self.tensors:
            raise RuntimeError(f"stage {stage} was recorded twice in one call")
        self.tensors[stage] = tensor.detach().clone()
