"""Plans for torch.distributed.tensor.parallel.parallelize_module: how an MoE layer is spread over a device mesh."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from moe_fast.distributed.layer import moe_dtensor
from moe_fast.distributed.roles import Role, of_tensor
from moe_ref.contract.checks import check_is
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.module import LayerModule
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.weights import MoEWeights

Layouts = Placement | tuple[Placement, ...]


class _Plan(ParallelStyle):
    """Parameters become DTensors by the roles; forward takes and returns local tensors or DTensors in the layouts.

    input_layouts: what a local x_TH is along each mesh dimension, Replicate() or Shard(0), whose parts must be equally
    long on all ranks; a DTensor tells it itself. output_layouts: what is returned. One placement stands for all mesh
    dimensions. use_local_output: return the local tensor of the result.
    """

    roles: ClassVar[tuple[Role, ...]]

    def __init__(self, *, input_layouts: Layouts | None = None, output_layouts: Layouts | None = None,
                 use_local_output: bool = True) -> None:
        super().__init__()
        self.input_layouts = self._layouts("input_layouts", input_layouts)
        self.output_layouts = self._layouts("output_layouts", output_layouts)
        self.use_local_output = use_local_output

    def _layouts(self, name: str, given: Layouts | None) -> tuple[Placement, ...]:
        given = Replicate() if given is None else given
        layouts = (given,) * len(self.roles) if isinstance(given, Placement) else tuple(given)
        allowed = (Replicate(), of_tensor("x_TH", Role.TOKENS))
        if len(layouts) != len(self.roles) or any(one not in allowed for one in layouts):
            raise_faults(type(self).__name__, [f"{name}={given}, but should be Replicate() or Shard(0) for each of "
                                               f"{len(self.roles)} mesh dimensions"])
        return layouts

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        check_is("module", module, LayerModule, "a moe_fast.MoELayer")
        assert isinstance(module, LayerModule)
        raise_faults(type(self).__name__, self._faults(module, device_mesh))
        module.layer_function = self._forward(device_mesh)  # type: ignore[misc]
        return distribute_module(module, device_mesh, self._partition)

    def _faults(self, layer: LayerModule, mesh: DeviceMesh) -> list[str]:
        if layer.parallel != Parallel():
            return [f"the layer is built for {layer.parallel}, but should hold whole parameters: the mesh spreads it"]
        if mesh.ndim != len(self.roles):
            return [f"a mesh of shape {tuple(mesh.shape)}, but should have {len(self.roles)} dimensions: "
                    f"{', '.join(self.roles)}"]
        faults, spec = [], layer.spec
        for size, role in zip(mesh.shape, self.roles, strict=True):
            count = spec.num_experts if role is Role.EXPERTS else spec.intermediate_size
            if count < size:
                faults.append(f"{count} {role} over {size} ranks, but each should hold one at least")
        if spec.shared is not None and spec.shared.intermediate_size < mesh.size():
            faults.append(f"{spec.shared.intermediate_size} columns of the shared expert over {mesh.size()} ranks, but "
                          "each should hold one at least")
        return faults

    def _partition(self, name: str, module: torch.nn.Module, mesh: DeviceMesh) -> None:
        # Buffers and whatever has no role are replicated by distribute_module.
        for key, parameter in list(module.named_parameters(recurse=False)):
            placements = [of_tensor(key, role) for role in self.roles]
            distributed = distribute_tensor(parameter, mesh, placements, src_data_rank=self.src_data_rank)
            module.register_parameter(key, torch.nn.Parameter(distributed, requires_grad=parameter.requires_grad))

    def _forward(self, mesh: DeviceMesh) -> Callable[..., torch.Tensor]:
        """What the module calls in place of the function over groups, with its arguments."""
        def placed(tensor: torch.Tensor) -> DTensor:
            if isinstance(tensor, DTensor):
                return tensor
            return DTensor.from_local(tensor, mesh, self.input_layouts, run_check=False)

        def forward(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel, groups: object, *,
                    residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
            if trace is not None:
                raise_faults("trace", ["given, but a layer on DTensors shows no stages; moe_fast.moe does, by groups"])
            y_TH = moe_dtensor(placed(x_TH), weights, spec, output_placements=self.output_layouts,
                               residual_TH=None if residual_TH is None else placed(residual_TH))
            return y_TH.to_local() if self.use_local_output else y_TH

        return forward


class MoETensorParallel(_Plan):
    """Every expert's intermediate axis is cut over a mesh (tp,)."""

    roles = (Role.COLUMNS,)


class MoEExpertParallel(_Plan):
    """The routed experts are dealt out over a mesh (ep,), and the shared one's intermediate axis is cut over it."""

    roles = (Role.EXPERTS,)


class MoETensorExpertParallel(_Plan):
    """The routed experts are dealt out over ep and cut over tp, on a mesh (ep, tp); the shared one is cut over both."""

    roles = (Role.EXPERTS, Role.COLUMNS)
