"""Encoded weights as the numbers that they stand for, exactly, one expert at a time.

    value = second scale * scale[block] * (code - zero[block])

Nothing is rounded: a code has at most 8 significant bits, its zero point one more, a scale and a second scale 24 or
fewer each, where a scheme that has both has e4m3 scales of 4: 36 bits at most, of fp64's 53.
"""

import torch

from moe_ref.contract.encoded import Encoded
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from moe_ref.contract.weights import ExpertWeights, WeightSource

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Numbers of codes 0 to 7; 8 to 15 are their negatives (OCP Microscaling 1.0, table 5)."""


def decode(encoded: Encoded) -> torch.Tensor:
    """The matrices, (L, N, K) in fp64, exactly."""
    encoding = ENCODINGS[encoded.scheme]
    numbers = _numbers(encoded, encoding.codes)
    if encoding.codes is Codes.INT4:
        numbers = numbers - (8.0 if encoded.zeros is None else _columns(encoded.zeros.double(), encoded))
    scales = _columns(_rows(_scales(encoded.scales, encoding.scales), encoded), encoded)
    if encoded.second_scale is not None:
        scales = scales * encoded.second_scale.double()[..., None, None]
    return numbers * scales


def _numbers(encoded: Encoded, codes: Codes) -> torch.Tensor:
    if codes.per_byte == 1:
        return encoded.codes.double()
    halves = torch.stack([encoded.codes % 16, encoded.codes // 16], -1).flatten(-2)[..., :encoded.num_columns]
    if codes is Codes.INT4:
        return halves.double()
    table = torch.tensor([*E2M1, *(-number for number in E2M1)], dtype=torch.float64, device=halves.device)
    return table[halves.long()]


def _scales(scales: torch.Tensor, kind: Scales) -> torch.Tensor:
    """In fp64; 255 of e8m0 is NaN."""
    if kind is not Scales.E8M0:
        return scales.double()
    # Built from its bits: exp2 of a whole number is exact on no promise.
    powers = ((scales.long() + (1023 - 127)) << 52).view(torch.float64)
    return torch.where(scales == 255, torch.nan, powers)


def _rows(scales: torch.Tensor, encoded: Encoded) -> torch.Tensor:
    """One for every row."""
    size, count = ENCODINGS[encoded.scheme].rows, encoded.shape[-2]
    row_N = torch.arange(count, device=scales.device) + encoded.row_start
    return scales[..., row_N // size if size else torch.zeros_like(row_N), :]


def _columns(per_block: torch.Tensor, encoded: Encoded) -> torch.Tensor:
    """One for every column, from one for every block of them, (L, N, blocks)."""
    size, count = ENCODINGS[encoded.scheme].columns, encoded.num_columns
    if encoded.groups is not None:
        index = encoded.groups.long()[..., None, :].expand(*per_block.shape[:-1], count)
        return per_block.gather(-1, index)
    column_K = torch.arange(count, device=per_block.device) + encoded.column_start
    return per_block[..., column_K // size if size else torch.zeros_like(column_K)]


class DecodedSource:
    """Encoded weights as a WeightSource: each expert in fp64 when it is asked for, at most one at a time."""

    def __init__(self, weights: QuantisedWeights) -> None:
        self._weights = weights
        self.router_EH, self.router_bias_E = weights.router_EH, weights.router_bias_E
        self.selection_bias_E, self.weight_scale_E = weights.selection_bias_E, weights.weight_scale_E
        self.shared_gate_SH, self.output_bias_H = weights.shared_gate_SH, weights.output_bias_H

    @property
    def num_experts(self) -> int:
        """How many experts these are."""
        return self._weights.num_experts

    def expert(self, e: int) -> ExpertWeights:
        """Expert e, decoded now."""
        held = self._weights
        return ExpertWeights(decode(held.w13.at(e)), decode(held.w2.at(e)), _at(held.w13_bias_EGI, e),
                             _at(held.w2_bias_EH, e))

    def shared_expert(self) -> ExpertWeights | None:
        """The shared expert, decoded now, or None."""
        held = self._weights
        if held.shared_w13 is None or held.shared_w2 is None:
            return None
        return ExpertWeights(decode(held.shared_w13), decode(held.shared_w2), _whole(held.shared_w13_bias_GI),
                             _whole(held.shared_w2_bias_H))


def _at(bias: torch.Tensor | None, e: int) -> torch.Tensor | None:
    return None if bias is None else bias[e].double()


def _whole(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.double()


def decoded(weights: WeightSource | QuantisedWeights) -> WeightSource:
    """The weights, decoded where they are encoded."""
    return DecodedSource(weights) if isinstance(weights, QuantisedWeights) else weights
