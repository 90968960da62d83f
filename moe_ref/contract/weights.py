"""Parameters of a layer: what one rank holds, and how they are read expert by expert."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol

import torch

from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.errors import UsageTypeError, raise_faults
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.placements import part_shape, placements, rank_part
from moe_ref.contract.spec import MoESpec


class ExpertWeights(NamedTuple):
    """One expert's w13_GIH, G = (gate, up) or (one projection), w2_HI, and their biases where it has them."""

    w13_GIH: torch.Tensor
    w2_HI: torch.Tensor
    w13_bias_GI: torch.Tensor | None = None
    w2_bias_H: torch.Tensor | None = None


class WholeParameters(Protocol):
    """What belongs to no expert."""

    @property
    def router_EH(self) -> torch.Tensor | None: ...
    @property
    def router_bias_E(self) -> torch.Tensor | None: ...
    @property
    def selection_bias_E(self) -> torch.Tensor | None: ...
    @property
    def weight_scale_E(self) -> torch.Tensor | None: ...
    @property
    def shared_gate_SH(self) -> torch.Tensor | None: ...
    @property
    def output_bias_H(self) -> torch.Tensor | None: ...


class WeightSource(WholeParameters, Protocol):
    """Anything that yields experts one at a time: memory, a checkpoint slice, the input generator."""

    def expert(self, e: int) -> ExpertWeights: ...
    def shared_expert(self) -> ExpertWeights | None: ...


@dataclass(frozen=True, kw_only=True)
class MoEWeights:
    """The tensors of one rank, canonical layout (E, out, in); any strides.

    w13_EGIH (E, G, I, H), G = 2 (gate, up) or 1; w2_EHI (E, H, I); w13_bias_EGI; w2_bias_EH;
    router_EH (E + Z, H); router_bias_E and selection_bias_E (E + Z,); weight_scale_E (E,) or (1,);
    shared_w13_GIH (G, I_shared, H); shared_w2_HI (H, I_shared); shared_w13_bias_GI; shared_w2_bias_H;
    shared_gate_SH (S, H); output_bias_H (H,). With tensor parallelism I is the rank's own share, with expert
    parallelism E are the experts that it hosts. w2_bias_EH is the same on every tp rank, shared_w2_bias_H and
    output_bias_H on every rank; what is in a partial sum of them is added by one rank alone.
    """

    w13_EGIH: torch.Tensor
    w2_EHI: torch.Tensor
    w13_bias_EGI: torch.Tensor | None = None
    w2_bias_EH: torch.Tensor | None = None
    router_EH: torch.Tensor | None = None
    router_bias_E: torch.Tensor | None = None
    selection_bias_E: torch.Tensor | None = None
    weight_scale_E: torch.Tensor | None = None
    shared_w13_GIH: torch.Tensor | None = None
    shared_w2_HI: torch.Tensor | None = None
    shared_w13_bias_GI: torch.Tensor | None = None
    shared_w2_bias_H: torch.Tensor | None = None
    shared_gate_SH: torch.Tensor | None = None
    output_bias_H: torch.Tensor | None = None

    def expert(self, e: int) -> ExpertWeights:
        """Views of expert e."""
        return ExpertWeights(self.w13_EGIH[e], self.w2_EHI[e],
                             None if self.w13_bias_EGI is None else self.w13_bias_EGI[e],
                             None if self.w2_bias_EH is None else self.w2_bias_EH[e])

    def shared_expert(self) -> ExpertWeights | None:
        """Views of the shared expert, or None."""
        if self.shared_w13_GIH is None or self.shared_w2_HI is None:
            return None
        return ExpertWeights(self.shared_w13_GIH, self.shared_w2_HI, self.shared_w13_bias_GI, self.shared_w2_bias_H)

    def shard(self, parallel: Parallel, rank: int) -> "MoEWeights":
        """Contiguous copies of this rank's part of an unsharded set, by placement; replicated ones are shared."""
        parallel.check_rank(rank)
        kept = {name for name, placement in placements(parallel).items()
                if placement.shard_dim is None and placement.expert_dim is None}
        return replace(self, **{name: rank_part(name, tensor, parallel, rank).clone(
                                    memory_format=torch.contiguous_format)
                                for name, tensor in self.named_tensors() if name not in kept})

    @property
    def device(self) -> torch.device:
        """Where the experts are; checks see to it that the rest is there too."""
        return self.w2_EHI.device

    def to(self, device: torch.device | str) -> "MoEWeights":
        """The same on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.named_tensors()})

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The parameters that are present, by field name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, tensor) for name, tensor in pairs if tensor is not None]


EXPERT_PARAMETERS = ("w13_EGIH", "w2_EHI", "w13_bias_EGI", "w2_bias_EH")
SHARED_PARAMETERS = ("shared_w13_GIH", "shared_w2_HI", "shared_w13_bias_GI", "shared_w2_bias_H")
"""Names of MoEWeights' fields in the order of ExpertWeights."""

WHOLE_PARAMETERS = ("router_EH", "router_bias_E", "selection_bias_E", "weight_scale_E", "shared_gate_SH",
                    "output_bias_H")
