"""transformers' own tensor and expert parallelism: its plans shard a whole block over the ranks' process group.

transformers 5.23: `apply_tensor_parallelism`, `apply_expert_parallelism` and the plans of the configuration classes,
with the default experts (grouped_mm). The whole parameters are put together from the ranks' shards, which is the
adapter's doing and is not counted; what is cut, sent and added up after that is theirs. Ranks are process ranks, since
their code calls torch.distributed: `--ranks gloo`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.mixin import DistributedMixin
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from moe_ref.adapters.transformers_blocks.blocks import block_class, configuration, served_family
from moe_ref.adapters.transformers_blocks.families import FAMILIES
from moe_ref.adapters.transformers_blocks.layer import expert_parallel, given_routing, record, replaced_routing
from moe_ref.adapters.transformers_blocks.parameters import parameters_of
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.placements import placements, rank_part
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Ranks, Stage
from moe_ref.contract.weights import MoEWeights

Plan = Literal["tp", "ep"]


@dataclass(frozen=True)
class PlanLayer:
    """An implementation: a block that transformers' tensor-parallel or expert-parallel plan has sharded."""

    CAPABILITIES: Capabilities
    plan: Plan

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None,
            check: str = "metadata") -> torch.Tensor:
        """The whole layer, (T, H) in x's dtype, complete on every rank."""
        groups, parallel = groups or Groups(), parallel or Parallel()
        call = _Call(self.plan, spec, parallel, groups, routing, trace)
        names = [name for name, _ in weights.named_tensors()]
        y_TH = _Differentiable.apply(call, names, x_TH, logits_TE, *(getattr(weights, name) for name in names))
        return y_TH if residual_TH is None else y_TH + residual_TH


@dataclass(frozen=True)
class _Call:
    """One call on one rank."""

    plan: Plan
    spec: MoESpec
    parallel: Parallel
    groups: Groups
    routing: Routing | None
    trace: Trace | None

    def run(self, x_TH: torch.Tensor, logits_TE: torch.Tensor | None,
            weights: MoEWeights) -> tuple[torch.Tensor, dict[str, nn.Parameter]]:
        """The block's output, and its parameters as they were before sharding, by name, as leaves of a graph."""
        family, spec = served_family(self.spec), self.spec
        block = _whole_block(weights, spec)
        group = self.groups.tp if self.plan == "tp" else self.groups.ep
        given = given_routing(logits_TE, self.routing, weights, family, spec, x_TH.dtype)
        if group.size > 1:
            _shard(block, spec, self.plan, group)
        with replaced_routing(block, family, given) as gate, expert_parallel(block, self.routing is not None):
            output = block(x_TH[None])
        y_TH = (output[0] if isinstance(output, tuple) else output).reshape(x_TH.shape)
        if self.trace is not None:
            record(self.trace, gate.seen, spec, self.routing)
        return y_TH, dict(block.named_parameters())

    def whole(self, weights: MoEWeights) -> MoEWeights:
        """Of every parameter all ranks' parts."""
        found = {}
        for name, tensor in weights.named_tensors():
            placement = placements(self.parallel)[name]
            if placement.shard_dim is not None:
                tensor = _gathered(tensor, placement.shard_dim, self.groups.tp)
                over_ep = placement.shard_dim if placement.expert_dim is None else placement.expert_dim
                tensor = _gathered(tensor, over_ep, self.groups.ep)
            elif placement.expert_dim is not None:
                tensor = _gathered(tensor, placement.expert_dim, self.groups.ep)
            found[name] = tensor
        return MoEWeights(**found)


def _gathered(tensor: torch.Tensor, dim: int, group: Comm) -> torch.Tensor:
    if group.size == 1:
        return tensor
    return torch.cat(group.all_gather(tensor.movedim(dim, 0).contiguous())).movedim(0, dim)


def _whole_block(weights: MoEWeights, spec: MoESpec) -> nn.Module:
    """The block with copies of these weights as its parameters."""
    family, config = served_family(spec), configuration(spec, spec.intermediate_size)
    config._experts_implementation = "grouped_mm"
    shared = spec.shared.intermediate_size if spec.shared else 1
    block = block_class(spec)(config, shared)
    values = {name: tensor.detach().clone() for name, tensor in parameters_of(weights, family).items()}
    block.load_state_dict(values, assign=True)
    return block.requires_grad_(torch.is_grad_enabled())


