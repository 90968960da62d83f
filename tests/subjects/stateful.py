"""Right layers that keep state between calls, as captured graphs, autotuners and pools of buffers do."""

from dataclasses import dataclass, replace

import torch

from moe_ref.contract.spec import SharedExpert
from moe_ref.contract.weights import ExpertWeights
from tests.subjects.base import Call
from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_call import ParallelCall, Routed, Served
from tests.subjects.whole import WholeSpec

BLOCK_R = 16
"""Rows that are handed on together."""
SPLITS = (1, 3)
"""Configurations of the down product: pieces of its sum, added up in the output."""
LEAST_TO_SPLIT = 32


@dataclass
class Graph:
    """What the calls of one rank and shape have in common: addresses, and how often they were replayed.

    tags: per block of rows the replay that has filled it in mailbox_RH.
    """

    x_RH: torch.Tensor
    expert_R: torch.Tensor
    mailbox_RH: torch.Tensor
    tags: list[int]
    replays: int = 0


class Replayed(ParallelMoE):
    """Calls of a shape read and write the same buffers, which are made in the first; products are tuned there too."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: dict[tuple[object, ...], Graph] = {}
        self.scratch: dict[object, torch.Tensor] = {}
        self.captured: dict[tuple[int, int], torch.Tensor] = {}
        self.best: dict[tuple[int, ...], int] = {}

    def graph(self, call: ParallelCall, served: Served) -> Graph:
        """That of the call's shape, captured if it is new."""
        width = call.weights.w2_EHI.shape[1]
        key = call.groups.rank, call.groups.ep.size, call.groups.tp.size, served.x_RH.shape, served.x_RH.dtype, width
        if key not in self.graphs:
            rows = len(served.x_RH)
            self.graphs[key] = Graph(served.x_RH.clone(), served.expert_R.clone(), torch.empty(rows, width),
                                     [0] * (rows // BLOCK_R + 1))
        return self.graphs[key]

    def dispatched(self, call: ParallelCall, group: Routed) -> Served:
        served = super().dispatched(call, group)
        graph = self.graph(call, served)
        graph.replays += 1
        graph.x_RH.copy_(served.x_RH)
        graph.expert_R.copy_(served.expert_R)
        return replace(served, x_RH=graph.x_RH, expert_R=graph.expert_R)

    def expert_rows_of(self, call: ParallelCall, served: Served) -> torch.Tensor:
        """Rows through the mailbox: whoever takes a block waits until this replay has filled it."""
        graph, filled_RH = self.graph(call, served), super().expert_rows_of(call, served)
        taken_RH = torch.empty_like(filled_RH)
        for block, tag in enumerate(graph.tags):
            rows = slice(block * BLOCK_R, (block + 1) * BLOCK_R)
            if tag != graph.replays:
                graph.mailbox_RH[rows] = filled_RH[rows].float()
                graph.tags[block] = graph.replays
            taken_RH[rows] = graph.mailbox_RH[rows].to(filled_RH.dtype)
        return taken_RH

    def projected_back(self, call: Call, act_RI: torch.Tensor, expert: ExpertWeights) -> torch.Tensor:
        """With the best number of splits, which are tried where the shape is new."""
        key, down_RH = tuple(expert.w2_HI.shape), torch.zeros(len(act_RI), len(expert.w2_HI))
        configurations = SPLITS if act_RI.shape[1] >= LEAST_TO_SPLIT else SPLITS[:1]
        trials = configurations[:-1] if key not in self.best and len(act_RI) else ()
        for splits in (*trials, self.best.get(key, configurations[-1])):
            down_RH.zero_()
            pieces = act_RI.tensor_split(splits, 1), expert.w2_HI.float().tensor_split(splits, 1)
            for act, w2 in zip(*pieces, strict=True):
                down_RH += act @ w2.T
            if len(act_RI):
                self.best[key] = splits
        return down_RH if expert.w2_bias_H is None else down_RH + self.down_bias(call, expert.w2_bias_H.float())

    def sum_of_slots(self, rows_TKH: torch.Tensor) -> torch.Tensor:
        """From the first slot to the last."""
        rows_RH, row_KT = rows_TKH.flatten(0, 1), self.rows_of_slots(*rows_TKH.shape[:2])
        total_TH = torch.zeros_like(rows_TKH[:, 0])
        for slot in range(len(row_KT)):
            total_TH = total_TH + rows_RH[row_KT[slot]]
        return total_TH

    def rows_of_slots(self, num_tokens: int, top_k: int) -> torch.Tensor:
        """Which row each token's slot is, (K, T), written into the scratch of the shape when it is captured."""
        shape, size = (num_tokens, top_k), num_tokens * top_k
        if shape not in self.captured:
            scratch = self.scratch.get(shape)
            if scratch is None or len(scratch) < size:
                scratch = self.scratch[shape] = torch.empty(size, dtype=torch.int64)
            scratch[:size] = torch.arange(size).view(shape).T.flatten()
            self.captured[shape] = scratch[:size]
        return self.captured[shape].view(top_k, num_tokens)


class SideStream(WholeSpec):
    """Sums of the routed rows wait in a buffer of a pool for those of the shared expert, which takes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.free: dict[torch.Size, list[torch.Tensor]] = {}

    def take(self, shape: torch.Size) -> torch.Tensor:
        free = self.free.setdefault(shape, [])
        return free.pop() if free else torch.empty(shape)

    def give(self, tensor: torch.Tensor) -> None:
        self.free[tensor.shape].append(tensor)

    def sum_of_rows(self, call: Call, rows_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        sums_TH = super().sum_of_rows(call, rows_TKH, weights_TK)
        routed_TH = self.take(sums_TH.shape).copy_(sums_TH)
        return routed_TH

    def merged_shared(self, routed_TH: torch.Tensor, shared_TH: torch.Tensor, shared: SharedExpert) -> torch.Tensor:
        waiting_TH = self.take(shared_TH.shape).copy_(shared_TH)
        merged_TH = super().merged_shared(routed_TH, waiting_TH, shared)
        self.give(routed_TH)
        self.give(waiting_TH)
        return merged_TH


replayed = Replayed()
side_stream = SideStream()