"""Parameters that belong to no expert and are the same on every rank."""

KEPT_PRECISE = frozenset({"router_EH", "router_bias_E", "selection_bias_E", "weight_scale_E", "shared_gate_SH"})
"""Parameters that may be in fp32 beside weights of another dtype, as released checkpoints keep them."""


def parameter_shapes(spec: MoESpec, parallel: Parallel | None = None, rank: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of every parameter of `spec` as `rank` holds it; unsharded without `parallel`."""
    experts, hidden, router = spec.num_experts, spec.hidden_size, spec.router
    shapes: dict[str, tuple[int, ...]] = {
        f"{name[0]}_E{name[1]}": (experts, *shape)
        for name, shape in _mlp_shapes(spec.experts.num_projections, spec.intermediate_size, hidden,
                                       spec.experts.bias).items()}
    if router:
        shapes["router_EH"] = (router.num_choices, hidden)
        if router.logit_bias:
            shapes["router_bias_E"] = (router.num_choices,)
        if router.selection_bias:
            shapes["selection_bias_E"] = (router.num_choices,)
        if router.learned_scale:
            shapes["weight_scale_E"] = (experts if router.learned_scale == "expert" else 1,)
    if shared := spec.shared:
        shapes |= {f"shared_{name[0]}_{name[1]}": shape
                   for name, shape in _mlp_shapes(shared.mlp.num_projections, shared.intermediate_size, hidden,
                                                  shared.mlp.bias).items()}
        if shared.num_gates:
            shapes["shared_gate_SH"] = (shared.num_gates, hidden)
    if spec.output_bias:
        shapes["output_bias_H"] = (hidden,)
    if parallel is None:
        return shapes
    return {name: part_shape(name, shape, parallel, rank) for name, shape in shapes.items()}


def _mlp_shapes(projections: int, intermediate: int, hidden: int,
                bias: bool) -> dict[tuple[str, str], tuple[int, ...]]:
    shapes: dict[tuple[str, str], tuple[int, ...]] = {("w13", "GIH"): (projections, intermediate, hidden),
                                                      ("w2", "HI"): (hidden, intermediate)}
    if bias:
        shapes |= {("w13_bias", "GI"): (projections, intermediate), ("w2_bias", "H"): (hidden,)}
    return shapes


def check_weights(weights: WeightSource, spec: MoESpec, parallel: Parallel | None, rank: int) -> None:
    """Raise with both numbers unless every tensor has the shape of this rank's shard, its dtype and its device.

    A source that yields experts one at a time is checked for what it holds beside them, and for how many they are where
    it has num_experts; the experts are checked by check_expert and check_shared when they are read.
    """
    parallel = parallel or Parallel()
    parallel.check_rank(rank)
    hosted = parallel.hosted(spec.num_experts)[parallel.coordinates(rank)[0]]
    whose = f"weights of rank {rank}" + ("" if parallel.ep == 1 else f", which hosts {_listed(hosted)}")
    if not isinstance(weights, MoEWeights):
        if not callable(getattr(weights, "expert", None)):
            raise UsageTypeError(f"weights: {type(weights).__name__}, but should be MoEWeights, or a source as "
                                 "open_checkpoint and from_layout return it")
        # The router does not tell: E + Z rows may be those of fewer experts and more identity experts.
        held = getattr(weights, "num_experts", len(hosted))
        faults = [f"{held} experts, but should be {len(hosted)}"] if held != len(hosted) else []
        raise_faults(whose, faults + _whole_faults(weights, spec))
        return
    # Raised alone and without the rank, so that all ranks say the same.
    raise_faults("weights", _k_faults(("w13_EGIH", "w2_EHI"), (weights.w13_EGIH, weights.w2_EHI), spec, parallel)
                 + _k_faults(("shared_w13_GIH", "shared_w2_HI"), (weights.shared_w13_GIH, weights.shared_w2_HI), spec,
                             parallel))
    shapes, tensors = parameter_shapes(spec, parallel, rank), dict(weights.named_tensors())
    raise_faults(whose, _shape_faults(tensors, shapes))
    _check_kinds(tensors)


def _listed(experts: tuple[int, ...]) -> str:
    """As "4 experts (0, 2, 4, 6)"; of many the first eight."""
    more = ", ..." if len(experts) > 8 else ""
    return f"{len(experts)} experts ({', '.join(map(str, experts[:8]))}{more})" if experts else "no expert"


def check_whole_parameters(weights: WholeParameters, spec: MoESpec) -> None:
    """Raise unless the parameters that belong to no expert are those of the spec, in their shapes."""
    raise_faults("weights", _whole_faults(weights, spec))


def _whole_faults(weights: WholeParameters, spec: MoESpec) -> list[str]:
    # No walrus: torch.compile cannot trace one inside a comprehension (torch 2.13).
    held = {name: getattr(weights, name) for name in WHOLE_PARAMETERS if getattr(weights, name, None) is not None}
    shapes = {name: shape for name, shape in parameter_shapes(spec).items() if name in WHOLE_PARAMETERS}
    return _shape_faults(held, shapes)


def _k_faults(names: tuple[str, str], tensors: tuple[torch.Tensor | None, torch.Tensor | None], spec: MoESpec,
              parallel: Parallel) -> list[str]:
    """The commonest mistake in its own words: w2 takes other columns than the activation has.

    names, tensors: w13 and w2 of the experts, of one of them or of the shared one. A w2 that is cut by output takes the
    columns of all ranks.
    """
    (w13, w2), shared = tensors, names[1].startswith("shared_")
    if w13 is None or w2 is None or [w13.dim(), w2.dim()] != [len(name.rpartition("_")[2]) for name in names]:
        return []
    by_output = placements(parallel)["shared_w2_HI" if shared else "w2_EHI"].kind == "colwise"
    if not by_output and w13.shape[-2] != w2.shape[-1]:
        return [f"K mismatch: {names[0]} makes an activation shard of {w13.shape[-2]} columns, but the {names[1]} "
                f"shard takes {w2.shape[-1]}"]
    mlp = spec.shared if shared else spec
    whole = mlp.intermediate_size if mlp else w2.shape[-1]
    if by_output and w2.shape[-1] != whole:
        return [f"K mismatch: the activation gathered from all ranks has {whole} columns, but the {names[1]} shard "
                f"takes {w2.shape[-1]}"]
    return []


def _shape_faults(held: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    faults = [f"{name} is missing, but the spec needs {shape}" for name, shape in shapes.items() if name not in held]
    faults += [f"{name} is given, but the spec has no such parameter" for name in held if name not in shapes]
    return faults + [f"{name}: shape {tuple(tensor.shape)}, but should be {shapes[name]}"
                     for name, tensor in held.items() if name in shapes and tuple(tensor.shape) != shapes[name]]


def _check_kinds(held: dict[str, torch.Tensor]) -> None:
    reference = held["w13_EGIH"]
    for name, tensor in held.items():
        if tensor.dtype not in PLAIN_DTYPES:
            raise UsageTypeError(f"{name}: dtype {tensor.dtype}, but should be one of "
                                 f"{', '.join(str(dtype) for dtype in PLAIN_DTYPES)}")
        allowed = {reference.dtype, torch.float32} if name in KEPT_PRECISE else {reference.dtype}
        if tensor.dtype not in allowed:
            also = " or torch.float32" if len(allowed) > 1 else ""
            raise UsageTypeError(f"{name}: dtype {tensor.dtype}, but should be {reference.dtype}{also} as w13_EGIH")
        if tensor.device != reference.device:
            raise UsageTypeError(f"{name}: device {tensor.device}, but should be {reference.device} as w13_EGIH")


def check_expert(expert: ExpertWeights, spec: MoESpec, parallel: Parallel, rank: int, e: int) -> ExpertWeights:
    """The expert itself, after comparing shapes and kinds with those of this rank's shard.

    e: which of the rank's experts it is; a message names its number in the layer.
    """
    shapes = parameter_shapes(spec, parallel, rank)
    number = parallel.hosted(spec.num_experts)[parallel.coordinates(rank)[0]][e]
    wanted = {name.replace("_E", "_", 1): shapes[name][1:] if name in shapes else None for name in EXPERT_PARAMETERS}
    return _check_one(expert, wanted, spec, parallel, f"expert {number} of rank {rank}")


def check_shared(expert: ExpertWeights | None, spec: MoESpec, parallel: Parallel, rank: int) -> ExpertWeights | None:
    """The shared expert itself, after the same comparison; it must be there exactly where the spec has one."""
    if (expert is None) != (spec.shared is None):
        raise_faults(f"shared expert of rank {rank}", [
            "missing, but the spec has one" if expert is None else "given, but the spec has none"])
    if expert is None:
        return None
    shapes = parameter_shapes(spec, parallel, rank)
    return _check_one(expert, {name: shapes.get(name) for name in SHARED_PARAMETERS}, spec, parallel,
                      f"shared expert of rank {rank}")


def _check_one(expert: ExpertWeights, wanted: dict[str, tuple[int, ...] | None], spec: MoESpec, parallel: Parallel,
               whose: str) -> ExpertWeights:
    if not isinstance(expert, ExpertWeights):
        raise UsageTypeError(f"{whose}: {type(expert).__name__}, but should be ExpertWeights")
    names = list(wanted)
    found = [None if tensor is None else tuple(tensor.shape) for tensor in expert]
    faults = _k_faults((names[0], names[1]), expert[:2], spec, parallel)
    raise_faults(whose, faults + [f"{name}: shape {got}, but should be {want}"
                                  for (name, want), got in zip(wanted.items(), found, strict=True) if got != want])
    for name, tensor in zip(names, expert, strict=True):
        if tensor is not None and (tensor.dtype not in PLAIN_DTYPES or tensor.dtype != expert.w13_GIH.dtype):
            raise UsageTypeError(f"{whose}: {name}: dtype {tensor.dtype}, but should be one of "
                                 f"{', '.join(str(dtype) for dtype in PLAIN_DTYPES)}, the same for all of it")
    return expert
