"""Parameters of a layer whose experts are encoded: what one rank holds."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.encoded import Encoded, check_encoded
from moe_ref.contract.errors import UsageTypeError, UsageValueError, raise_faults
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.placements import part_range, placements, rank_part
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Scheme
from moe_ref.contract.weights import WeightSource, check_weights, parameter_shapes

MATRICES = {"w13": "w13_EGIH", "w2": "w2_EHI", "shared_w13": "shared_w13_GIH", "shared_w2": "shared_w2_HI"}
"""Encoded fields -> the names of the parameters that they stand for."""


@dataclass(frozen=True, kw_only=True)
class QuantisedWeights:
    """The tensors of one rank, its experts' matrices and those of a shared expert encoded under one scheme.

    w13: L = (E, G), N = I, K = H; w2: L = (E,), N = H, K = I; the shared ones without E. The other fields are those of
    MoEWeights. Input scales, fp32, (E,): of the rows that w13 and w2 of each expert take, where the scheme fixes them;
    those of the shared expert have no axis.
    """

    scheme: Scheme
    w13: Encoded
    w2: Encoded
    w13_input_scale_E: torch.Tensor | None = None
    w2_input_scale_E: torch.Tensor | None = None
    shared_w13: Encoded | None = None
    shared_w2: Encoded | None = None
    shared_w13_input_scale: torch.Tensor | None = None
    shared_w2_input_scale: torch.Tensor | None = None
    w13_bias_EGI: torch.Tensor | None = None
    w2_bias_EH: torch.Tensor | None = None
    router_EH: torch.Tensor | None = None
    router_bias_E: torch.Tensor | None = None
    selection_bias_E: torch.Tensor | None = None
    weight_scale_E: torch.Tensor | None = None
    shared_w13_bias_GI: torch.Tensor | None = None
    shared_w2_bias_H: torch.Tensor | None = None
    shared_gate_SH: torch.Tensor | None = None
    output_bias_H: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        """How many experts these are."""
        return len(self.w13.codes)

    @property
    def device(self) -> torch.device:
        """Where the codes are; checks see to it that the rest is there too."""
        return self.w13.codes.device

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors that are present, those of encoded matrices as "w13.codes"."""
        named: list[tuple[str, torch.Tensor]] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Encoded):
                named += [(f"{field.name}.{part}", one) for part, one in value.tensors.items()]
            elif isinstance(value, torch.Tensor):
                named.append((field.name, value))
        return named

    def to(self, device: torch.device | str) -> "QuantisedWeights":
        """The same on a device."""
        return self._mapped(lambda one: one.to(device))

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "QuantisedWeights":
        changed: dict[str, Encoded | torch.Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Encoded):
                changed[field.name] = value.mapped(change)
            elif isinstance(value, torch.Tensor):
                changed[field.name] = change(value)
        return replace(self, **changed)

    def shard(self, parallel: Parallel, rank: int) -> "QuantisedWeights":
        """Copies of this rank's part of an unsharded set: scales, zero points and groups go with their columns.

        A cut inside a block is allowed: the rank holds the block's scale and how far inside it begins.
        """
        parallel.check_rank(rank)
        part: dict[str, object] = {}
        hosted = parallel.hosted(self.num_experts)[parallel.coordinates(rank)[0]]
        for name, parameter in MATRICES.items():
            if (whole := getattr(self, name)) is not None:
                experts = whole if name.startswith("shared") or parallel.ep == 1 else whole.experts(list(hosted))
                part[name] = cut_matrix(parameter, experts, parallel, rank)
        for name in ("w13_input_scale_E", "w2_input_scale_E"):
            if (scale_E := getattr(self, name)) is not None:
                part[name] = scale_E[list(hosted)].clone()
        for name in ("shared_w13_input_scale", "shared_w2_input_scale"):
            if (scale := getattr(self, name)) is not None:
                part[name] = scale.clone()
        for name in placements(parallel):
            if (tensor := getattr(self, name, None)) is not None:
                part[name] = rank_part(name, tensor, parallel, rank).clone(memory_format=torch.contiguous_format)
        return replace(self, **part)  # pyrefly: ignore


