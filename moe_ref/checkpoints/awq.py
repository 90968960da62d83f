"""AWQ as AutoAWQ stores it (version gemm): 4 bits with zero points, groups of 128 or 32 columns.

qweight int32 (K, N / 8) and qzeros int32 (groups, N / 8), eight rows of the matrix to a word, in the order in which the
words' bits hold them 0 2 4 6 1 3 5 7 (AutoAWQ awq/modules/linear/gemm.py, order_map); scales fp16 (groups, N).

    value[n, k] = scales[k // size, n] * (code[n, k] - zero[k // size, n])
"""

from functools import partial

import torch

from moe_ref.checkpoints.config_values import Config, check_values, strings
from moe_ref.checkpoints.not_converted import by_awq
from moe_ref.checkpoints.quantised_format import Axis, Part, QuantisedFormat, Tensors
from moe_ref.checkpoints.words import pack_words, unpack_words
from moe_ref.contract.encoded import Encoded, packed, unpacked
from moe_ref.contract.vocabulary import Scheme

METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_format(where: str, config: Config) -> QuantisedFormat:
    """The format that a quantization_config with quant_method awq says; raises UsageValueError for other versions."""
    check_values(where, config, bits=(4,), group_size=(128, 32), zero_point=(True,), version=("gemm", "GEMM", None))
    size = 128 if config["group_size"] == 128 else 32
    scheme = Scheme.AWQ if size == 128 else Scheme.AWQ_32
    parts = {"qweight": Part((Axis("columns"), Axis("rows", 8)), ("I32",)),
             "qzeros": Part((Axis("columns", size), Axis("rows", 8)), ("I32",)),
             "scales": Part((Axis("columns", size), Axis("rows")), ("F16", "BF16"))}
    return QuantisedFormat(name=METHOD, scheme=scheme, parts=parts, encode=partial(_encode, scheme), store=_store,
                           packed=(8, 1), skips=partial(by_awq, strings(where, config, "modules_to_not_convert")))


def _encode(scheme: Scheme, tensors: Tensors, num_columns: int) -> Encoded:
    codes, zeros = (unpack_words(tensors[name], -1, order=ORDER).mT for name in ("qweight", "qzeros"))
    return Encoded(scheme=scheme, codes=packed(codes), scales=tensors["scales"].mT, zeros=zeros,
                   num_columns=num_columns)


def _store(encoded: Encoded) -> dict[str, torch.Tensor]:
    assert encoded.zeros is not None
    return {"qweight": pack_words(unpacked(encoded.codes, encoded.num_columns).mT, -1, order=ORDER),
            "qzeros": pack_words(encoded.zeros.mT, -1, order=ORDER), "scales": encoded.scales.mT.contiguous()}
