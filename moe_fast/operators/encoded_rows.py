"""What a family of kernels over encoded experts returns. There are two: operators/decoded.py decodes weights to the
tokens' dtype, operators/scaled.py rounds rows to codes as well.

A family has three functions:
    *_mlp_rows(EncodedMLP) -> EncodedRows               both products
    *_act_rows(EncodedGateUp) -> EncodedActRows         the first one alone, for the gather schedule
    *_down_rows(EncodedDown) -> EncodedDownRows         the second one alone
Codes and scales of rows are in (token, slot) order, scales in fp32, codes as the 8-bit numbers that are multiplied;
None where rows are not rounded to codes. Those of slots without an expert at hand may be anything.
"""

from dataclasses import dataclass

import torch

from moe_fast.kernels.align import Alignment
from moe_ref.contract.vocabulary import Stage

CODES = {"permute_codes_RH": Stage.PERMUTE_CODES, "permute_scales_RQ": Stage.PERMUTE_SCALES,
         "act_codes_RI": Stage.ACT_CODES, "act_scales_RQ": Stage.ACT_SCALES}
"""Fields, and the stages that they are."""


class _WithCodes:
    @property
    def codes(self) -> dict[Stage, torch.Tensor]:
        """Those of CODES that there are."""
        held = ((stage, getattr(self, name, None)) for name, stage in CODES.items())
        return {stage: tensor for stage, tensor in held if tensor is not None}


@dataclass(frozen=True)
class EncodedActRows(_WithCodes):
    """act_RI in expert order and x's dtype; codes and scales of the rows that the first product took."""

    alignment: Alignment
    act_RI: torch.Tensor
    permute_codes_RH: torch.Tensor | None = None
    permute_scales_RQ: torch.Tensor | None = None


@dataclass(frozen=True)
class EncodedDownRows(_WithCodes):
    """down_RH in (token, slot) order and x's dtype, weighted; codes and scales of the rows of act."""

    alignment: Alignment
    down_RH: torch.Tensor
    act_codes_RI: torch.Tensor | None = None
    act_scales_RQ: torch.Tensor | None = None


@dataclass(frozen=True)
class EncodedRows(_WithCodes):
    """Of both products: act_RI in expert order, down_RH in (token, slot) order, both in x's dtype."""

    alignment: Alignment
    act_RI: torch.Tensor
    down_RH: torch.Tensor
    permute_codes_RH: torch.Tensor | None = None
    permute_scales_RQ: torch.Tensor | None = None
    act_codes_RI: torch.Tensor | None = None
    act_scales_RQ: torch.Tensor | None = None
