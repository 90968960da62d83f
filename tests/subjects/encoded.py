"""A right layer whose expert weights are stored as scale times value, encoded whole and cut by every rank for itself.

Scales are powers of two, one for each row and each GROUP of columns, so that a value times its scale is the weight to
the bit: nothing is rounded, and all that a defect can do is to take another scale, another column or another format.
"""

from dataclasses import dataclass, replace

import torch

from moe_ref.contract.comm import Comm
from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_call import ParallelCall
from tests.subjects.parallel_variants import UNCOUNTED

GROUP, BLOCK = 32, 16
"""Columns of a scale, and of a step of the loop that decodes them."""
Q = -1
"""Axis letter and place of the groups of columns."""


@dataclass(frozen=True)
class Part:
    """What a rank keeps of a matrix of every expert.

    values_ENK; scales: num_groups times N numbers of every expert, as shuffled() leaves them; columns_K: which column
    of the matrix each stored one is; start: the first of the rank's columns.
    """

    values_ENK: torch.Tensor
    scales: torch.Tensor
    num_groups: int
    columns_K: torch.Tensor
    group_K: torch.Tensor
    start: int


class EncodedMoE(ParallelMoE):
    """Groups are runs of columns, and a rank keeps the scales of those that it has columns of."""

    promises = UNCOUNTED

    def loaded(self, call: ParallelCall) -> ParallelCall:
        weights, spec, tp = call.weights, call.spec, call.groups.tp
        (start, stop), intermediate = call.parallel.ranges(spec.intermediate_size)[tp.rank], spec.intermediate_size
        w13_EGIH, w2_EHI = whole(tp, weights.w13_EGIH, 2), whole(tp, weights.w2_EHI, 1 if call.by_output else 2)
        order_K, halves = self.order(spec.hidden_size), (w13_EGIH.shape[1], intermediate)
        values_ENK, scales_ENQ = encoded(w13_EGIH.flatten(1, 2), order_K)
        values_ENK, scales_ENQ = (one.unflatten(1, halves)[:, :, start:stop].flatten(1, 2)
                                  for one in (values_ENK, scales_ENQ))
        w13 = self.part(call, values_ENK, scales_ENQ, order_K, (0, spec.hidden_size), spec.hidden_size)
        values_ENK, scales_ENQ = encoded(w2_EHI, order_K := self.order(intermediate))
        rows, columns = slice(None), (start, stop)
        if call.by_output:
            rows, columns = slice(*call.parallel.ranges(spec.hidden_size)[tp.rank]), (0, intermediate)
        w2 = self.part(call, values_ENK[:, rows], scales_ENQ[:, rows], order_K, columns, intermediate)
        dtype = w2_EHI.dtype
        return replace(call, weights=replace(
            weights, w13_EGIH=self.decoded(w13).unflatten(1, (halves[0], stop - start)).to(dtype),
            w2_EHI=self.decoded(w2).to(dtype)))

    def order(self, num_columns: int) -> torch.Tensor:
        """The columns in the order in which they fill groups."""
        return torch.arange(num_columns)

    def part(self, call: ParallelCall, values_ENK: torch.Tensor, scales_ENQ: torch.Tensor, order_K: torch.Tensor,
             columns: tuple[int, int], size_k: int) -> Part:
        """The rank's columns in the order of groups, in a buffer that was allocated for them."""
        start, stop = columns
        columns_K = self.columns(order_K, start, stop)
        kept = self.kept_groups(call, start, stop, scales_ENQ.shape[Q])
        packed_ENK = torch.empty(*values_ENK.shape[:2], len(columns_K), dtype=torch.float32)
        packed_ENK.copy_(values_ENK[..., columns_K])
        scales_ENQ = scales_ENQ[..., kept]
        return Part(packed_ENK, shuffled(scales_ENQ, size_k), scales_ENQ.shape[Q], columns_K,
                    (order_K.argsort() // GROUP)[columns_K], start)

    def columns(self, order_K: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return order_K[(order_K >= start) & (order_K < stop)]

    def kept_groups(self, call: ParallelCall, start: int, stop: int, num_groups: int) -> slice:
        count = -(-stop // GROUP) - start // GROUP
        first = start // GROUP
        return slice(first, first + count)

    def decoded(self, part: Part) -> torch.Tensor:
        """Expert by expert and block by block, with a pointer into the scales that goes on where a group ends."""
        values_ENK, start, group_size = part.values_ENK, part.start, GROUP
        (num_experts, num_rows, width), w_ENK = values_ENK.shape, torch.empty_like(values_ENK)
        scales_EQN = unshuffled(part.scales, part.num_groups, num_rows)
        for expert in range(num_experts):
            group = 0
            for low in range(start // BLOCK * BLOCK, start + width, BLOCK):
                block = slice(max(low - start, 0), min(low + BLOCK - start, width))
                scale_N = scales_EQN[expert, group]
                w_ENK[expert, :, block] = values_ENK[expert, :, block] * scale_N[:, None]
                group += (low + BLOCK) // group_size - low // group_size
        return w_ENK


class ActOrder(EncodedMoE):
    """Columns fill groups in an order of their own, so that every rank has columns of all groups and all scales."""

    def order(self, num_columns: int) -> torch.Tensor:
        return torch.arange(num_columns)[torch.arange(num_columns).remainder(7).argsort(stable=True)]

    def kept_groups(self, call: ParallelCall, start: int, stop: int, num_groups: int) -> slice:
        return slice(num_groups)

    def decoded(self, part: Part) -> torch.Tensor:
        """In the order of the activation's columns."""
        scales_EQN = unshuffled(part.scales, part.num_groups, part.values_ENK.shape[1])
        w_ENK = part.values_ENK * scales_EQN[:, part.group_K].mT
        return w_ENK[..., part.columns_K.argsort()]


def whole(tp: Comm, tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """The parts of all ranks, one after the other on that axis."""
    return torch.cat(tp.all_gather(tensor.movedim(axis, 0).contiguous())).movedim(0, axis)


def encoded(w_ENK: torch.Tensor, order_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in fp32, and scales_ENQ in the dtype of the weights, of which neighbours differ; K may be in any order.

    From 2^-24 to 2^24, and where the scales are fp16 from 2^-6 to 2^6.
    """
    num_experts, num_rows, num_columns = w_ENK.shape
    expert_E11, row_N1 = torch.arange(num_experts)[:, None, None], torch.arange(num_rows)[:, None]
    place_ENQ = 3 * expert_E11 + 7 * row_N1 + 5 * torch.arange(-(-num_columns // GROUP))
    exponent_ENQ = (place_ENQ % 13 - 6) * (1 if w_ENK.dtype is torch.float16 else 4)
    scales_ENQ = torch.ldexp(torch.ones(exponent_ENQ.shape), exponent_ENQ)
    return w_ENK.float() / scales_ENQ[..., order_K.argsort() // GROUP], scales_ENQ.to(w_ENK.dtype)


def shuffled(scales_ENQ: torch.Tensor, size_k: int) -> torch.Tensor:
    """As a kernel reads them: even rows before odd ones, and one group after the other where there are several."""
    rows_ENQ = torch.cat([scales_ENQ[:, 0::2], scales_ENQ[:, 1::2]], 1)
    if size_k <= GROUP:
        return rows_ENQ.flatten(1)
    return rows_ENQ.mT.flatten(1)


def unshuffled(scales: torch.Tensor, num_groups: int, num_rows: int) -> torch.Tensor:
    """What a kernel takes for the scales of every group and row, (E, Q, N) in fp32."""
    row_N = torch.arange(num_rows)
    return scales.view(len(scales), num_groups, num_rows)[..., row_N // 2 + row_N % 2 * (-(-num_rows // 2))].float()


encoded_moe = EncodedMoE()
act_order = ActOrder()
