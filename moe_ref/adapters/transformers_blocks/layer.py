"""A layer that is a block of transformers: its own router, experts and merge; the ranks' sum after it.

transformers 5.23. Translated: the names and layouts of parameters; ids that name no expert, see `_sentinels`. With
tensor parallelism every rank runs a block of its share of the columns, and one all-reduce follows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from moe_ref.adapters.transformers_blocks.blocks import build, logits_gate, served_family
from moe_ref.adapters.transformers_blocks.family import Backend, Family
from moe_ref.adapters.transformers_blocks.parameters import gate_parameters, parameters_of
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.collectives import enter, leave, once
from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.contract.weights import WHOLE_PARAMETERS, MoEWeights


@dataclass(frozen=True)
class BlockLayer:
    """An implementation: the block of the family that a spec belongs to, with one experts backend."""

    CAPABILITIES: Capabilities
    backend: Backend

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None,
            check: str = "metadata") -> torch.Tensor:
        """The whole layer, (T, H) in x's dtype; UsageValueError where no block computes the spec."""
        tp = (groups or Groups()).tp
        family, held = served_family(spec), entered(weights, tp)
        columns = weights.w13_EGIH.shape[2]
        wide = 1 if weights.shared_w2_HI is None else weights.shared_w2_HI.shape[1]
        block = build(spec, columns, wide, self.backend)
        logits_TE = None if logits_TE is None else enter(logits_TE, tp)
        given = given_routing(logits_TE, routing, held, family, spec, x_TH.dtype)
        with replaced_routing(block, family, given) as gate, expert_parallel(block, routing is not None):
            output = functional_call(block, parameters_of(held, family), (enter(x_TH, tp)[None],))
        merged_TH = (output[0] if isinstance(output, tuple) else output).reshape(x_TH.shape)
        if trace is not None:
            record(trace, gate.seen, spec, routing)
            trace.record(Stage.MERGED, merged_TH)
        y_TH = leave(merged_TH, tp)
        return y_TH if residual_TH is None else y_TH + residual_TH


def entered(weights: MoEWeights, tp: Comm) -> MoEWeights:
    """What every rank holds alike gets its gradient from all of them; the bias of w2 is added by the first one."""
    whole = {name: enter(tensor, tp) for name in WHOLE_PARAMETERS
             if (tensor := getattr(weights, name)) is not None and tensor.is_floating_point()}
    if weights.w2_bias_EH is not None:
        whole["w2_bias_EH"] = once(enter(weights.w2_bias_EH, tp), tp.rank == 0)
    return replace(weights, **whole)


@dataclass
class Gate:
    """What a router gave, or what took its place."""

    seen: Any = None


@contextmanager
def replaced_routing(block: nn.Module, family: Family, given: Any) -> Iterator[Gate]:
    """While the context lasts the router's output is seen, and is `given` where that is not None."""
    gate = Gate()

    def hook(module: nn.Module, inputs: object, output: Any) -> Any:
        gate.seen = output if given is None else given
        return gate.seen

    handle = block.get_submodule(family.gate).register_forward_hook(hook)
    try:
        yield gate
    finally:
        handle.remove()


def given_routing(logits_TE: torch.Tensor | None, routing: Routing | None, weights: MoEWeights, family: Family,
                  spec: MoESpec, dtype: torch.dtype) -> Any:
    """What the router would hand over for injected logits or an injected routing; None without."""
    if logits_TE is not None:
        return _from_logits(logits_TE, weights, family, spec, dtype)
    if routing is not None:
        return _sentinels(routing, spec.num_experts, family.rounded(family.weights, dtype))
    return None


def _from_logits(logits_TE: torch.Tensor, weights: MoEWeights, family: Family, spec: MoESpec,
                 dtype: torch.dtype) -> Any:
    """The router's own output for these logits: the identity times logits is exact, and its bias is in them already."""
    given_TE = logits_TE.to(family.rounded(family.logits, dtype))
    router_EE = torch.eye(spec.num_experts, dtype=given_TE.dtype, device=given_TE.device)
    bias_E = None if weights.router_bias_E is None else torch.zeros_like(weights.router_bias_E, dtype=given_TE.dtype)
    held = gate_parameters(replace(weights, router_EH=router_EE, router_bias_E=bias_E), family)
    named = {name.removeprefix(f"{family.gate}."): tensor for name, tensor in held.items()}
    return functional_call(logits_gate(spec), named, (given_TE,))


def _sentinels(routing: Routing, num_experts: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    """(logits, weights, ids) as a router hands them over; no expert is id E with weight 0, as in expert parallelism.

    transformers.distributed.expert_parallel.AllReduceEP marks routes to other ranks so.
    """
    ids_TK = routing.ids_TK.long()
    outside_TK = (ids_TK < 0) | (ids_TK >= num_experts)
    return None, routing.weights_TK.to(dtype).masked_fill(outside_TK, 0.0), ids_TK.masked_fill(outside_TK, num_experts)


@contextmanager
def expert_parallel(block: nn.Module, on: bool) -> Iterator[None]:
    """While the context lasts the experts know id E; transformers sets this flag where it shards experts."""
    experts = block.get_submodule("experts")
    before = getattr(experts, "_is_expert_parallel", None)
    if before is None or not on:
        yield
        return
    experts._is_expert_parallel = True  # type: ignore[assignment]
    try:
        yield
    finally:
        experts._is_expert_parallel = before  # type: ignore[assignment]


def record(trace: Trace, seen: Any, spec: MoESpec, routing: Routing | None) -> None:
    """Logits, ids and weights as the experts were handed them; an injected routing as it was given."""
    if routing is not None:
        trace.record(Stage.IDS, routing.ids_TK)
        trace.record(Stage.WEIGHTS, routing.weights_TK)
    else:
        if len(seen) == 3:
            logits_TE, weights_TK, ids_TK = seen
        else:
            scores_TE, logits_TE = seen
            weights_TK, ids_TK = scores_TE.topk(spec.top_k, dim=-1)
        trace.record(Stage.LOGITS, logits_TE)
        trace.record(Stage.IDS, ids_TK)
        trace.record(Stage.WEIGHTS, weights_TK)
