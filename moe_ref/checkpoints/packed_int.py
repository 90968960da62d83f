"""pack-quantized of compressed-tensors: integers of 4 or 8 bits in 32-bit words, moved up so that none is negative."""

from collections.abc import Callable
from functools import partial

import torch

from moe_ref.checkpoints.config_values import Config, check_values
from moe_ref.checkpoints.quantised_format import WIDENED, Axis, Part, QuantisedFormat, Tensors
from moe_ref.checkpoints.words import pack_words, unpack_words
from moe_ref.contract.encoded import Encoded, packed, unpacked
from moe_ref.contract.errors import UsageValueError, raise_faults
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme

CODES, SCALES, ZEROS, GROUPS = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
UP = 128
"""What 8-bit numbers are moved up by; those of 4 bits are read as they are stored, from 0 to 15 around 8."""


def packed_int_format(where: str, name: str, weights: Config, skips: Callable[[str], bool]) -> QuantisedFormat:
    """The format of weights with these quantisation arguments; raises UsageValueError for those without a scheme."""
    where = f"{where}: weights"
    check_values(where, weights, type=("int",), num_bits=(4, 8), dynamic=(False, None))
    scheme = _int4_scheme(where, weights) if weights["num_bits"] == 4 else _int8_scheme(where, weights)
    encoding = ENCODINGS[scheme]
    if scheme is Scheme.INT8:
        encode, store, scale_dtypes, groups = _encode_int8, _store_int8, WIDENED, Axis("whole")
    else:
        assert encoding.columns is not None
        encode, store, scale_dtypes = partial(_encode_int4, scheme), _store_int4, ("F16", "BF16")
        groups = Axis("groups" if encoding.order else "columns", encoding.columns)
    parts = {CODES: Part((Axis("rows"), Axis("columns", 4 if scheme is Scheme.INT8 else 8)), ("I32",)),
             SCALES: Part((Axis("rows"), groups), scale_dtypes)}
    parts |= {ZEROS: Part((Axis("rows", 8), groups), ("I32",))} if encoding.zeros else {}
    parts |= {GROUPS: Part((Axis("columns"),), ("I32",))} if encoding.order else {}
    return QuantisedFormat(name=name, scheme=scheme, parts=parts, encode=encode, store=store, skips=skips,
                           shape="weight_shape")


def _int8_scheme(where: str, weights: Config) -> Scheme:
    check_values(where, weights, strategy=("channel",), symmetric=(True,))
    return Scheme.INT8


def _int4_scheme(where: str, weights: Config) -> Scheme:
    check_values(where, weights, strategy=("group",), group_size=(128, 32), symmetric=(True, False),
                 actorder=("group", "weight", "static", None))
    usual, zeros = weights["group_size"] == 128, weights["symmetric"] is False
    # "weight" and "static" choose the groups by importance before they are filled, in runs of columns after all.
    if weights.get("actorder") == "group":
        if zeros:
            raise_faults(where, ["symmetric=False and actorder='group', but act-order is known with symmetric=True "
                                 "alone"])
        return Scheme.GPTQ_ORDER if usual else Scheme.GPTQ_ORDER_32
    if zeros:
        return Scheme.AWQ if usual else Scheme.AWQ_32
    return Scheme.GPTQ if usual else Scheme.GPTQ_32


def _encode_int8(tensors: Tensors, num_columns: int) -> Encoded:
    numbers = unpack_words(tensors[CODES], -1, bits=8)[..., :num_columns]
    return Encoded(scheme=Scheme.INT8, codes=(numbers ^ UP).view(torch.int8), scales=tensors[SCALES].float(),
                   num_columns=num_columns)


def _store_int8(encoded: Encoded) -> dict[str, torch.Tensor]:
    return {CODES: pack_words(encoded.codes.view(torch.uint8) ^ UP, -1, bits=8), SCALES: encoded.scales}


def _encode_int4(scheme: Scheme, tensors: Tensors, num_columns: int) -> Encoded:
    scales, zeros, groups = tensors[SCALES], tensors.get(ZEROS), tensors.get(GROUPS)
    if groups is not None and groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < scales.shape[-1]:
        raise UsageValueError(f"{GROUPS}: groups {int(groups.min())} to {int(groups.max())}, but should be in "
                              f"[0, {scales.shape[-1]})")
    return Encoded(scheme=scheme, codes=packed(unpack_words(tensors[CODES], -1)[..., :num_columns]), scales=scales,
                   zeros=None if zeros is None else unpack_words(zeros, -2)[..., :scales.shape[-2], :],
                   groups=groups, num_columns=num_columns)


def _store_int4(encoded: Encoded) -> dict[str, torch.Tensor]:
    stored = {CODES: pack_words(unpacked(encoded.codes, encoded.num_columns), -1), SCALES: encoded.scales}
    stored |= {ZEROS: pack_words(encoded.zeros, -2)} if encoded.zeros is not None else {}
    return stored | ({GROUPS: encoded.groups} if encoded.groups is not None else {})
