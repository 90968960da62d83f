"""The parameters of a rank on meta tensors, plain or encoded."""

from dataclasses import fields

import torch

from moe_fast.held import Held
from moe_ref.contract.case import Case
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.encoded import CODE_DTYPES, SCALE_DTYPES, Encoded
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import MATRICES, QuantisedWeights
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Scheme
from moe_ref.contract.weights import MoEWeights, parameter_shapes

META = torch.device("meta")


def parameters(case: Case) -> Held:
    """What rank 0 of `case` holds; plain ones require gradients."""
    problem, dtype = case.problem, TORCH_DTYPES[case.problem.dtype]
    if problem.scheme is not Scheme.PLAIN:
        return _encoded(problem.spec, problem.scheme, dtype).shard(case.parallel, 0)
    return MoEWeights(**{name: torch.empty(shape, dtype=dtype, device=META, requires_grad=True)
                         for name, shape in parameter_shapes(problem.spec, case.parallel, 0).items()})


def _encoded(spec: MoESpec, scheme: Scheme, dtype: torch.dtype) -> QuantisedWeights:
    """Of all ranks; scales in 16 bits are those of the tokens' dtype, where that has 16."""
    shapes, names = parameter_shapes(spec, Parallel()), {parameter: name for name, parameter in MATRICES.items()}
    held: dict[str, object] = {names[name]: _matrix(scheme, shape, dtype) for name, shape in shapes.items()
                               if name in names}
    held |= {name: torch.empty(shape, dtype=dtype, device=META) for name, shape in shapes.items() if name not in names}
    if ENCODINGS[scheme].input_scale:
        held |= {field.name: torch.empty((spec.num_experts,) if field.name.endswith("_E") else (), device=META)
                 for field in fields(QuantisedWeights)
                 if "input_scale" in field.name and (spec.shared is not None or not field.name.startswith("shared"))}
    return QuantisedWeights(scheme=scheme, **held)  # pyrefly: ignore


def _matrix(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype) -> Encoded:
    encoding, (*leading, num_rows, num_columns) = ENCODINGS[scheme], shape
    blocks, allowed = encoding.blocks(num_rows, num_columns), SCALE_DTYPES[encoding.scales]

    def meta(kind: torch.dtype, *size: int) -> torch.Tensor:
        return torch.empty((*leading, *size), dtype=kind, device=META)

    return Encoded(
        scheme=scheme, num_columns=num_columns,
        codes=meta(CODE_DTYPES[encoding.codes], num_rows, -(-num_columns // encoding.codes.per_byte)),
        scales=meta(dtype if dtype in allowed else allowed[-1], *blocks),
        zeros=meta(torch.uint8, num_rows, blocks[1]) if encoding.zeros else None,
        groups=meta(torch.int32, num_columns) if encoding.order else None,
        second_scale=meta(torch.float32) if encoding.second else None)
