"""Power of a case: by what factor mistakes built in here would exceed what is allowed, where they would be seen.

    zeros        everything is zero
    k_tile       64 products of the up projection are lost in its last 64 columns, in one expert
    w_1ulp       one routing weight is off by one unit of bf16
    tp_partial   one expert's rows are missing from the sum of one tp rank
    store_rz     stores are cut off instead of rounded

Each is measured as the subject would be, with the wanted values changed as the mistake changes them. One expert stands
for all: that with the most rows. A mistake that a case cannot have, or that no shown stage is meant to see, is absent.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import replace

import torch

from moe_ref.contract.shares import RankShare
from moe_ref.contract.vocabulary import Data, Format, Stage
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.build import Inputs
from moe_ref.numerics.formats import round_to, unit_in_last_place
from moe_ref.records.schema import from_number
from moe_ref.verify.bounds.output_chain import ExpertRows
from moe_ref.verify.bounds.rows import Partials, Rows, exact
from moe_ref.verify.bounds.steps import Steps
from moe_ref.verify.measure.measurement import Mutant
from moe_ref.verify.measure.output_statistics import OutputStatistics
from moe_ref.verify.measure.routing import FollowedRouting, tainted_tokens
from moe_ref.verify.measure.stage_meter import Place, StageMeter

BLOCK = 64
"""Products that a sum loses, and columns that lose them."""
_NEGLIGIBLE = 2.0**-40
"""Mean square of a token's output over the largest: below it the token was left without weight."""
SAMPLED_ROWS = 8
"""Rows of each stage whose stores are looked at."""


