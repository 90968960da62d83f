"""The layer on DTensors: the operators, and redistributions where tensors change their placement."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from moe_fast.capabilities import CAPABILITIES
from moe_fast.distributed.parts import in_parts
from moe_fast.distributed.roles import Role, of_argument, of_tensor
from moe_fast.distributed.rules import BIASES
from moe_fast.form import form_of, routed_form
from moe_fast.held import operands_of
from moe_fast.operators.experts import experts
from moe_fast.operators.router_logits import FLOATING, router_logits
from moe_fast.operators.select import select_by
from moe_ref.contract.checks import check_is, check_residual, check_tokens
from moe_ref.contract.errors import UsageTypeError, raise_faults
from moe_ref.contract.features import Feature
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.weights import MoEWeights, check_weights

SUPPORTED = replace(CAPABILITIES, name="moe_fast.distributed",
                    features=(Feature.DENSE, Feature.GROUPS, Feature.SELECTION_BIAS, Feature.SHARED_EXPERT,
                              Feature.RESIDUAL, Feature.WEIGHT_ON_INPUT, Feature.NOT_GATED, Feature.MLP_BIAS,
                              Feature.LIMIT, Feature.SCALED_SWIGLU, Feature.SOFTCAP, Feature.SHARED_MEAN,
                              Feature.OUTPUT_BIAS))
"""What this composition of operators computes, whatever else the operators learn."""

SHARED_GATE = Router(num_experts=1, top_k=1, score="sigmoid")
"""The gate of the shared expert is a sigmoid router with one expert."""


def moe_dtensor(x_TH: DTensor, weights: MoEWeights, spec: MoESpec, *, residual_TH: DTensor | None = None,
                output_placements: Sequence[Placement] | None = None) -> DTensor:
    """The whole layer, (T, H) in x's dtype: route, experts, residual once; placed as x unless said otherwise.

    All tensors are DTensors on one mesh. Along each mesh dimension the parameters are placed by one Role, and x_TH is
    Replicate or Shard(0): its own tokens are routed, and gathered where parameters are cut. Partial sums are reduced
    once, to output_placements. Gradients are placed as what they belong to. Raises UsageValueError / UsageTypeError
    before any kernel starts.
    """
    check_tokens(x_TH, spec, FLOATING, "moe_fast")
    check_is("weights", weights, MoEWeights, "MoEWeights of DTensors")
    raise_faults("moe_fast.distributed", [f"{reason} is not implemented on DTensors"
                                          for reason in SUPPORTED.refused_mathematics(spec)])
    check_weights(weights, spec, None, 0)
    held, roles = _placed(x_TH, weights)
    if residual_TH is not None:
        check_residual(residual_TH, x_TH)
        _dtensors({"residual_TH": residual_TH}, x_TH.device_mesh)
    merged_TH = _experts(_pinned(x_TH), held, spec, roles, operands_of(weights))
    y_TH = merged_TH.redistribute(placements=output_placements or x_TH.placements)
    if residual_TH is None:
        return y_TH
    return y_TH + residual_TH.redistribute(placements=y_TH.placements)  # type: ignore[return-value]


def _experts(x_TH: DTensor, held: Mapping[str, DTensor], spec: MoESpec, roles: Sequence[Role],
             operands: str) -> DTensor:
    """The merged rows, as partial sums along the mesh dimensions that cut parameters."""
    ids_TK, weights_TK = _route(x_TH, held, spec)
    gate_T1 = _choose(x_TH, held["shared_gate_SH"], None, SHARED_GATE)[1] if "shared_gate_SH" in held else None
    entry = [Replicate() if role.adds_up else placement
             for role, placement in zip(roles, x_TH.placements, strict=True)]
    # Without a source rank every rank cuts its own copy, and nothing travels.
    hosted_E = distribute_tensor(torch.arange(spec.num_experts, device=x_TH.device), x_TH.device_mesh,
                                 [of_tensor("hosted_E", role) for role in roles], src_data_rank=None)
    biases = [in_parts(held[name], [of_argument(name, role) for role in roles]) if name in held else None
              for name in BIASES]
    return experts(x_TH.redistribute(placements=entry), ids_TK.redistribute(placements=entry),
                   weights_TK.redistribute(placements=entry), hosted_E, held["w13_EGIH"], held["w2_EHI"],
                   held.get("shared_w13_GIH"), held.get("shared_w2_HI"),
                   None if gate_T1 is None else gate_T1.redistribute(placements=entry), routed_form(spec),
                   form_of(spec.experts if spec.shared is None else spec.shared.mlp), *biases,
                   spec.shared is not None and spec.shared.merge == "mean", operands)


def _route(x_TH: DTensor, held: Mapping[str, DTensor], spec: MoESpec) -> tuple[DTensor, DTensor]:
    if spec.router is not None:
        return _choose(x_TH, held["router_EH"], held.get("selection_bias_E"), spec.router)
    ids_TK = torch.zeros_like(x_TH[:, :1], dtype=torch.int32)
    return ids_TK, torch.ones_like(ids_TK, dtype=torch.float32)  # type: ignore[return-value]


def _choose(x_TH: DTensor, router_EH: DTensor, selection_bias_E: DTensor | None,
            router: Router) -> tuple[DTensor, DTensor]:
    chosen = select_by(router, router_logits(x_TH, router_EH, None), None, selection_bias_E, None)
    return chosen[:2]  # type: ignore[return-value]


def _placed(x_TH: torch.Tensor, weights: MoEWeights) -> tuple[dict[str, DTensor], list[Role]]:
    """The parameters by name, with gradients placed as they are, and the role of each mesh dimension.

    Raises unless everything is on x's mesh and every parameter is placed by these roles.
    """
    if not isinstance(x_TH, DTensor):
        raise UsageTypeError(f"x_TH: {type(x_TH).__name__}, but should be a DTensor; moe_fast.moe takes local tensors")
    tensors = _dtensors(dict(weights.named_tensors()), x_TH.device_mesh)
    roles = [_role(placement) for placement in tensors["w13_EGIH"].placements]
    faults = [f"{name}: {tensor.placements}, but should be {wanted} beside w13_EGIH: {tensors['w13_EGIH'].placements}"
              for name, tensor in tensors.items()
              if tensor.placements != (wanted := tuple(of_tensor(name, role) for role in roles))]
    if any(one not in (Replicate(), of_tensor("x_TH", Role.TOKENS)) for one in x_TH.placements):
        faults.append(f"x_TH: {x_TH.placements}, but should be Replicate() or Shard(0) along each mesh dimension")
    raise_faults("placements", faults)
    return {name: _pinned(tensor) for name, tensor in tensors.items()}, roles


def _pinned(tensor: DTensor) -> DTensor:
    """The tensor itself, to the placements that it has: nothing happens forward, its gradient is brought to them."""
    return tensor.redistribute(placements=tensor.placements)


def _dtensors(tensors: Mapping[str, torch.Tensor], mesh: DeviceMesh) -> dict[str, DTensor]:
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            raise UsageTypeError(f"{name}: {type(tensor).__name__}, but should be a DTensor as x_TH is")
        if tensor.device_mesh != mesh:
            raise_faults(name, [f"on {tensor.device_mesh}, but should be on {mesh} as x_TH"])
        found[name] = tensor
    return found


def _role(placement: Placement) -> Role:
    """What a mesh dimension does that places w13_EGIH so; replicated also where nothing fits, which is then refused."""
    cuts = {of_tensor("w13_EGIH", role): role for role in (Role.COLUMNS, Role.EXPERTS)}
    return cuts.get(placement, Role.REPLICATED)
