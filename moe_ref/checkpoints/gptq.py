"""GPTQ as AutoGPTQ and GPTQModel store it: 4 bits, groups of 128 or 32 columns, with or without act-order.

qweight int32 (K / 8, N), eight rows of the transposed matrix to a word, the first in the lowest bits; qzeros int32
(groups, N / 8); scales (groups, N); g_idx int32 (K,), the group of every column.

    value[n, k] = scales[g_idx[k], n] * (code[n, k] - zero[g_idx[k], n])

In checkpoint_format gptq the stored zero point is one less than the one meant, in gptq_v2 it is the one meant.
"""

from functools import partial

import torch

from moe_ref.checkpoints.config_values import Config, check_values, strings
from moe_ref.checkpoints.not_converted import by_gptq
from moe_ref.checkpoints.quantised_format import Axis, Part, QuantisedFormat, Tensors
from moe_ref.checkpoints.words import pack_words, unpack_words
from moe_ref.contract.encoded import Encoded, packed, unpacked
from moe_ref.contract.errors import UsageValueError, raise_faults
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme

METHOD = "gptq"
MIDDLE = 8
"""The zero point of a symmetric encoding."""


def read_format(where: str, config: Config) -> QuantisedFormat:
    """The format that a quantization_config with quant_method gptq says.

    Raises UsageValueError for bits and groups that no scheme has, and for act-order with zero points of its own.
    """
    check_values(where, config, bits=(4,), group_size=(128, 32), sym=(True, False), desc_act=(True, False, None),
                 checkpoint_format=("gptq", "gptq_v2", None), pack_dtype=("int32", None),
                 modules_in_block_to_quantize=(None,))
    size, ordered, symmetric = config["group_size"], bool(config.get("desc_act")), bool(config["sym"])
    if ordered and not symmetric:
        raise_faults(where, ["sym=False and desc_act=True, but act-order is known with sym=True alone"])
    usual = size == 128
    if ordered:
        scheme = Scheme.GPTQ_ORDER if usual else Scheme.GPTQ_ORDER_32
    elif symmetric:
        scheme = Scheme.GPTQ if usual else Scheme.GPTQ_32
    else:
        scheme = Scheme.AWQ if usual else Scheme.AWQ_32
    groups = Axis("groups" if ordered else "columns", 128 if usual else 32)
    words = ("I32",)
    parts = {"qweight": Part((Axis("columns", 8), Axis("rows")), words),
             "qzeros": Part((groups, Axis("rows", 8)), words),
             "scales": Part((groups, Axis("rows")), ("F16", "BF16")), "g_idx": Part((Axis("columns"),), words)}
    missing_one = int(config.get("checkpoint_format") != "gptq_v2")
    return QuantisedFormat(
        name=METHOD, scheme=scheme, parts=parts, encode=partial(_encode, scheme, missing_one),
        store=partial(_store, missing_one), packed=(8, 8),
        skips=partial(by_gptq, strings(where, config, "dynamic")))


def _encode(scheme: Scheme, missing_one: int, tensors: Tensors, num_columns: int) -> Encoded:
    encoding = ENCODINGS[scheme]
    zeros = unpack_words(tensors["qzeros"], -1) + missing_one
    if (zeros > 15).any():
        raise UsageValueError("qzeros: 15 is stored, but format gptq has 0 to 14 for zero points 1 to 15: readers take "
                              "15 for 0 or for 16")
    if not encoding.zeros and (zeros != MIDDLE).any():
        found = int(zeros[zeros != MIDDLE][0])
        raise UsageValueError(f"qzeros: zero point {found}, but should be {MIDDLE} everywhere with sym=True")
    _check_groups(scheme, tensors["g_idx"], tensors["scales"].shape[-2])
    codes = unpack_words(tensors["qweight"], -2).mT
    return Encoded(scheme=scheme, codes=packed(codes), scales=tensors["scales"].mT, num_columns=num_columns,
                   zeros=zeros.mT if encoding.zeros else None, groups=tensors["g_idx"] if encoding.order else None)


def _check_groups(scheme: Scheme, g_idx: torch.Tensor, num_groups: int) -> None:
    """A part begins with a group of its own, so that the numbers run on from its first."""
    if not g_idx.shape[-1]:
        return
    size = ENCODINGS[scheme].columns
    assert size is not None
    if ENCODINGS[scheme].order:
        if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < num_groups:
            raise UsageValueError(f"g_idx: groups {int(g_idx.min())} to {int(g_idx.max())}, but should be in "
                                  f"[0, {num_groups})")
        return
    runs = torch.arange(g_idx.shape[-1], dtype=g_idx.dtype, device=g_idx.device) // size
    if (g_idx - g_idx[..., :1] != runs).any():
        raise UsageValueError(f"g_idx: columns in another order than runs of {size}, but desc_act is false")


def _store(missing_one: int, encoded: Encoded) -> dict[str, torch.Tensor]:
    encoding, columns = ENCODINGS[encoded.scheme], torch.arange(encoded.num_columns, dtype=torch.int32)
    zeros = torch.full_like(encoded.scales, MIDDLE, dtype=torch.uint8) if encoded.zeros is None else encoded.zeros
    if missing_one and not zeros.all():
        raise UsageValueError("zero point 0, but format gptq has 1 to 15; gptq_v2 has all of them")
    assert encoding.columns is not None
    groups = (columns // encoding.columns).expand(*encoded.codes.shape[:-2], -1)
    return {"qweight": pack_words(unpacked(encoded.codes, encoded.num_columns).mT, -2),
            "qzeros": pack_words(zeros.mT - missing_one, -1), "scales": encoded.scales.mT.contiguous(),
            "g_idx": groups.contiguous() if encoded.groups is None else encoded.groups}