class Mutants:
    """Collects the factors of one case while its rows pass by; `found` has those that exist.

    shown: stages that the subject shows. meters: of which the thresholds are taken, and nothing is changed. signal:
    root mean square of a token's output over that of what is allowed, the median of tokens.
    """

    def __init__(self, inputs: Inputs, steps: Steps, shares: tuple[RankShare, ...], followed: FollowedRouting,
                 meters: Mapping[Stage, StageMeter], shown: Container[Stage]) -> None:
        self.inputs, self.steps, self.shares, self.meters, self.shown = inputs, steps, shares, meters, shown
        self.followed, self.found = followed, dict[str, Mutant]()
        self.expert, self.token, self.slot = _busiest(inputs, followed)
        # Of sums whose rows are hidden, errors before the store may be as large as what the store cuts off.
        self.cut_stages = [stage for stage in (Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.MERGED)
                           if stage in shown and self._rounds_once(stage)
                           and (stage is not Stage.MERGED or Stage.DOWN in shown)]
        self.weighs_rows = (steps.numerics.weight_at == "down" and not steps.on_input and steps.spec.router is not None
                            and not self._hides_stores(Stage.DOWN))
        self.signal, self.lost_parts = math.inf, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
        self.widest = max(shares, key=lambda share: share.columns[1] - share.columns[0])
        self.at_output: dict[str, torch.Tensor] = {}

    def weights(self, want: Rows) -> None:
        """w_1ulp where weights are shown; want: (T, K) as they are stored."""
        if self.expert is None:
            return
        want = want.rows(slice(self.token, self.token + 1)).columns(self.slot, self.slot + 1)
        stored = want.value if want.stored is None else round_to(want.value, want.stored)
        # Away from the truth: towards it a store may already be off by half of it.
        unit = unit_in_last_place(stored, Format.BF16) * torch.where(stored < want.value, -1.0, 1.0)
        self._keep("w_1ulp", self._missed(Stage.WEIGHTS, stored + unit, want, Place(0, None)), Stage.WEIGHTS)

    def block_lost(self, token_R: torch.Tensor, expert: ExpertWeights, real: ExpertRows, weight: Rows) -> None:
        """k_tile in the rows of this expert, at the first stage that shows it."""
        steps, spec = self.steps, self.steps.spec
        tile = slice(max(0, spec.intermediate_size - BLOCK), spec.intermediate_size)
        block = slice(max(0, spec.hidden_size - BLOCK), spec.hidden_size)
        x_RH = steps.tokens(self.inputs.x_TH[token_R], weight).value[:, block]
        gate_up, act = (rows.columns(tile.start, tile.stop) for rows in (real.gate_up, real.act))
        place, changed_RGI = Place(0, token_R), gate_up.value.clone()
        changed_RGI[:, -1] -= x_RH @ expert.w13_GIH[-1, tile, block].double().T
        if Stage.GATE_UP in self.shown:
            self._rows_changed("k_tile", Stage.GATE_UP, changed_RGI[:, -1], gate_up.mapped(lambda one: one[:, -1]),
                               place)
            return
        act_RI = steps.act(exact(changed_RGI), spec.experts, steps.act_weight(weight)).value
        if Stage.ACT in self.shown:
            self._rows_changed("k_tile", Stage.ACT, act_RI, act, place)
            return
        row_RH = (act_RI - act.value) @ expert.w2_HI[:, tile].double().T
        joined = steps.on_input or steps.act_weight(weight) is not None
        self._output_changed("k_tile", token_R, row_RH if joined else weight.value * row_RH)

    def part_lost(self, token_R: torch.Tensor, first_R: torch.Tensor, parts: list[Rows], reduces_rows: bool) -> None:
        """tp_partial: rows of this expert as each tp rank adds them; the sum that those of the first rank join.

        The widest rank's are lost; reduces_rows: there is one sum for all.
        """
        lost = self.widest.tp_rank
        self.lost_parts.append((token_R, first_R if reduces_rows else first_R + lost, self._halved(parts[lost].value)))

    def stored(self, stage: Stage, want: Rows, place: Place) -> None:
        """store_rz in the first rows of each stage, and w_1ulp in rows that are stored with their weight."""
        if self.expert is None or place.expert not in (None, self.expert) or place.token_R is None:
            return
        if stage in self.cut_stages and want.stored is not None:
            some = slice(0, SAMPLED_ROWS)
            rows, at = want.rows(some), replace(place, token_R=place.token_R[some])
            cut = round_to(rows.value, want.stored, "truncate")
            # Sums of nothing are no sample.
            if not torch.equal(cut, round_to(rows.value, want.stored)):
                self.cut_stages.remove(stage)
                self._rows_changed("store_rz", stage, cut, rows, at)
        if stage is Stage.DOWN and self.weighs_rows and bool((at_R := place.token_R == self.token).any()):
            self.weighs_rows = False
            weight = self.followed.weights.value[self.token, self.slot]
            factor = 1 + unit_in_last_place(weight, Format.BF16) / weight.abs()
            if bool(torch.isfinite(factor)):
                rows, at = want.rows(at_R), replace(place, token_R=place.token_R[at_R])
                self._rows_changed("w_1ulp", stage, factor * rows.value, rows, at)

    def merged(self, sums: Partials) -> None:
        """tp_partial where partial sums are shown; else it is left to the output."""
        for token_R, sum_R, part_RH in self.lost_parts:
            if Stage.MERGED not in self.shown:
                columns = range(*self.widest.outputs)
                whole_RH = torch.zeros(len(token_R), sums.value.shape[-1], dtype=torch.float64)
                whole_RH[:, columns.start:columns.stop] = part_RH
                self._output_changed("tp_partial", token_R, whole_RH)
                continue
            want = Rows(sums.value[sum_R, token_R], sums.bound[sum_R, token_R], sums.variance[sum_R, token_R],
                        None if sums.unrounded is None else sums.unrounded[sum_R, token_R], sums.stored)
            want = want.masked(~self.followed.judged_T[token_R, None]).columns(*self.widest.outputs)
            self._rows_changed("tp_partial", Stage.MERGED, want.value - part_RH, want, Place(0, token_R))

    def output(self, judged: Rows, statistics: OutputStatistics) -> None:
        """What only the output shows: at its elements or by its statistics; see OutputStatistics.finish."""
        self.signal = self._signal(judged)
        for name, error_TH in self.at_output.items():
            token_R = error_TH.any(-1).nonzero().flatten()
            if not len(token_R):
                continue
            self._rows_changed(name, Stage.OUTPUT, (judged.value + error_TH)[token_R], judged.rows(token_R),
                               Place(0, token_R))
            # The sign is that of the subject's own output, which the mistake would have changed.
            for one in (one for one in statistics.finish(judged, error_TH) if one.name != "sign"):
                self._keep(name, from_number(one.value) / from_number(one.allowed), f"{Stage.OUTPUT} {one.name}")

    def _signal(self, judged: Rows) -> float:
        assert judged.variance is not None
        size_T = torch.nan_to_num(judged.value, nan=0.0, posinf=0.0, neginf=0.0).square().mean(-1)
        # A token that a capacity has left with hardly any weight says nothing of the others.
        seen_T = size_T > _NEGLIGIBLE * size_T.max() if len(size_T) else size_T > 0
        own_T = self.followed.judged_T & ~tainted_tokens(self.inputs) & seen_T
        if self.expert is None or not bool(own_T.any()):
            return math.inf
        known_TH = torch.isfinite(judged.bound) & torch.isfinite(judged.variance)
        allowed_TH = torch.minimum(judged.bound, self.meters[Stage.OUTPUT].sigmas_allowed * judged.variance.sqrt())
        value_T, allowed_T = (torch.where(known_TH, one, 0.0)[own_T].square().sum(-1)
                              for one in (judged.value, allowed_TH))
        # Where every element may be anything, there is no signal.
        return float(torch.where(allowed_T > 0, value_T / allowed_T, 0.0).median().sqrt())

    def _rounds_once(self, stage: Stage) -> bool:
        """Whether a stage is stored in fewer bits than sums have, and nothing that it is made of is, and hidden."""
        inner = {Stage.ACT: self.steps.numerics.activation, Stage.MERGED: self.steps.numerics.merge}.get(stage)
        if stage is not Stage.MERGED and self.steps.experts_model.is_narrow:
            return False  # what the unit leaves of a sum may be off by as much as a store that cuts off
        return self._narrow(self.steps.stored_in(stage)) and not self._narrow(inner) and not self._hides_stores(stage)

    def _hides_stores(self, stage: Stage) -> bool:
        """Whether something that a stage is made of is stored in fewer bits than sums have, and not shown."""
        steps, weighted = self.steps, [Stage.PERMUTE, Stage.WEIGHTS]
        early = weighted if steps.on_input else []
        made_of = {Stage.GATE_UP: early, Stage.DOWN: [Stage.ACT, Stage.WEIGHTS],
                   Stage.ACT: [Stage.GATE_UP, *(weighted if steps.numerics.weight_at == "act" else early)],
                   Stage.MERGED: [Stage.DOWN, *[Stage.SHARED] * (steps.spec.shared is not None)]}
        return any(self._narrow(steps.stored_in(one)) for one in made_of[stage]
                   if one is Stage.PERMUTE or one not in self.shown)

    def _narrow(self, stored: Format | None) -> bool:
        formats, sums = self.steps.model.tolerances.file.formats, self.steps.numerics.accumulate
        return stored is not None and formats[stored].significand_bits < formats[sums].significand_bits

    def _halved(self, addend: torch.Tensor) -> torch.Tensor:
        shared = self.steps.spec.shared
        return addend / 2 if shared is not None and shared.merge == "mean" else addend

    def _output_changed(self, name: str, token_R: torch.Tensor, change_RH: torch.Tensor) -> None:
        error_TH = self.at_output.setdefault(name, torch.zeros(self.inputs.x_TH.shape, dtype=torch.float64))
        error_TH[token_R] += change_RH

    def _rows_changed(self, name: str, stage: Stage, changed: torch.Tensor, want: Rows, place: Place) -> None:
        """A change of nothing is no mistake."""
        if not torch.equal(changed, want.value):
            self._keep(name, self._missed(stage, changed, want, place), stage)

    def _missed(self, stage: Stage, changed: torch.Tensor, want: Rows, place: Place) -> float:
        """Largest error / allowed of the changed values as they would be stored."""
        meter = self.meters[stage]
        probe = StageMeter(stage, meter.num_columns, meter.largest, meter.tainted_T, meter.sigmas_allowed,
                           meter.whole_layer)
        probe.add(changed if want.stored is None else round_to(changed, want.stored), want, place)
        return probe.ratio

    def _keep(self, name: str, factor: float, where: str) -> None:
        if name not in self.found or factor > self.found[name].factor:
            self.found[name] = Mutant(factor, str(where))


