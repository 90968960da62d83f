"""The output chain: truth of the unsharded layer and the propagated bound, for a given routing."""

from dataclasses import dataclass

import torch

from moe_ref.contract.parallel import Parallel
from moe_ref.contract.weights import ExpertWeights
from moe_ref.oracle import expert as formula
from moe_ref.verify.bounds.rows import Partials, Rows, exact
from moe_ref.verify.bounds.steps import Steps


@dataclass(frozen=True)
class ExpertRows:
    """Rows of one expert at full width: gate_up (R, G, I) and act (R, I)."""

    gate_up: Rows
    act: Rows


class OutputChain:
    """Partial sums of every rank with their bound, beside the truth, which is never sharded."""

    def __init__(self, steps: Steps, x_TH: torch.Tensor, parallel: Parallel) -> None:
        self.steps, self.x_TH, self.parallel = steps, x_TH, parallel
        self.partials = Partials.zeros(parallel.tp, x_TH)
        self.truth_TH = torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device)

    def routed(self, token_R: torch.Tensor, expert: ExpertWeights, weight: Rows) -> ExpertRows:
        """Add the rows of one expert."""
        steps, spec = self.steps, self.steps.spec
        gate_up = steps.gate_up(steps.tokens(self.x_TH[token_R], weight), expert)
        act = steps.act(gate_up, spec.experts, steps.act_weight(weight))
        down_RH = formula.down(formula.activate(gate_up.value, spec.experts), expert.w2_HI)
        if expert.w2_bias_H is not None:
            down_RH = down_RH + expert.w2_bias_H.double()
        self.truth_TH.index_add_(0, token_R, down_RH if steps.on_input else weight.value * down_RH)
        for rank, (start, stop) in enumerate(self.parallel.ranges(spec.intermediate_size)):
            share = expert._replace(w2_HI=expert.w2_HI[:, start:stop])
            self.partials.add(rank, token_R, steps.down(act.columns(start, stop), share, weight, rank == 0).addend)
        return ExpertRows(gate_up, act)

    def identity(self, token_R: torch.Tensor, weight: Rows) -> None:
        """Add the rows of one identity expert."""
        x_RH = self.x_TH[token_R].double()
        self.truth_TH.index_add_(0, token_R, weight.value * x_RH)
        self.partials.add(0, token_R, self.steps.identity(x_RH, weight, True).addend)

    def shared(self, expert: ExpertWeights, gate: Rows | None) -> list[Rows]:
        """Add the shared expert; its rows on every rank. gate: (T, S), None without gates."""
        steps, shared = self.steps, self.steps.spec.shared
        assert shared is not None
        act = steps.act(steps.gate_up(exact(self.x_TH), expert), shared.mlp)
        self.truth_TH += self._shared_truth(act, expert, gate)
        token_T, rows = torch.arange(len(self.x_TH), device=self.x_TH.device), []
        for rank, (start, stop) in enumerate(self.parallel.ranges(shared.intermediate_size)):
            if shared.gate == "router":
                assert gate is not None
                rows.append(self._shared_blocks(act, expert, gate, start, stop))
            else:
                share = expert._replace(w2_HI=expert.w2_HI[:, start:stop])
                rows.append(steps.shared(act.columns(start, stop), share, gate, rank == 0))
            self.partials.add(rank, token_T, rows[-1])
        return rows

    def _shared_truth(self, act: Rows, expert: ExpertWeights, gate: Rows | None) -> torch.Tensor:
        shared = self.steps.spec.shared
        assert shared is not None
        if shared.gate == "router":
            assert gate is not None
            width = shared.intermediate_size // shared.num_experts
            return formula.down(act.value * gate.value.repeat_interleave(width, dim=1), expert.w2_HI)
        down_TH = formula.down(act.value, expert.w2_HI)
        if expert.w2_bias_H is not None:
            down_TH = down_TH + expert.w2_bias_H.double()
        return down_TH if gate is None else gate.value * down_TH

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

    def finish(self, residual_TH: torch.Tensor | None, output_bias_H: torch.Tensor | None) -> torch.Tensor:
        """Complete the truth and return the bound of the output, (T, H); call it once."""
        steps, shared = self.steps, self.steps.spec.shared
        if shared is not None and shared.merge == "mean":
            self.truth_TH /= 2
        for one in (output_bias_H, residual_TH):
            if one is not None:
                self.truth_TH += one.double()
        return steps.reduced(steps.merged(self.partials, output_bias_H), self.truth_TH, residual_TH, output_bias_H)
