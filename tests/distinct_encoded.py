"""Encoded weights of any scheme that nobody quantised: codes drawn over their whole range, and scales of which no two
neighbours are equal, so that one read from another place shows."""

from dataclasses import fields

import torch

from moe_ref.contract.encoded import Encoded, packed
from moe_ref.contract.quantised import MATRICES, QuantisedWeights
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Scheme
from moe_ref.contract.weights import MoEWeights, parameter_shapes
from moe_ref.oracle.decode import decode


def make_encoded(scheme: Scheme, shape: tuple[int, ...], generator: torch.Generator) -> Encoded:
    """Matrices (L, N, K)."""
    encoding, (*leading, num_rows, num_columns) = ENCODINGS[scheme], shape
    blocks = encoding.blocks(num_rows, num_columns)
    zeros = groups = second = None
    if encoding.zeros:
        zeros = torch.randint(1, 16, (*leading, num_rows, blocks[1]), generator=generator, dtype=torch.uint8)
    if encoding.order:
        assert encoding.columns is not None
        runs = (torch.arange(num_columns, dtype=torch.int32) // encoding.columns).expand(*leading, -1)
        groups = runs.gather(-1, torch.rand(runs.shape, generator=generator).argsort(-1))
    if encoding.second:
        # Reciprocals of fp32 numbers, as checkpoints store them.
        second = 1 / (64 + 1000 * torch.rand(leading, generator=generator))
    return Encoded(scheme=scheme, codes=_codes(encoding.codes, shape, generator), num_columns=num_columns,
                   scales=make_scales(encoding.scales, (*leading, *blocks), generator), zeros=zeros, groups=groups,
                   second_scale=second)


def _codes(codes: Codes, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if codes.per_byte == 2:
        return packed(torch.randint(0, 16, shape, generator=generator))
    numbers = torch.randint(-127, 128, shape, generator=generator)
    return numbers.to(torch.int8) if codes is Codes.INT8 else numbers.float().to(torch.float8_e4m3fn)


def make_scales(kind: Scales, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """About 1 / 256; no two neighbours along any axis are equal, and no period is the step of a tile.

    Scales are even and odd multiples as the squares of a board are black and white, drawn among four of each: of a
    pattern that is counted along the axes and taken modulo 7, a tile of 128 rows is the one four blocks on.
    """
    white = torch.zeros((), dtype=torch.int64)
    for behind, size in enumerate(shape[::-1]):
        white = white + torch.arange(size).reshape(-1, *[1] * behind)
    place = white.expand(shape) % 2 + 2 * torch.randint(0, 4, shape, generator=generator)
    if kind is Scales.E8M0:
        return (place + 116).to(torch.uint8)
    drawn = (8 + place + torch.rand(shape, generator=generator) / 2) / 2048
    return {Scales.FP32: drawn, Scales.HALF: drawn.half(), Scales.E4M3: (drawn * 256).to(torch.float8_e4m3fn)}[kind]


def make_weights(scheme: Scheme, spec: MoESpec, seed: int = 5) -> QuantisedWeights:
    """A whole layer; what is not encoded is in bf16, input scales differ between all experts and products."""
    generator, shapes = torch.Generator().manual_seed(seed), parameter_shapes(spec)
    made: dict[str, object] = {}
    for name, parameter in MATRICES.items():
        if parameter in shapes:
            made[name] = make_encoded(scheme, shapes[parameter], generator)
    made |= {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
             if name not in MATRICES.values()}
    if ENCODINGS[scheme].input_scale:
        for start, shape in (("", (spec.num_experts,)), ("shared_", ())):
            made |= {f"{start}{name}_input_scale{'' if start else '_E'}": torch.rand(shape, generator=generator) + 0.1
                     for name in ("w13", "w2") if not start or spec.shared}
    return QuantisedWeights(scheme=scheme, **made)  # type: ignore[arg-type]


def decoded_weights(weights: QuantisedWeights) -> MoEWeights:
    """All of them in fp64."""
    plain = {name: getattr(weights, name).double() for name in (field.name for field in fields(MoEWeights))
             if getattr(weights, name, None) is not None}
    return MoEWeights(**plain, **{parameter: decode(getattr(weights, name)) for name, parameter in MATRICES.items()
                                  if getattr(weights, name) is not None})


def assert_same_weights(one: QuantisedWeights, two: QuantisedWeights) -> None:
    """Equal names, dtypes, bits and offsets inside blocks."""
    held, wanted = dict(one.named_tensors()), dict(two.named_tensors())
    assert held.keys() == wanted.keys()
    for name, tensor in held.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(_bytes(tensor), _bytes(wanted[name])), name
    for name in MATRICES:
        if (matrix := getattr(one, name)) is not None:
            other = getattr(two, name)
            assert (matrix.num_columns, matrix.row_start, matrix.column_start) == (
                other.num_columns, other.row_start, other.column_start), name


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