def _busiest(inputs: Inputs, followed: FollowedRouting) -> tuple[int | None, int, int]:
    """The expert whose judged rows weigh most, and token and slot of that with the largest weight: a store can show it.

    Expert None without any such row, or where exact results need no power.
    """
    there_TK = (followed.judged_T & ~tainted_tokens(inputs))[:, None] & (followed.ids_TK >= 0)
    there_TK = there_TK & (followed.ids_TK < inputs.problem.spec.num_experts)
    if inputs.problem.data is Data.EXACT or not bool(there_TK.any()):
        return None, 0, 0
    weight_TK = torch.nan_to_num(followed.weights.value.abs(), nan=0.0)
    # Rows of hardly any weight are lost in a sum that is right without them.
    expert = int(torch.bincount(followed.ids_TK[there_TK], weight_TK[there_TK]).argmax())
    own_TK = torch.where(there_TK & (followed.ids_TK == expert), weight_TK, -1.0)
    token, slot = divmod(int(own_TK.argmax()), own_TK.shape[1])
    return expert, token, slot


def zeros(meters: Mapping[Stage, StageMeter], shown: Container[Stage]) -> float:
    """By what factor an all-zero result would miss its bound; see Measurement."""
    if not meters[Stage.OUTPUT].num_checked:
        return torch.inf
    chain = [meters[stage].power for stage in (Stage.ACT, Stage.DOWN, Stage.MERGED) if stage in shown]
    weakest = min([*chain, meters[Stage.REDUCED].power]) if len(chain) == 3 else 0.0
    return max(weakest, meters[Stage.OUTPUT].power)
