"""nvfp4-pack-quantized and mxfp4-pack-quantized of compressed-tensors: two e2m1 codes to a byte, the even one low."""

from collections.abc import Callable
from functools import partial

import torch

from moe_ref.checkpoints.config_values import Config, check_values
from moe_ref.checkpoints.quantised_format import Axis, Part, QuantisedFormat, Tensors
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Scheme

CODES, SCALES, SECOND = "weight_packed", "weight_scale", "weight_global_scale"


def packed_float_format(where: str, name: str, weights: Config, skips: Callable[[str], bool]) -> QuantisedFormat:
    """The format of weights with these quantisation arguments.

    `input_global_scale` of nvfp4 may be there and is not read: the scheme rounds no rows.
    """
    nvfp4 = name.startswith("nvfp4")
    scheme, size = (Scheme.NVFP4, 16) if nvfp4 else (Scheme.MXFP4, 32)
    check_values(f"{where}: weights", weights, type=("float",), num_bits=(4,), group_size=(size,),
                 symmetric=(True, None))
    parts = {CODES: Part((Axis("rows"), Axis("columns", 2)), ("U8",)),
             SCALES: Part((Axis("rows"), Axis("columns", size)), ("F8_E4M3",) if nvfp4 else ("U8",))}
    parts |= {SECOND: Part((Axis("whole"),), ("F32",))} if nvfp4 else {}
    return QuantisedFormat(name=name, scheme=scheme, parts=parts, encode=partial(_encode, scheme), store=_store,
                           skips=skips, packed=(1, 2), unread=frozenset({"input_global_scale"}))


def _encode(scheme: Scheme, tensors: Tensors, num_columns: int) -> Encoded:
    second = None
    if scheme is Scheme.NVFP4:
        whole = tensors[SECOND]
        if not (whole > 0).all() or not whole.isfinite().all():
            raise UsageValueError(f"{SECOND}: {whole.flatten().tolist()}, but should be finite and above 0: it divides")
        second = (1 / whole).squeeze(-1)
    return Encoded(scheme=scheme, codes=tensors[CODES], scales=tensors[SCALES], second_scale=second,
                   num_columns=num_columns)


def _store(encoded: Encoded) -> dict[str, torch.Tensor]:
    stored = {CODES: encoded.codes, SCALES: encoded.scales}
    if encoded.second_scale is not None:
        stored[SECOND] = _reciprocal(encoded.second_scale)[..., None]
    return stored


def _reciprocal(second: torch.Tensor) -> torch.Tensor:
    """Numbers whose reciprocals in fp32 are `second`; between two of them there may be one that has none."""
    near = (1 / second).view(torch.int32)
    tried = torch.stack([(near + step).view(torch.float32) for step in (0, 1, -1)])
    fits = 1 / tried == second
    if not fits.any(0).all():
        raise UsageValueError(f"second scale {float(second[~fits.any(0)].flatten()[0])!r}: no fp32 number has this "
                              f"reciprocal, and {SECOND} is stored as one")
    return tried.gather(0, fits.int().argmax(0, keepdim=True))[0]
