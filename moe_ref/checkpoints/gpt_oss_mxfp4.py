"""The mxfp4 of gpt-oss: all experts in one tensor, gate and up rows taking turns, blocks of 32 columns.

gate_up_proj_blocks uint8 (E, 2I, H / 32, 16) and down_proj_blocks (E, H, I / 32, 16), two columns to a byte, the even
one in the low half; *_scales uint8 (E, 2I, H / 32), the exponent plus 127. The matrices are (out, in), unlike those of
the bf16 checkpoints of the family (transformers 5.23 integrations/mxfp4.py, convert_moe_packed_tensors).
"""

from functools import partial

import torch

from moe_ref.checkpoints.config_values import Config, strings
from moe_ref.checkpoints.not_converted import by_transformers
from moe_ref.checkpoints.quantised_format import Axis, Part, QuantisedFormat, Tensors
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.vocabulary import Scheme
from moe_ref.layouts.layout import Layout

METHOD = "mxfp4"


def read_format(where: str, config: Config) -> QuantisedFormat:
    """The format that a quantization_config with quant_method mxfp4 says."""
    parts = {"blocks": Part((Axis("rows"), Axis("columns", 32), Axis("whole", 16)), ("U8",)),
             "scales": Part((Axis("rows"), Axis("columns", 32)), ("U8",))}
    return QuantisedFormat(
        name=METHOD, scheme=Scheme.MXFP4, parts=parts, encode=_encode, store=_store, joint="_", packed=(1, 32),
        layout=Layout(order="out_in", gate_up="interleaved"),
        skips=partial(by_transformers, strings(where, config, "modules_to_not_convert")))


def _encode(tensors: Tensors, num_columns: int) -> Encoded:
    return Encoded(scheme=Scheme.MXFP4, codes=tensors["blocks"].flatten(-2), scales=tensors["scales"],
                   num_columns=num_columns)


def _store(encoded: Encoded) -> dict[str, torch.Tensor]:
    return {"blocks": encoded.codes.unflatten(-1, (-1, 16)), "scales": encoded.scales}
