"""The output chain: truth of the unsharded layer and the propagated bound, for a given routing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_ref.contract.capabilities import ROUNDED_OPERANDS
from moe_ref.contract.parallel import Parallel, Range
from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import SharedPlacement
from moe_ref.contract.weights import ExpertWeights
from moe_ref.oracle import expert as formula
from moe_ref.verify.bounds.rows import Rows, exact
from moe_ref.verify.bounds.steps import Steps
from moe_ref.verify.bounds.summing import Summing


@dataclass(frozen=True)
class ExpertRows:
    """Rows of one expert at full width: gate_up (R, G, I) and act (R, I)."""

    gate_up: Rows
    act: Rows


class RowObserver(Protocol):
    """Who looks at routed rows while they pass; see measure/output_statistics.py."""

    def routed(self, token_R: torch.Tensor, w2_HI: torch.Tensor, act: Rows, weight: Rows, added_RH: torch.Tensor,
               cuts: list[Range], weight_in_act: bool, expert: int) -> None: ...

    def drifts(self, token_R: torch.Tensor, outputs: Range, drift_RH: torch.Tensor) -> None: ...

    def shared(self, w2_HI: torch.Tensor, act: Rows, gate: Rows, added_TH: torch.Tensor) -> None: ...

    def unpredicted(self, token_R: torch.Tensor, weight: Rows, added_RH: torch.Tensor) -> None: ...


class OutputChain:
    """Partial sums of every rank with their bound, beside the truth, which is never sharded."""

    def __init__(self, steps: Steps, x_TH: torch.Tensor, parallel: Parallel, shares: tuple[RankShare, ...],
                 observer: RowObserver | None = None) -> None:
        self.steps, self.x_TH, self.parallel, self.shares = steps, x_TH, parallel, shares
        self.observer = observer
        self.summing = Summing(steps, x_TH, parallel, shares)
        self.truth_TH = torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device)

    @property
    def _rounds(self) -> bool:
        """Whether every rank rounds its own activation to 8 bits."""
        return self.steps.numerics.products in ROUNDED_OPERANDS

    def routed(self, token_R: torch.Tensor, expert: ExpertWeights, weight: Rows, server_R: torch.Tensor,
               number: int = 0) -> ExpertRows:
        """Add the rows of expert `number`; server_R: the ep rank that serves each."""
        steps, spec = self.steps, self.steps.spec
        gate_up = steps.gate_up(steps.tokens(self.x_TH[token_R], weight), expert, number)
        act = steps.act(gate_up, spec.experts, steps.act_weight(weight))
        shares, parts = self.shares[:self.parallel.tp], []
        for share in shares:
            inner = (0, spec.intermediate_size) if self.summing.by_output else share.columns
            part = down_part(expert, inner, share.outputs)
            adds_bias = self.summing.by_output or share.tp_rank == 0
            parts.append(steps.down(act.columns(*inner), part, weight, adds_bias, number, inner[0]).addend)
        added_RH = self._added(parts, lambda: self._whole(gate_up, expert, weight))
        self.truth_TH.index_add_(0, token_R, added_RH)
        self._observe(token_R, expert, act, weight, added_RH, parts, number)
        self.summing.add_routed(parts, token_R, server_R)
        return ExpertRows(gate_up, act)

    def _observe(self, token_R: torch.Tensor, expert: ExpertWeights, act: Rows, weight: Rows, added_RH: torch.Tensor,
                 parts: list[Rows], number: int) -> None:
        """Tell the observer of routed rows.

        How errors of weighted tokens are shared by columns is not followed, nor how activations at a limit err alike.
        """
        if self.observer is None:
            return
        shares = self.shares[:self.parallel.tp]
        for share, part in zip(shares, parts, strict=True):
            self._observe_drift(token_R, share.outputs, part)
        mlp = self.steps.spec.experts
        # Nor how a scale moves all numbers of its block.
        if self._rounds or self.steps.on_input or mlp.limit is not None or mlp.gate_softcap or mlp.up_softcap:
            self.observer.unpredicted(token_R, weight, added_RH)
            return
        cuts = [] if self.summing.by_output else [share.columns for share in shares]
        in_act = self.steps.act_weight(weight) is not None
        self.observer.routed(token_R, expert.w2_HI, act, weight, added_RH, cuts, in_act, number)

    def _observe_drift(self, token_R: torch.Tensor, outputs: Range, rows: Rows) -> None:
        if self.observer is not None and rows.drift is not None:
            self.observer.drifts(token_R, outputs, rows.drift)

    def _added(self, parts: list[Rows], whole: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What rows of all tp ranks add to the truth: that of the whole expert.

        Where every rank rounds its own activation under scales of its own, what they multiply has no whole: then it is
        the sum of the parts, of which each is cut from the whole decoded expert.
        """
        if len(parts) == 1:
            return parts[0].value
        if not self._rounds:
            return whole()
        values = [part.value for part in parts]
        return torch.cat(values, 1) if self.summing.by_output else torch.stack(values).sum(0)

    def _whole(self, gate_up: Rows, expert: ExpertWeights, weight: Rows) -> torch.Tensor:
        """What routed rows add to the truth, of the whole expert: cut on no rank."""
        down_RH = formula.down(formula.activate(gate_up.value, self.steps.spec.experts), expert.w2_HI)
        if expert.w2_bias_H is not None:
            down_RH = down_RH + expert.w2_bias_H.double()
        return down_RH if self.steps.on_input else weight.value * down_RH

    def identity(self, token_R: torch.Tensor, weight: Rows) -> None:
        """Add the rows of one identity expert."""
        x_RH = self.x_TH[token_R].double()
        self.truth_TH.index_add_(0, token_R, weight.value * x_RH)
        if self.observer is not None:
            self.observer.unpredicted(token_R, weight, weight.value * x_RH)
        self.summing.add_routed(self.identity_parts(x_RH, weight), token_R, torch.zeros_like(token_R))

    def identity_parts(self, x_RH: torch.Tensor, weight: Rows) -> list[Rows]:
        """Rows of an identity expert as each tp rank adds them."""
        by_output = self.summing.by_output
        return [self.steps.identity(x_RH[:, slice(*share.outputs)], weight, by_output or share.tp_rank == 0).addend
                for share in self.shares[:self.parallel.tp]]

    def shared(self, expert: ExpertWeights, gate: Rows | None) -> list[Rows]:
        """Add the shared expert; its rows on every rank, of the tokens that the rank computes it for.

        gate: (T, S), None without gates.
        """
        steps, shared = self.steps, self.steps.spec.shared
        assert shared is not None
        act = steps.act(steps.gate_up(exact(self.x_TH), expert, None), shared.mlp)
        parts = self._shared_parts(act, expert, gate)
        added_TH = self._shared_truth(act, expert, gate, parts)
        self.truth_TH += added_TH
        if self.observer is not None and (self._rounds or shared.gate == "router"):
            self.observer.unpredicted(torch.arange(len(self.x_TH)), exact(torch.ones_like(added_TH[:, :1])), added_TH)
        elif self.observer is not None:
            self.observer.shared(expert.w2_HI, act, gate or exact(torch.ones_like(added_TH[:, :1])), added_TH)
        if self.parallel.shared is SharedPlacement.REPLICATED:
            self.summing.add_shared(parts)
            self._observe_drift(torch.arange(len(self.x_TH)), (0, steps.spec.hidden_size), parts[0])
            return [parts[0].rows(slice(*share.tokens)) for share in self.shares]
        for share, part in zip(self.shares, parts, strict=True):
            self._observe_drift(torch.arange(*share.merged_tokens), share.outputs, part)
        self.summing.add_shared(parts)
        return parts

    def _shared_parts(self, act: Rows, expert: ExpertWeights, gate: Rows | None) -> list[Rows]:
        """Rows of the shared expert as every rank adds them; of one that is whole on every rank, one for all."""
        shared = self.steps.spec.shared
        assert shared is not None
        if self.parallel.shared is SharedPlacement.REPLICATED:
            inner, outputs = (0, shared.intermediate_size), (0, self.steps.spec.hidden_size)
            return [self._shared_rows(act, expert, gate, inner, outputs, True)]
        by_output, parts = self.summing.by_output, []
        for share in self.shares:
            first = share.tp_rank == 0 and (share.ep_rank == 0 or self.parallel.tokens.over_ep)
            inner = (0, shared.intermediate_size) if by_output else share.shared_columns
            token_T = slice(*share.merged_tokens)
            gate_T = None if gate is None else gate.rows(token_T)
            parts.append(self._shared_rows(act.rows(token_T), expert, gate_T, inner, share.outputs, by_output or first))
        return parts

    def _shared_rows(self, act: Rows, expert: ExpertWeights, gate: Rows | None, inner: Range, outputs: Range,
                     adds_bias: bool) -> Rows:
        """Rows of one rank: the activation's columns `inner`, the output's columns `outputs`."""
        shared = self.steps.spec.shared
        if shared is not None and shared.gate == "router":
            assert gate is not None
            return self._shared_blocks(act, expert._replace(w2_HI=expert.w2_HI[slice(*outputs)]), gate, *inner)
        return self.steps.shared(act.columns(*inner), down_part(expert, inner, outputs), gate, adds_bias, inner[0])

    def _shared_truth(self, act: Rows, expert: ExpertWeights, gate: Rows | None, parts: list[Rows]) -> torch.Tensor:
        shared = self.steps.spec.shared
        assert shared is not None
        if self._rounds:
            return self._sum_of_shared(parts)
        if shared.gate == "router":
            assert gate is not None
            width = shared.intermediate_size // shared.num_experts
            return formula.down(act.value * gate.value.repeat_interleave(width, dim=1), expert.w2_HI)
        down_TH = formula.down(act.value, expert.w2_HI)
        if expert.w2_bias_H is not None:
            down_TH = down_TH + expert.w2_bias_H.double()
        return down_TH if gate is None else gate.value * down_TH

    def _sum_of_shared(self, parts: list[Rows]) -> torch.Tensor:
        """As _added: of activations that every rank rounds by itself."""
        if self.parallel.shared is SharedPlacement.REPLICATED:
            return parts[0].value
        total_TH = torch.zeros_like(self.truth_TH)
        for share, part in zip(self.shares, parts, strict=True):
            total_TH[slice(*share.merged_tokens), slice(*share.outputs)] += part.value
        return total_TH

    def _shared_blocks(self, act: Rows, expert: ExpertWeights, gate: Rows, start: int, stop: int) -> Rows:
        """Rows of one rank whose columns may hold parts of several shared experts."""
        shared = self.steps.spec.shared
        assert shared is not None
        width = shared.intermediate_size // shared.num_experts
        cuts = [(max(start, block * width), min(stop, (block + 1) * width)) for block in range(shared.num_experts)]
        cuts = [(low, max(low, high)) for low, high in cuts]
        return self.steps.shared_blocks([act.columns(low, high) for low, high in cuts],
                                        [expert.w2_HI[:, low:high] for low, high in cuts],
                                        [gate.columns(block, block + 1) for block in range(shared.num_experts)])

    def finish(self, residual_TH: torch.Tensor | None, output_bias_H: torch.Tensor | None) -> Rows:
        """Complete the truth and return it with its bound and variance, (T, H); call it once."""
        shared = self.steps.spec.shared
        if shared is not None and shared.merge == "mean":
            self.truth_TH /= 2
        for one in (output_bias_H, residual_TH):
            if one is not None:
                self.truth_TH += one.double()
        merged = self.summing.merged(output_bias_H)
        sums = self.summing.reduced(merged, residual_TH, output_bias_H, bias_is_summed=False)
        return Rows(self.truth_TH, sums.bound, sums.variance)


def down_part(expert: ExpertWeights, inner: Range, outputs: Range) -> ExpertWeights:
    """The expert with the part of its down projection that takes the columns `inner` and makes `outputs`."""
    bias_H = expert.w2_bias_H
    return expert._replace(w2_HI=expert.w2_HI[slice(*outputs), slice(*inner)],
                           w2_bias_H=None if bias_H is None else bias_H[slice(*outputs)])
