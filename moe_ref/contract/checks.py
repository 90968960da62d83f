"""Checks of a call's metadata, before any kernel starts; values only when asked, since that needs a host sync."""

import torch

from moe_ref.contract.comm import Groups
from moe_ref.contract.errors import UsageTypeError, UsageValueError, raise_faults
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.weights import WeightSource

CHECKS = ("metadata", "values")


def check_tokens(x_TH: torch.Tensor, spec: MoESpec, dtypes: tuple[torch.dtype, ...], who: str) -> None:
    """x_TH must be (T, H) of one of `dtypes`; T = 0 is valid."""
    if x_TH.dtype not in dtypes:
        raise UsageTypeError(f"x_TH: dtype {x_TH.dtype}, but should be one of "
                             f"{', '.join(str(dtype) for dtype in dtypes)} [{who}]")
    if x_TH.dim() != 2 or x_TH.shape[1] != spec.hidden_size:
        raise UsageValueError(f"x_TH: shape {tuple(x_TH.shape)}, but should be (T, {spec.hidden_size}) [{who}]")


def check_groups(parallel: Parallel | None, groups: Groups | None) -> tuple[Parallel, Groups]:
    """The pair to work with; raises unless the group sizes are the declared degrees."""
    parallel, groups = parallel or Parallel(), groups or Groups()
    faults = [f"world size: the {axis} group has {comm.size} ranks, but parallel.{axis} is {degree}"
              for axis, comm, degree in (("tp", groups.tp, parallel.tp), ("ep", groups.ep, parallel.ep))
              if comm.size != degree]
    if parallel.ep > 1:
        faults.append(f"ep={parallel.ep}, but expert parallelism is not implemented yet, only ep=1")
    raise_faults("groups", faults)
    return parallel, groups


def check_routing(routing: Routing, spec: MoESpec, num_tokens: int, check: str) -> None:
    """Shapes and kinds of a routing; with check="values" also that every id is -1 or inside [0, E + Z)."""
    if check not in CHECKS:
        raise UsageValueError(f"check={check!r}, but should be one of {', '.join(CHECKS)}")
    shape = (num_tokens, spec.top_k)
    faults = [f"{name}: shape {tuple(tensor.shape)}, but should be {shape}"
              for name, tensor in (("ids_TK", routing.ids_TK), ("weights_TK", routing.weights_TK))
              if tuple(tensor.shape) != shape]
    gates = spec.shared.num_gates if spec.shared else 0
    if routing.shared_TS is not None and tuple(routing.shared_TS.shape) != (num_tokens, gates):
        faults.append(f"shared_TS: shape {tuple(routing.shared_TS.shape)}, but should be {(num_tokens, gates)}")
    if routing.shared_TS is None and spec.shared is not None and spec.shared.gate == "router":
        faults.append(f"shared_TS is missing, but shared.gate='router' needs {(num_tokens, gates)}: the weights of "
                      "shared experts depend on the choice")
    raise_faults("routing", faults)
    if routing.ids_TK.dtype not in (torch.int32, torch.int64):
        raise UsageTypeError(f"ids_TK: dtype {routing.ids_TK.dtype}, but should be torch.int32 or torch.int64")
    if not routing.weights_TK.dtype.is_floating_point:
        raise UsageTypeError(f"weights_TK: dtype {routing.weights_TK.dtype}, but should be floating point")
    if check == "values" and num_tokens:
        low, high = int(routing.ids_TK.min()), int(routing.ids_TK.max())
        if low < -1 or high >= spec.num_choices:
            raise UsageValueError(f"ids_TK: values from {low} to {high}, but should be in "
                                  f"[0, {spec.num_choices}), or -1 for none")


def check_router(weights: WeightSource, spec: MoESpec) -> None:
    """Whatever the spec's routing reads must be there."""
    router = spec.router
    needed = {"router_EH": router is not None,
              "router_bias_E": router is not None and router.logit_bias,
              "selection_bias_E": router is not None and router.selection_bias is not None,
              "weight_scale_E": router is not None and router.learned_scale is not None,
              "shared_gate_SH": spec.shared is not None and spec.shared.num_gates > 0}
    raise_faults("weights", [f"{name} is missing, but the spec needs it"
                             for name, is_needed in needed.items() if is_needed and getattr(weights, name) is None])


def check_logits(logits_TE: torch.Tensor, spec: MoESpec, num_tokens: int) -> None:
    """Injected logits must be floating point and (T, E + Z)."""
    shape = (num_tokens, spec.num_choices)
    if tuple(logits_TE.shape) != shape:
        raise UsageValueError(f"logits_TE: shape {tuple(logits_TE.shape)}, but should be {shape}")
    if not logits_TE.dtype.is_floating_point:
        raise UsageTypeError(f"logits_TE: dtype {logits_TE.dtype}, but should be floating point")


def check_residual(residual_TH: torch.Tensor, x_TH: torch.Tensor) -> None:
    """The residual must look like x."""
    if residual_TH.shape != x_TH.shape or residual_TH.dtype != x_TH.dtype:
        raise UsageValueError(f"residual_TH: {tuple(residual_TH.shape)} {residual_TH.dtype}, but should be "
                              f"{tuple(x_TH.shape)} {x_TH.dtype} as x_TH")
