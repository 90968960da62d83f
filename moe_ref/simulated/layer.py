"""A whole layer, all its tensor-parallel ranks in one process, that rounds where its contract says and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.checks import check_groups, check_injected, check_residual, check_tokens
from moe_ref.contract.comm import Groups
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.features import Feature
from moe_ref.contract.parallel import Parallel, Range
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage, Storage
from moe_ref.contract.weights import ExpertWeights, WeightSource, check_weights
from moe_ref.inputs.build import Inputs
from moe_ref.numerics.formats import round_to
from moe_ref.numerics.summation import matmul as ordered_matmul
from moe_ref.simulated.activation import activated_gate
from moe_ref.simulated.fault import Fault, Matmul, Product
from moe_ref.simulated.reduction import Reduction, reduce_parts
from moe_ref.simulated.router import chosen

IN_TURN: Matmul = partial(ordered_matmul, order="sequential")
RIGHT = Fault()

STAGES = (Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED, Stage.REDUCED)


def capabilities(name: str, numerics: dict[Dtype, Numerics]) -> Capabilities:
    """What a simulated layer can do: softmax or sigmoid routers, gated experts, tensor parallelism, one all-reduce."""
    scope: dict[str, Any] = {"deterministic": True, "equal_ranks": True, "lower_id_ties": True,
                             "injected_routing": True}
    return Capabilities(name=name, version="1", numerics=numerics, stages=STAGES, devices=("cpu",),
                        activations=("silu", "gelu", "gelu_tanh"), scores=("softmax", "sigmoid"),
                        features=(Feature.DENSE, Feature.MLP_BIAS, Feature.EPSILON_CLAMP, Feature.RESIDUAL), max_tp=64,
                        storages=tuple(Storage), ranks=(Ranks.LOCAL, Ranks.GLOO), **scope)


@dataclass(frozen=True)
class SimulatedLayer:
    """The layer of one rounding contract, on the machine that `matmul` and `reduction` stand for.

    What is stored is rounded once, by its store, from the result of the step before; what stays in registers is rounded
    to fp32 (with accumulation in fp64: not at all) after every step. Scores and activations are evaluated in fp64, and
    rounded inside where the contract does. Long sums, the router's among them, have the rounding of `matmul`; slots are
    added from the first one on. rotation: see reduce_parts. fault: what is wrong with it, by default nothing.
    """

    numerics: Numerics
    matmul: Matmul = IN_TURN
    reduction: Reduction = "ring"
    rotation: int = 0
    fault: Fault = RIGHT

    def refusal(self, case: Case) -> str | None:
        """Why a case is not simulated, in words; None where it is."""
        return capabilities("simulated", {case.problem.dtype: self.numerics}).refusal(case, Ranks.LOCAL, "cpu")

    def run(self, case: Case, inputs: Inputs, routing: Routing | None = None) -> list[dict[Stage, torch.Tensor]]:
        """Every stage of every rank, each a tensor of the format that stores it, fp32 where it stays in registers.

        A pure function of its arguments; routing: taken in place of the router's. UsageValueError where `refusal` has
        words.
        """
        refused = self.refusal(case)
        raise_faults("SimulatedLayer", [refused] if refused else [])
        spec, columns = case.problem.spec, case.parallel.ranges(case.problem.spec.intermediate_size)
        routed = self._injected(routing) if routing is not None else self._routed(inputs.x_TH, inputs.weights, spec,
                                                                                  inputs.logits_TE)
        ranks = self._rows(inputs.x_TH, routed, inputs.weights, spec, list(enumerate(columns)))
        outputs = self._outputs(torch.stack([stages[Stage.MERGED] for stages in ranks]), inputs.residual_TH)
        return [self._shown({**routed, **stages, Stage.REDUCED: output_TH})
                for stages, output_TH in zip(ranks, outputs, strict=True)]

    def moe(self, x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
        """One rank of the same layer by the contract's entry point, (T, H): the same bits as `run` has for it.

        The ranks' parts are gathered and added up in the declared order on each of them, whatever the order of the
        group's own all-reduce. UsageValueError / UsageTypeError on wrong shapes, dtypes or group sizes.
        """
        check_tokens(x_TH, spec, tuple(TORCH_DTYPES[dtype] for dtype in Dtype), "moe_ref.simulated")
        parallel, groups = check_groups(parallel, groups)
        check_weights(weights, spec, parallel, groups.rank)
        check_injected(routing, logits_TE)
        if residual_TH is not None:
            check_residual(residual_TH, x_TH)
        routed = self._routed(x_TH, weights, spec, logits_TE) if routing is None else self._injected(routing)
        width = parallel.ranges(spec.intermediate_size)[groups.tp.rank]
        stages = self._rows(x_TH, routed, weights, spec, [(groups.tp.rank, (0, width[1] - width[0]))])[0]
        gathered_PTH = torch.cat(groups.tp.all_gather(stages[Stage.MERGED])).unflatten(0, (parallel.tp, len(x_TH)))
        output_TH = self._outputs(gathered_PTH, residual_TH)[groups.tp.rank]
        shown = self._shown({**routed, **stages, Stage.REDUCED: output_TH})
        if trace is not None:
            for stage, tensor in shown.items():
                trace.record(stage, tensor)
        return shown[Stage.REDUCED]

    # Rounding.

    @property
    def _registers(self) -> Format:
        return Format.FP64 if self.numerics.accumulate is Format.FP64 else Format.FP32

    def _format(self, stage: Stage) -> Format:
        return self.numerics.storage.get(stage, self._registers)

    def _store(self, value: torch.Tensor, stage: Stage) -> torch.Tensor:
        return self.fault.store(value, self._format(stage), stage)

    def _shown(self, stages: dict[Stage, torch.Tensor]) -> dict[Stage, torch.Tensor]:
        return {stage: tensor if stage is Stage.IDS else tensor.to(TORCH_DTYPES[self._format(stage)])
                for stage, tensor in stages.items()}

    # Router.

    def _routed(self, x_TH: torch.Tensor, weights: WeightSource, spec: MoESpec,
                logits_TE: torch.Tensor | None) -> dict[Stage, torch.Tensor]:
        """Logits where the layer has them, ids and weights."""
        router = spec.router
        if router is None:
            ids_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64)
            return {Stage.IDS: ids_TK, Stage.WEIGHTS: torch.ones(ids_TK.shape, dtype=torch.float64)}
        if logits_TE is None:
            assert weights.router_EH is not None
            logits_TE = self.matmul(x_TH.double(), weights.router_EH.double().T)
        logits_TE = self._store(logits_TE.double(), Stage.LOGITS)
        ids_TK, weights_TK = chosen(logits_TE, router)
        return {Stage.LOGITS: logits_TE, Stage.IDS: ids_TK, Stage.WEIGHTS: self._store(weights_TK, Stage.WEIGHTS)}

    def _injected(self, routing: Routing) -> dict[Stage, torch.Tensor]:
        routed = {Stage.IDS: routing.ids_TK, Stage.WEIGHTS: self._store(routing.weights_TK.double(), Stage.WEIGHTS)}
        return routed if routing.logits_TE is None else {Stage.LOGITS: routing.logits_TE.double(), **routed}

    # Experts.

    def _rows(self, x_TH: torch.Tensor, routed: dict[Stage, torch.Tensor], weights: WeightSource, spec: MoESpec,
              parts: Sequence[tuple[int, Range]]) -> list[dict[Stage, torch.Tensor]]:
        """gate_up, act, down and merged of each part, a tp rank and its columns of the activation, in fp64."""
        x_TH, weights_TK = x_TH.double(), self.fault.weights(routed[Stage.WEIGHTS])
        ids_TK = self.fault.served(routed[Stage.IDS], spec.num_experts)
        inner, hidden = parts[-1][1][1], spec.hidden_size
        shapes = {Stage.GATE_UP: (2, inner), Stage.ACT: (inner,), Stage.DOWN: (len(parts), hidden)}
        rows = {stage: torch.zeros(ids_TK.numel(), *shape, dtype=torch.float64) for stage, shape in shapes.items()}
        for expert in range(spec.num_experts):
            token_R, slot_R = (ids_TK == expert).nonzero(as_tuple=True)
            row_R = token_R * spec.top_k + slot_R
            if len(row_R):
                computed = self._expert(x_TH[token_R], weights_TK[token_R, slot_R, None], weights.expert(expert), spec,
                                        expert, parts)
                for stage, tensor in computed.items():
                    rows[stage][row_R] = tensor
        return [{Stage.GATE_UP: rows[Stage.GATE_UP][..., start:stop], Stage.ACT: rows[Stage.ACT][:, start:stop],
                 Stage.DOWN: rows[Stage.DOWN][:, part],
                 Stage.MERGED: self._merged(rows[Stage.DOWN][:, part].unflatten(0, ids_TK.shape), weights_TK)}
                for part, (_, (start, stop)) in enumerate(parts)]

    def _expert(self, x_RH: torch.Tensor, weight_R1: torch.Tensor, expert: ExpertWeights, spec: MoESpec, number: int,
                parts: Sequence[tuple[int, Range]]) -> dict[Stage, torch.Tensor]:
        """gate_up (R, 2, I), act (R, I) and down (R, P, H) of one expert's rows, as they are stored."""
        w13_NH = expert.w13_GIH.flatten(0, 1).double()
        gate_up_RN = self.fault.product(self.matmul, x_RH, w13_NH.T, Product(Stage.GATE_UP, number))
        if expert.w13_bias_GI is not None:
            gate_up_RN = gate_up_RN + expert.w13_bias_GI.flatten().double()
        gate_up_RGI = self._store(gate_up_RN, Stage.GATE_UP).unflatten(1, expert.w13_GIH.shape[:2])
        act_RI = self._activation(gate_up_RGI, weight_R1, spec)
        stored_RI = self._store(act_RI, Stage.ACT)
        fed_RI = self.fault.fed(act_RI, stored_RI)
        down_RPH = [self._down(fed_RI[:, slice(*columns)], expert, columns, weight_R1,
                               Product(Stage.DOWN, number, rank)) for rank, columns in parts]
        return {Stage.GATE_UP: gate_up_RGI, Stage.ACT: stored_RI, Stage.DOWN: torch.stack(down_RPH, 1)}

    def _activation(self, gate_up_RGI: torch.Tensor, weight_R1: torch.Tensor, spec: MoESpec) -> torch.Tensor:
        """activation(gate) * up before its store, times the routing weight where that joins here."""
        inner = self.numerics.activation
        factor_RI = self.fault.factor(activated_gate(gate_up_RGI[:, 0], spec.experts, inner), self._format(Stage.ACT))
        act_RI = factor_RI * gate_up_RGI[:, 1]
        act_RI = act_RI if inner is None else round_to(act_RI, inner)
        if self.numerics.weight_at != "act":
            return act_RI
        return act_RI * weight_R1 if inner is None else round_to(act_RI * weight_R1, inner)

    def _down(self, act_RI: torch.Tensor, expert: ExpertWeights, columns: Range, weight_R1: torch.Tensor,
              of: Product) -> torch.Tensor:
        """One rank's row as it is stored; the bias of w2 is rank 0's to add."""
        row_RH = self.fault.product(self.matmul, act_RI, expert.w2_HI[:, slice(*columns)].double().T, of)
        weighted = self.numerics.weight_at == "down"
        if expert.w2_bias_H is not None and of.rank == 0:
            bias_H = expert.w2_bias_H.double()
            if self.numerics.weight_at == "act":
                bias_H = round_to(bias_H * weight_R1, self._registers)
            row_RH = row_RH + bias_H
            row_RH = round_to(row_RH, self._registers) if weighted else row_RH
        row_RH = self.fault.row(row_RH, self._format(Stage.DOWN))
        return self._store(row_RH * weight_R1 if weighted else row_RH, Stage.DOWN)

    def _merged(self, rows_TKH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """A rank's sum over slots from the first on, as it is stored, before it travels."""
        step = self.numerics.merge or self._registers
        if self.numerics.weight_at == "merge":
            rows_TKH = round_to(rows_TKH * weights_TK[..., None], step)
        total_TH = rows_TKH[:, 0]
        for slot in range(1, rows_TKH.shape[1]):
            total_TH = round_to(total_TH + rows_TKH[:, slot], step)
        return self._store(total_TH, Stage.MERGED)

    # Ranks.

    def _outputs(self, parts_PTH: torch.Tensor, residual_TH: torch.Tensor | None) -> list[torch.Tensor]:
        """What every rank returns."""
        reduction = self.fault.reduction(self.reduction)
        totals = list(parts_PTH)
        if len(totals) > 1:
            travelling_PTH = round_to(parts_PTH, self.numerics.reduce)
            totals = list(travelling_PTH)
            if reduction is not None:
                total_TH = reduce_parts(travelling_PTH, reduction, self.numerics.reduce, self.rotation)
                totals = [total_TH] * len(totals)
        if residual_TH is not None:
            totals = [total_TH + residual_TH.double() for total_TH in totals]
        return [self.fault.output(self._store(total_TH, Stage.REDUCED)) for total_TH in totals]
