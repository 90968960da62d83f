"""A weight in its own 8-bit dtype beside one tensor of scales: the parts that several formats have in common."""

from collections.abc import Mapping

import torch

from moe_ref.checkpoints.quantised_format import WIDENED, Axis, Part, Tensors
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from moe_ref.contract.vocabulary import Scheme

_HEADER = {Codes.E4M3: "F8_E4M3", Codes.INT8: "I8"}


def scaled_parts(scheme: Scheme, scale: str) -> Mapping[str, Part]:
    """`weight` (N, K) and its scales by the name `scale`: of blocks (blocks, blocks), of rows (N, 1), of all (1,)."""
    encoding = ENCODINGS[scheme]
    if encoding.rows is None:
        axes = (Axis("whole"),)
    elif encoding.columns is None:
        axes = (Axis("rows"), Axis("whole"))
    else:
        axes = (Axis("rows", encoding.rows), Axis("columns", encoding.columns))
    dtypes = {Scales.FP32: (*WIDENED, "F8_E8M0"), Scales.E8M0: ("U8", "F8_E8M0")}[encoding.scales]
    return {"weight": Part((Axis("rows"), Axis("columns")), (_HEADER[encoding.codes],)), scale: Part(axes, dtypes)}


def encode_scaled(scheme: Scheme, scale: str, tensors: Tensors, num_columns: int) -> Encoded:
    """The matrices (L, N, K); scales of other dtypes are widened to fp32, which changes no number."""
    codes, scales = tensors["weight"], tensors[scale]
    scales = scales.view(torch.uint8) if ENCODINGS[scheme].scales is Scales.E8M0 else scales.float()
    if ENCODINGS[scheme].rows is None:
        scales = scales.reshape(*codes.shape[:-2], 1, 1)
    return Encoded(scheme=scheme, codes=codes, scales=scales, num_columns=num_columns)


def store_scaled(scale: str, encoded: Encoded) -> dict[str, torch.Tensor]:
    """Back; scales in fp32, or the bytes of e8m0."""
    scales = encoded.scales
    if ENCODINGS[encoded.scheme].rows is None:
        scales = scales.flatten(-2)
    return {"weight": encoded.codes, scale: scales}