def cut_matrix(parameter: str, matrix: Encoded, parallel: Parallel, rank: int) -> Encoded:
    """This rank's rows (colwise) or columns (rowwise) of an encoded parameter; all of it where it is not cut."""
    kind = placements(parallel)[parameter].kind
    if kind == "replicated":
        return matrix.copied()
    if kind == "colwise":
        return matrix.rows(part_range(parameter, matrix.shape[-2], parallel, rank))
    return matrix.columns(part_range(parameter, matrix.shape[-1], parallel, rank))


def part_starts(case: Case, parameter: str, rank: int) -> tuple[int, int]:
    """How far inside their first blocks the rows and columns of a rank's part begin."""
    encoding, placement = ENCODINGS[case.problem.scheme], placements(case.parallel)[parameter]
    whole = parameter_shapes(case.problem.spec)[parameter]
    if placement.shard_dim is None:
        return 0, 0
    start = part_range(parameter, whole[placement.shard_dim], case.parallel, rank)[0]
    if placement.kind == "colwise":
        return (start % encoding.rows if encoding.rows else 0), 0
    return 0, start % encoding.columns if encoding.columns and not encoding.order else 0


def check_held(weights: WeightSource | QuantisedWeights, spec: MoESpec, parallel: Parallel, rank: int) -> None:
    """check_weights or check_quantised, whichever it is."""
    if isinstance(weights, QuantisedWeights):
        check_quantised(weights, spec, parallel, rank)
    else:
        check_weights(weights, spec, parallel, rank)


def check_quantised(weights: QuantisedWeights, spec: MoESpec, parallel: Parallel, rank: int) -> None:
    """Raise with both numbers unless every tensor has the shape of this rank's shard under the scheme."""
    parallel.check_rank(rank)
    _check_kinds(weights)
    shapes, held = parameter_shapes(spec, parallel, rank), dict(weights.named_tensors())
    faults = [f"{name} is missing, but the spec has {parameter}" for name, parameter in MATRICES.items()
              if parameter in shapes and getattr(weights, name) is None]
    faults += [f"{name} is given, but the spec has no {parameter}" for name, parameter in MATRICES.items()
               if parameter not in shapes and getattr(weights, name) is not None]
    plain = {name: shape for name, shape in shapes.items() if name not in MATRICES.values()}
    plain |= _input_scales(weights, spec, len(parallel.hosted(spec.num_experts)[parallel.coordinates(rank)[0]]))
    faults += [f"{name} is missing, but should be {shape}" for name, shape in plain.items() if name not in held]
    given = {name: tensor for name, tensor in held.items() if "." not in name}
    faults += [f"{name} is given, but there is no such parameter" for name in given if name not in plain]
    faults += [f"{name}: shape {tuple(tensor.shape)}, but should be {plain[name]}" for name, tensor in given.items()
               if name in plain and tuple(tensor.shape) != plain[name]]
    raise_faults(f"weights of rank {rank}", faults)
    for name, parameter in MATRICES.items():
        if (matrix := getattr(weights, name)) is not None:
            check_encoded(name, matrix, weights.scheme, shapes[parameter])
    for name, tensor in held.items():
        allowed = (torch.float32,) if "input_scale" in name else PLAIN_DTYPES
        if name in given and tensor.dtype not in allowed:
            raise UsageTypeError(f"{name}: dtype {tensor.dtype}, but should be {' or '.join(map(str, allowed))}")
        if tensor.device != weights.device:
            raise UsageTypeError(f"{name}: device {tensor.device}, but should be {weights.device} as w13.codes")


def _check_kinds(weights: QuantisedWeights) -> None:
    """Raise unless the scheme is one that encodes, and every matrix that is there is Encoded."""
    if weights.scheme not in ENCODINGS:
        raise UsageValueError(f"weights: scheme {weights.scheme!r}, but should be one of {', '.join(ENCODINGS)}")
    for name in MATRICES:
        matrix = getattr(weights, name)
        if not isinstance(matrix, Encoded | None) or (matrix is None and not name.startswith("shared")):
            raise UsageTypeError(f"{name}: {type(matrix).__name__}, but should be Encoded")


def _input_scales(weights: QuantisedWeights, spec: MoESpec, num_experts: int) -> dict[str, tuple[int, ...]]:
    if not ENCODINGS[weights.scheme].input_scale:
        return {}
    shapes: dict[str, tuple[int, ...]] = {"w13_input_scale_E": (num_experts,), "w2_input_scale_E": (num_experts,)}
    return shapes | ({"shared_w13_input_scale": (), "shared_w2_input_scale": ()} if spec.shared else {})
