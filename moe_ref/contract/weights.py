"""Parameters of a layer: what one rank holds, and how they are read expert by expert."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol

import torch

from moe_ref.contract.errors import UsageTypeError, raise_faults
from moe_ref.contract.parallel import PLACEMENTS, Parallel
from moe_ref.contract.spec import MoESpec


class ExpertWeights(NamedTuple):
    """One expert's w13_GIH, G = (gate, up), and w2_HI."""

    w13_GIH: torch.Tensor
    w2_HI: torch.Tensor


class WeightSource(Protocol):
    """Anything that yields experts one at a time: memory, a checkpoint slice, the input generator."""

    @property
    def router_EH(self) -> torch.Tensor | None: ...
    @property
    def selection_bias_E(self) -> torch.Tensor | None: ...
    @property
    def shared_gate_SH(self) -> torch.Tensor | None: ...
    def expert(self, e: int) -> ExpertWeights: ...
    def shared_expert(self) -> ExpertWeights | None: ...


@dataclass(frozen=True, kw_only=True)
class MoEWeights:
    """The tensors of one rank, canonical layout (E, out, in).

    w13_EGIH (E, 2, I, H); w2_EHI (E, H, I); router_EH (E, H); selection_bias_E (E,) fp32;
    shared_w13_GIH (2, I_shared, H); shared_w2_HI (H, I_shared); shared_gate_SH (1, H).
    With tensor parallelism I is the rank's own share.
    """

    w13_EGIH: torch.Tensor
    w2_EHI: torch.Tensor
    router_EH: torch.Tensor | None = None
    selection_bias_E: torch.Tensor | None = None
    shared_w13_GIH: torch.Tensor | None = None
    shared_w2_HI: torch.Tensor | None = None
    shared_gate_SH: torch.Tensor | None = None

    def expert(self, e: int) -> ExpertWeights:
        """Views of expert e."""
        return ExpertWeights(self.w13_EGIH[e], self.w2_EHI[e])

    def shared_expert(self) -> ExpertWeights | None:
        """Views of the shared expert, or None."""
        if self.shared_w13_GIH is None or self.shared_w2_HI is None:
            return None
        return ExpertWeights(self.shared_w13_GIH, self.shared_w2_HI)

    def shard(self, parallel: Parallel, rank: int) -> "MoEWeights":
        """Contiguous copies of this rank's part of an unsharded set, by placement; replicated ones are shared."""
        parts = {}
        for name, tensor in self.named_tensors():
            dim = PLACEMENTS[name].shard_dim
            if dim is not None:
                start, stop = parallel.ranges(tensor.shape[dim])[rank]
                parts[name] = tensor.narrow(dim, start, stop - start).contiguous()
        return replace(self, **parts)

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The parameters that are present, by field name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, tensor) for name, tensor in pairs if tensor is not None]


def parameter_shapes(spec: MoESpec, parallel: Parallel | None = None, rank: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of every parameter of `spec` as `rank` holds it; unsharded without `parallel`."""
    experts, hidden = spec.num_experts, spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "w13_EGIH": (experts, 2, spec.intermediate_size, hidden),
        "w2_EHI": (experts, hidden, spec.intermediate_size),
    }
    if spec.router:
        shapes["router_EH"] = (experts, hidden)
        if spec.router.selection_bias:
            shapes["selection_bias_E"] = (experts,)
    if spec.shared:
        shapes["shared_w13_GIH"] = (2, spec.shared.intermediate_size, hidden)
        shapes["shared_w2_HI"] = (hidden, spec.shared.intermediate_size)
        if spec.shared.gate == "sigmoid":
            shapes["shared_gate_SH"] = (1, hidden)
    if parallel is None:
        return shapes
    sharded = {}
    for name, shape in shapes.items():
        dim = PLACEMENTS[name].shard_dim
        if dim is not None:
            start, stop = parallel.ranges(shape[dim])[rank]
            shape = (*shape[:dim], stop - start, *shape[dim + 1:])
        sharded[name] = shape
    return sharded


def check_weights(weights: MoEWeights, spec: MoESpec, parallel: Parallel | None, rank: int) -> None:
    """Raise with both numbers unless every tensor has the shape of this rank's shard and one dtype and device."""
    held = dict(weights.named_tensors())
    if (inner := held["w13_EGIH"].shape[2]) != (outer := held["w2_EHI"].shape[2]):
        raise_faults("weights", [f"K mismatch: w13_EGIH makes an activation shard of {inner} columns, "
                                 f"but the w2_EHI shard takes {outer}"])
    shapes = parameter_shapes(spec, parallel or Parallel(), rank)
    faults = [f"{name} is missing, but the spec needs {shape}" for name, shape in shapes.items() if name not in held]
    faults += [f"{name} is given, but the spec has no such parameter" for name in held if name not in shapes]
    faults += [f"{name}: shape {tuple(tensor.shape)}, but should be {shapes[name]}"
               for name, tensor in held.items() if name in shapes and tuple(tensor.shape) != shapes[name]]
    raise_faults(f"weights of rank {rank}", faults)
    reference = held["w13_EGIH"]
    for name, tensor in held.items():
        if name != "selection_bias_E" and tensor.dtype != reference.dtype:
            raise UsageTypeError(f"{name}: dtype {tensor.dtype}, but should be {reference.dtype} as w13_EGIH")
        if tensor.device != reference.device:
            raise UsageTypeError(f"{name}: device {tensor.device}, but should be {reference.device} as w13_EGIH")