def _shard(block: nn.Module, spec: MoESpec, plan: Plan, group: Comm) -> None:
    """Apply the plan of the configuration class to the block at its place in a model."""
    config = configuration(spec, spec.intermediate_size)
    rules: Mapping[str, str] = getattr(config, f"base_model_{plan}_plan")
    place = next(rule for rule in rules if rule.endswith(".experts")).split(".")[2]
    model, layer = nn.Module(), nn.Module()
    setattr(layer, place, block)
    model.layers = nn.ModuleList([layer])
    model.config = config  # type: ignore[assignment]
    mesh = DeviceMesh.from_group(getattr(group, "process_group", None) or dist.group.WORLD, "cpu",  # type: ignore
                                 mesh_dim_names=(plan,))
    expanded: Any = DistributedMixin._expand_parallel_plan(model, dict(rules))  # type: ignore[arg-type]
    if plan == "tp":
        apply_tensor_parallelism(model, mesh, expanded)
    else:
        # Every rank of the group holds the same tokens: the group of experts is that of the batch too.
        apply_expert_parallelism(model, mesh, mesh, expanded)


class _Differentiable(torch.autograd.Function):
    """Sharding makes parameters of its own, so their gradients are carried back to what the rank was handed."""

    @staticmethod
    def forward(ctx: Any, call: _Call, names: list[str], x_TH: torch.Tensor, logits_TE: torch.Tensor | None,
                *tensors: torch.Tensor) -> torch.Tensor:
        weights = MoEWeights(**dict(zip(names, tensors, strict=True)))
        with torch.no_grad():
            whole = call.whole(weights)
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            x_TH = x_TH.detach().requires_grad_(torch.is_grad_enabled())
            if logits_TE is not None:
                logits_TE = logits_TE.detach().requires_grad_(torch.is_grad_enabled())
            y_TH, parameters = call.run(x_TH, logits_TE, whole)
        ctx.kept = call, names, whole, x_TH, logits_TE, y_TH, parameters
        return y_TH.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        call, names, whole, x_TH, logits_TE, y_TH, parameters = ctx.kept
        torch.autograd.backward(y_TH, gradient)
        found = {name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                 for name, parameter in parameters.items() if parameter.grad is not None}
        gradients = _by_our_names(whole, found, call)
        return (None, None, x_TH.grad, None if logits_TE is None else logits_TE.grad,
                *(gradients.get(name) for name in names))


def _by_our_names(whole: MoEWeights, found: Mapping[str, torch.Tensor], call: _Call) -> dict[str, torch.Tensor]:
    """Gradients of the block's parameters as those of this rank's weights: back through what translated them."""
    leaves = replace(whole, **{name: tensor.detach().requires_grad_() for name, tensor in whole.named_tensors()})
    with torch.enable_grad():
        named = parameters_of(leaves, served_family(call.spec))
        torch.autograd.backward([named[name] for name in found], list(found.values()))
    return {field.name: rank_part(field.name, leaf.grad, call.parallel, call.groups.rank).clone()
            for field in fields(leaves) if (leaf := getattr(leaves, field.name)) is not None and leaf.grad is not None}


def _layer(plan: Plan, modules: tuple[str, ...], max_tp: int, max_ep: int) -> PlanLayer:
    """One declaration per block; a rank's own sum is inside of theirs, so that only the output shows it."""
    first, *others = (replace(family.capabilities(f"transformers.{plan}_plan", transformers.__version__, "grouped_mm"),
                              stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS), ranks=(Ranks.GLOO,), devices=("cpu",),
                              collectives_through_groups=False, max_tp=max_tp, max_ep=max_ep)
                      for family in FAMILIES if family.module in modules)
    return PlanLayer(replace(first, others=tuple(others)), plan)


SHARED = ("qwen2_moe", "deepseek_v2", "deepseek_v3", "nemotron_h")
# gpt_oss has no tensor-parallel rule for its experts, llama4 no expert-parallel plan.
TP_PLAN = _layer("tp", ("mixtral", "olmoe", "llama4", *SHARED), max_tp=64, max_ep=1)
EP_PLAN = _layer("ep", ("mixtral", "olmoe", "gpt_oss", *SHARED), max_tp=1, max_ep=64)
