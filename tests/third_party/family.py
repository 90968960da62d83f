"""One released architecture: how to build its block, and how its parameters and numbers are ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec

H, I, E, K = 64, 32, 16, 4  # noqa: E741 - the axis letters of the whole project
SHARED_WIDTH = 48
BATCH, SEQUENCE = 2, 24
TOKENS = BATCH * SEQUENCE

Tensors = dict[str, torch.Tensor]
Read = Callable[[nn.Module], Tensors]
ReadRouting = Callable[[Any, nn.Module, MoESpec], Routing]
Fit = Literal["whole", "logits", "routing", "router"]
Experts = Literal["eager", "grouped_mm"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """An adapter to one block of transformers.

    module:    transformers.models.<module>
    config, options, block, arguments: block(config(**options), *arguments) is what runs
    make:      builds what runs where no class of transformers is just the layer; replaces `block`
    read:      the block's parameters as differentiable views under the names of MoEWeights
    released:  rounding points with eager experts; grouped: with the default ones, where those have more apart from
               eager ones than a sum in fp32
    router:    the submodule whose output holds the routing, and routing() reads it; logits: the submodule whose
               output is the logits, where they are injected
    fit:       "whole": routed by our router; "logits": our router, with the block's logits; "routing": the block's
               routing is injected, its router is outside the spec; "router": only the router is compared
    because:   why it is not "whole"
    fan_in:    axis of a three-dimensional parameter that is summed over, for its scale
    kept:      parts of names that this layer keeps in fp32 beyond what from_pretrained does, with the reason
    unread:    start of names of parameters that these tokens do not reach
    """

    module: str
    config: str
    spec: MoESpec
    read: Read
    routing: ReadRouting
    name: str = ""
    block: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    arguments: tuple[object, ...] = ()
    make: Callable[[Any, Any], nn.Module] | None = None
    released: ReleasedNumerics = field(default_factory=ReleasedNumerics)
    grouped: ReleasedNumerics | None = None
    router: str = "gate"
    logits: str = ""
    fit: Fit = "whole"
    because: str = ""
    fan_in: int = -1
    kept: tuple[str, ...] = ()
    unread: str | None = None

    def as_run(self, experts: Experts, replaceable: bool) -> "Family":
        """The family with the rounding points of these experts; some blocks have no others than their own."""
        if experts == "eager" or not replaceable:
            return self
        return replace(self, released=self.grouped or replace(self.released, merge="fp32"))

    @property
    def title(self) -> str:
        """Its name in tables and on the command line."""
        return self.name or self.module
