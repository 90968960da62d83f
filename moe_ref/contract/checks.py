"""Checks of a call's metadata, before any kernel starts; values only when asked, since that needs a host sync."""

import torch

from moe_ref.contract.comm import Groups
from moe_ref.contract.errors import UsageTypeError, UsageValueError, raise_faults
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Schedule, SharedPlacement, Tokens
from moe_ref.contract.weights import WHOLE_PARAMETERS, WeightSource

CHECKS = ("metadata", "values")


def check_is(name: str, value: object, kind: type, wanted: str) -> None:
    """Raise UsageTypeError that names the type at hand and what should be there."""
    if not isinstance(value, kind):
        raise UsageTypeError(f"{name}: {type(value).__name__}, but should be {wanted}")


def check_tokens(x_TH: torch.Tensor, spec: MoESpec, dtypes: tuple[torch.dtype, ...], who: str) -> None:
    """x_TH must be a tensor (T, H) of one of `dtypes`; T = 0 is valid."""
    check_is("spec", spec, MoESpec, "a MoESpec")
    check_is("x_TH", x_TH, torch.Tensor, f"a tensor (T, {spec.hidden_size}), the first argument")
    if x_TH.dtype not in dtypes:
        raise UsageTypeError(f"x_TH: dtype {x_TH.dtype}, but should be one of "
                             f"{', '.join(str(dtype) for dtype in dtypes)} [{who}]")
    if x_TH.dim() != 2 or x_TH.shape[1] != spec.hidden_size:
        raise UsageValueError(f"x_TH: shape {tuple(x_TH.shape)}, but should be (T, {spec.hidden_size}) [{who}]")


def check_comms(groups: Groups) -> None:
    """Both groups must be able to communicate."""
    for axis, comm in (("tp", groups.tp), ("ep", groups.ep)):
        if not hasattr(comm, "all_reduce"):
            raise UsageTypeError(f"groups.{axis}: {type(comm).__name__}, but should be a Comm")


def check_groups(parallel: Parallel | None, groups: Groups | None) -> tuple[Parallel, Groups]:
    """The pair to work with; raises unless the group sizes are the declared degrees."""
    parallel, groups = Parallel() if parallel is None else parallel, Groups() if groups is None else groups
    check_is("parallel", parallel, Parallel, "a Parallel")
    check_is("groups", groups, Groups, "Groups(tp=comm, ep=comm)")
    check_comms(groups)
    faults = [f"world size: the {axis} group has {comm.size} ranks, but parallel.{axis} is {degree}"
              for axis, comm, degree in (("tp", groups.tp, parallel.tp), ("ep", groups.ep, parallel.ep))
              if comm.size != degree]
    raise_faults("groups", faults)
    return parallel, groups


def check_capacity(spec: MoESpec, parallel: Parallel) -> None:
    """A router with a capacity counts all tokens of the batch, so it cannot run where a rank holds a part of them."""
    if spec.router is not None and spec.router.capacity is not None and parallel.tokens is not Tokens.REPLICATED:
        raise UsageValueError(f"tokens={parallel.tokens}, but the router's capacity counts all tokens of the batch: "
                              "hand in a routing, or replicate the tokens")


def check_partial(parallel: Parallel) -> None:
    """Raise where the ranks' results are not partial sums of the layer."""
    if parallel.schedule not in (Schedule.ALL_REDUCE, Schedule.REDUCE_SCATTER):
        raise UsageValueError(f"reduce=False with schedule={parallel.schedule}, but only all_reduce and reduce_scatter "
                              "have a partial sum of merged tokens")
    if parallel.shared is SharedPlacement.REPLICATED:
        raise UsageValueError(f"reduce=False with shared={parallel.shared}, but a whole shared expert is added after "
                              "the reduction; should be sharded")


def check_routing(routing: Routing, spec: MoESpec, num_tokens: int, check: str) -> None:
    """Shapes and kinds of a routing; with check="values" also that every id is -1 or inside [0, E + Z)."""
    if check not in CHECKS:
        raise UsageValueError(f"check={check!r}, but should be one of {', '.join(CHECKS)}")
    check_is("routing", routing, Routing, "Routing(ids_TK, weights_TK)")
    for name in ("ids_TK", "weights_TK"):
        check_is(f"routing.{name}", getattr(routing, name), torch.Tensor, "a tensor (T, K)")
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


def check_injected(routing: Routing | None, logits_TE: torch.Tensor | None) -> None:
    """Only one of them can replace what the router computes."""
    if routing is not None and logits_TE is not None:
        raise UsageValueError("routing and logits_TE are both given, but only one of them can be injected")


def check_devices(x_TH: torch.Tensor, weights: WeightSource, *others: Routing | torch.Tensor | None) -> None:
    """Everything must lie where x_TH does, and hold numbers: a meta tensor has none."""
    held = {name: getattr(weights, name, None)
            for name in ("w13_EGIH", "w2_EHI", *WHOLE_PARAMETERS)} | {"x_TH": x_TH}
    for other in others:
        if isinstance(other, Routing):
            held |= {f"routing.{name}": getattr(other, name) for name in ("ids_TK", "weights_TK", "shared_TS")}
        elif other is not None:
            held["gradient or residual"] = other
    for name, tensor in held.items():
        if tensor is not None and tensor.is_meta:
            raise UsageTypeError(f"{name}: on the meta device, which holds no numbers; call to_empty and load weights")
        if tensor is not None and tensor.device != x_TH.device:
            raise UsageTypeError(f"{name}: device {tensor.device}, but should be {x_TH.device} as x_TH")


def check_logits(logits_TE: torch.Tensor, spec: MoESpec, num_tokens: int) -> None:
    """Injected logits must be floating point and (T, E + Z)."""
    check_is("logits_TE", logits_TE, torch.Tensor, f"a tensor (T, {spec.num_choices})")
    shape = (num_tokens, spec.num_choices)
    if tuple(logits_TE.shape) != shape:
        raise UsageValueError(f"logits_TE: shape {tuple(logits_TE.shape)}, but should be {shape}")
    if not logits_TE.dtype.is_floating_point:
        raise UsageTypeError(f"logits_TE: dtype {logits_TE.dtype}, but should be floating point")


def check_residual(residual_TH: torch.Tensor, x_TH: torch.Tensor) -> None:
    """The residual must look like x."""
    check_is("residual_TH", residual_TH, torch.Tensor, "a tensor as x_TH")
    if residual_TH.shape != x_TH.shape or residual_TH.dtype != x_TH.dtype:
        raise UsageValueError(f"residual_TH: {tuple(residual_TH.shape)} {residual_TH.dtype}, but should be "
                              f"{tuple(x_TH.shape)} {x_TH.dtype} as x_TH")
