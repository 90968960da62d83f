"""The nn.Module form of a layer: parameters of one rank's shard over a functional `moe`."""

from collections.abc import Callable
from typing import ClassVar

import torch

from moe_ref.contract.checks import check_comms, check_groups
from moe_ref.contract.comm import Groups
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.placements import rank_part
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.weights import (
    EXPERT_PARAMETERS,
    KEPT_PRECISE,
    SHARED_PARAMETERS,
    WHOLE_PARAMETERS,
    MoEWeights,
    WeightSource,
    check_expert,
    check_shared,
    check_weights,
    parameter_shapes,
)


class LayerModule(torch.nn.Module):
    """Holds the parameters of MoEWeights as this rank's shard, uninitialised: load or copy weights into them.

    A package subclasses it and sets `layer_function` to its own `moe`. Builds on the meta device. That all ranks
    have the same spec and Parallel is checked once, here, by one all_gather over each axis; UsageValueError shows both.
    selection_bias_E is a buffer in fp32 or better, since training updates it without a gradient. router_dtype:
    dtype of what a checkpoint may keep more precise (KEPT_PRECISE: router, gates, scales); default `dtype`.
    """

    layer_function: ClassVar[Callable[..., torch.Tensor]]

    def __init__(self, spec: MoESpec, parallel: Parallel | None = None, groups: Groups | None = None, *,
                 dtype: torch.dtype | None = None, router_dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        if isinstance(groups, Groups):
            check_comms(groups)
            # Before the sizes are compared, where one rank with another degree would leave the others waiting.
            _check_agreement(groups, repr((spec, Parallel() if parallel is None else parallel)))
        self.parallel, self.groups = check_groups(parallel, groups)
        for name, shape in parameter_shapes(spec, self.parallel, self.groups.rank).items():
            kind = dtype or torch.get_default_dtype()
            if name == "selection_bias_E":
                precise = torch.promote_types(kind, torch.float32)
                self.register_buffer(name, torch.zeros(shape, dtype=precise, device=device))
            else:
                kind = router_dtype or kind if name in KEPT_PRECISE else kind
                self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=kind, device=device)))

    @property
    def weights(self) -> MoEWeights:
        """The parameters as the functional form takes them."""
        return MoEWeights(**{name: getattr(self, name) for name in parameter_shapes(self.spec)})

    @torch.no_grad()
    def load_weights(self, weights: WeightSource, *, sharded: bool = False) -> None:
        """Copy weights into this rank's parameters, one expert at a time.

        Of unsharded weights only the experts that this rank hosts are read, and cut on the way; sharded=True: the
        source already is this rank's shard, as a checkpoint opened for it. Raises UsageValueError on shapes that do
        not fit.
        """
        unsharded, rank = Parallel(), self.groups.rank
        parallel = self.parallel if sharded else unsharded
        source_rank = rank if sharded else 0
        check_weights(weights, self.spec, parallel, source_rank)

        def copy(name: str, tensor: torch.Tensor, index: int | None = None) -> None:
            part = tensor if sharded else rank_part(name, tensor, self.parallel, rank)
            target = getattr(self, name)
            _check_target(name, part, target)
            (target if index is None else target[index]).copy_(part)

        for name in WHOLE_PARAMETERS:
            if (tensor := getattr(weights, name)) is not None:
                copy(name, tensor)
        shared = check_shared(weights.shared_expert(), self.spec, parallel, source_rank)
        for name, tensor in zip(SHARED_PARAMETERS, shared or (), strict=False):
            if tensor is not None:
                copy(name, tensor)
        for index, e in enumerate(self.parallel.hosted(self.spec.num_experts)[self.groups.ep.rank]):
            place = index if sharded else e
            expert = check_expert(weights.expert(place), self.spec, parallel, source_rank, place)
            for name, tensor in zip(EXPERT_PARAMETERS, expert, strict=True):
                if tensor is not None:
                    copy(name, tensor, index)

    def forward(self, x_TH: torch.Tensor, residual_TH: torch.Tensor | None = None, *,
                trace: Trace | None = None) -> torch.Tensor:
        """The layer's output, (T, H)."""
        return self.layer_function(x_TH, self.weights, self.spec, self.parallel, self.groups,
                                   residual_TH=residual_TH, trace=trace)


def _check_target(name: str, part: torch.Tensor, target: torch.Tensor) -> None:
    if target.is_meta:
        raise UsageTypeError(f"{name}: the layer is on the meta device; call to_empty(device=...) before load_weights")
    if torch.promote_types(part.dtype, target.dtype) != target.dtype:
        option = "router_dtype" if name in KEPT_PRECISE else "dtype"
        raise UsageTypeError(f"{name}: {part.dtype} does not fit into the layer's {target.dtype} without rounding; "
                             f"build the layer with {option}={part.dtype}, or convert the weights first")


def _check_agreement(groups: Groups, description: str) -> None:
    """Compares the texts of the whole grid on every rank, so that none goes on while another one raises."""
    texts = [description.encode()]
    for comm in (groups.tp, groups.ep):
        if comm.size > 1:
            mine = torch.tensor(list(b"\0".join(texts)), dtype=torch.uint8, device=comm.device)
            texts = [text for part in comm.all_gather(mine) for text in bytes(part.tolist()).split(b"\0")]
    for rank, other in enumerate(texts):
        if other != description.encode():
            raise UsageValueError(f"rank {groups.rank} builds {description}, but rank {rank} builds {other.decode()}")
