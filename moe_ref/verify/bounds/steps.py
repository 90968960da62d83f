"""The steps of a layer with the error of each, under one rounding contract: what both chains are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from moe_ref.contract.capabilities import ROUNDED_OPERANDS, Numerics
from moe_ref.contract.spec import MLP, MoESpec
from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.contract.weights import ExpertWeights, WeightSource
from moe_ref.inputs.build import Inputs
from moe_ref.numerics.accumulation import ROUNDING
from moe_ref.numerics.gauges import gauges_and_products
from moe_ref.numerics.magnitudes import Left, nonnegative_product
from moe_ref.verify.bounds.activation import activated
from moe_ref.verify.bounds.operands import RULES, OperandRule, rounded_rows, scale_variance
from moe_ref.verify.bounds.rounding import FLUSH, RoundingModel
from moe_ref.verify.bounds.rows import DownRows, Rows, exact, relative_variance, total_drift, total_variance
from moe_ref.verify.decoded import DecodedWeights

SCALED = 3
"""Roundings beside those of the sum, of products whose scales join afterwards: both scales, and the sum times them."""


@dataclass(frozen=True)
class EncodedOperands:
    """Whether weights are encoded, and the scales that are fixed for rows: by expert (None: shared), and product."""

    is_encoded: bool = False
    fixed_scales: Mapping[tuple[int | None, bool], float] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs) -> "EncodedOperands":
        """What the decoded weights of a case say."""
        weights = inputs.weights
        return cls(True, weights.fixed_scales) if isinstance(weights, DecodedWeights) else PLAIN


PLAIN = EncodedOperands()


@dataclass(frozen=True)
class Steps:
    """Each step takes rows with the bound of their error and returns rows with theirs."""

    spec: MoESpec
    numerics: Numerics
    model: RoundingModel
    encoded: EncodedOperands = PLAIN

    def stored_in(self, stage: Stage) -> Format | None:
        """The declared format of a stage; None while it stays in registers."""
        return self.numerics.storage.get(stage)

    def stored(self, rows: Rows, stage: Stage) -> Rows:
        """Rows after the store of a stage."""
        return self.stored_as(rows, self.stored_in(stage))

    def stored_as(self, rows: Rows, stored: Format | None) -> Rows:
        """Rows after a store in a format, or as they are."""
        if stored is None:
            return Rows(rows.value, rows.bound, rows.variance, drift=rows.drift)
        variance = total_variance(rows.variance, self.model.stored_variance(rows.value, stored))
        return Rows(rows.value, rows.bound + self.model.rounded(rows.largest, stored), variance, rows.variance, stored,
                    rows.drift)

    @cached_property
    def experts_model(self) -> RoundingModel:
        """The model of the products of experts, whose operands may be codes."""
        return self.model.of_experts(self.numerics)

    @property
    def on_input(self) -> bool:
        """Whether the routing weight multiplies the tokens."""
        return self.spec.weight_on == "input"

    @property
    def weighs_later(self) -> bool:
        """Whether the routing weight multiplies down rows after they were stored."""
        return self.numerics.weight_at == "merge" and not self.on_input

    def tokens(self, x_RH: torch.Tensor, weight: Rows) -> Rows:
        """What the first product of routed experts takes: the token, times its weight where the spec says so."""
        if not self.on_input:
            return exact(x_RH)
        return self.stored(self.product(exact(x_RH), weight, None), Stage.PERMUTE)

    def product(self, rows: Rows, factor: Rows, rounded_to: Format | None) -> Rows:
        """factor * rows: one product, rounded to a format or kept in the accumulation format."""
        value = factor.value * rows.value
        error = factor.value.abs() * rows.bound + factor.bound * rows.largest
        error = error + self.model.evaluation_unit * (value.abs() + error)
        variance = None
        if rows.variance is not None and factor.variance is not None:
            variance = (factor.value.square() * rows.variance + factor.variance * (rows.value.square() + rows.variance)
                        + ROUNDING * self.model.evaluation_unit**2 * value.square() + FLUSH**2)
        drift = None if rows.drift is None else factor.value * rows.drift
        return self.stored_as(Rows(value, error, variance, drift=drift), rounded_to)

    def rule(self, expert: int | None, is_first: bool, start: int = 0) -> OperandRule | None:
        """How the rows of an expert's first or second product are rounded before it; None: they are not.

        expert: None for the shared one. start: the column of the whole matrix at which the rank's part begins.
        """
        rule = RULES.get(self.numerics.products)
        if rule is None or not self.encoded.is_encoded:
            return rule
        return replace(rule.at(start), fixed=self.encoded.fixed_scales.get((expert, is_first)))

    def _product(self, rows: Rows, w_NK: torch.Tensor, bias: Rows | None, stage: Stage, rule: OperandRule | None,
                 given: Rows | None) -> Rows:
        """linear of operands as they are multiplied; codes of encoded weights already are 8 bits wide.

        given: the rows as they are multiplied, where that is known.
        """
        if rule is None:
            return self.linear(rows, w_NK, bias, stage)
        weight = exact(w_NK) if self.encoded.is_encoded else rounded_rows(exact(w_NK), rule)
        taken = rounded_rows(rows, rule) if given is None else given
        start = rule.start if rule.columns else 0
        found = self.linear(taken, weight.value, bias, stage, self.experts_model, start)
        if bool(weight.bound.any()):
            found = _with_weight_errors(found, taken, weight)
        if found.variance is None or given is not None:
            return found
        return replace(found, variance=found.variance + scale_variance(rows, rule) * found.value.square())

    def linear(self, rows: Rows, w_NK: torch.Tensor, bias: Rows | None, stage: Stage,
               model: RoundingModel | None = None, start: int = 0) -> Rows:
        """rows @ w^T + bias before the store of `stage`; a bias may be added to the product once stored.

        model: of the sum; start: how far inside a block of it the first product lies.
        """
        model = model or self.model
        terms = max(1, w_NK.shape[1]) + SCALED * (self.numerics.products in ROUNDED_OPERANDS)
        lost, lost_later = (float(one.summed(torch.ones((), dtype=torch.float64), terms + (bias is not None)))
                            for one in (model, self.model))
        carried = [Left.of(rows.bound + lost * rows.largest, 1)]
        if rows.variance is not None and bool(rows.variance.any()):
            carried.append(Left.of(rows.variance, 2))
        sums, products = gauges_and_products(rows.value, w_NK, carried, model.accumulation.truncates)
        bound = products[0] + (terms + 1) * FLUSH
        own, own_drift = model.product_errors(rows.value, w_NK, sums, terms, start)
        variance = total_variance(None if rows.variance is None else own, *products[1:])
        carried_drift = None if rows.drift is None else rows.drift @ w_NK.double().T
        drift = total_drift(own_drift, carried_drift)
        if bias is None:
            return Rows(sums.value, bound, variance, drift=drift)
        bound = bound + bias.bound + lost_later * bias.largest
        before = self.model.rounded(sums.value.abs() + bound, self.stored_in(stage))
        value = sums.value + bias.value
        joined = self.model.stored_variance(sums.value, self.stored_in(stage)) + ROUNDING * (
            self.model.accumulation.unit * value).square()
        return Rows(value, bound + before, total_variance(variance, bias.variance, joined), drift=drift)

    def gate_up(self, tokens: Rows, expert: ExpertWeights, number: int | None, operand: Rows | None = None) -> Rows:
        """Both projections as they are stored, (R, G, I).

        number: of the expert, None for the shared one. operand: the tokens as they are multiplied, where that is known.
        """
        w_NH, shape = expert.w13_GIH.flatten(0, 1), expert.w13_GIH.shape[:2]
        bias = None if expert.w13_bias_GI is None else exact(expert.w13_bias_GI.flatten())
        product = self._product(tokens, w_NH, bias, Stage.GATE_UP, self.rule(number, True), operand)
        rows = self.stored(product, Stage.GATE_UP)
        return rows.mapped(lambda one: one.unflatten(1, shape))

    def act(self, gate_up: Rows, mlp: MLP, weight: Rows | None = None) -> Rows:
        """The activation as it is stored, (R, I); times `weight` where the routing weight joins there.

        Whether it is stored before that as well is not declared: it may be.
        """
        rows = self.stored(activated(self.model, gate_up, mlp, self.numerics.activation), Stage.ACT)
        if weight is None:
            return rows
        return self.stored(self.product(rows, weight, self.numerics.activation), Stage.ACT)

    def act_weight(self, weight: Rows) -> Rows | None:
        """The weight that routed activations are multiplied with; None where it joins elsewhere."""
        return weight if self.numerics.weight_at == "act" and not self.on_input else None

    def down(self, act: Rows, expert: ExpertWeights, weight: Rows, adds_bias: bool, number: int | None, start: int,
             operand: Rows | None = None) -> DownRows:
        """Routed rows of one rank from its activation; weighted before or after the store, or there.

        number, start: of the expert, and its column at which the activation begins. operand: as in gate_up.
        """
        joined = self.on_input or self.numerics.weight_at == "act"
        bias = None if expert.w2_bias_H is None or not adds_bias else exact(expert.w2_bias_H)
        if bias is not None and joined:
            bias = self.product(bias, weight, None)
        rows = self._product(act, expert.w2_HI, bias, Stage.DOWN, self.rule(number, False, start), operand)
        if joined:
            stored = self.stored(self._sharing_weight(rows, weight), Stage.DOWN)
            return DownRows(stored, stored)
        return self._weighted(rows, weight)

    def _sharing_weight(self, rows: Rows, weight: Rows) -> Rows:
        """Rows after a product whose operands hold their weight: its error is the same in all terms, and adds up.

        Of a weight on the tokens by as much as the activation and up, of at most third degree together, follow it.
        """
        if rows.variance is None:
            return rows
        degree = 3.0 if self.on_input else 1.0
        return replace(rows, variance=rows.variance + relative_variance(weight) * (degree * rows.value).square())

    def identity(self, x_RH: torch.Tensor, weight: Rows, is_first: bool) -> DownRows:
        """Rows of an identity expert: the weighted token on rank 0, nothing on the others."""
        if not is_first:
            nothing = exact(torch.zeros_like(x_RH))
            return DownRows(nothing, nothing)
        if self.numerics.weight_at == "act":
            stored = self.stored(self.weigh(exact(x_RH), weight), Stage.DOWN)
            return DownRows(stored, stored)
        return self._weighted(exact(x_RH), weight)

    def _weighted(self, rows: Rows, weight: Rows) -> DownRows:
        if self.numerics.weight_at == "merge":
            stored = self.stored(rows, Stage.DOWN)
            return DownRows(stored, self.weigh(stored, weight))
        stored = self.stored(self.weigh(rows, weight), Stage.DOWN)
        return DownRows(stored, stored)

    def weigh(self, rows: Rows, weight: Rows) -> Rows:
        """weight * rows, rounded as the merge declares."""
        return self.product(rows, weight, self.numerics.merge)

    def shared(self, act: Rows, expert: ExpertWeights, gate: Rows | None, adds_bias: bool, start: int) -> Rows:
        """Rows of a shared expert on one rank as they are stored, times its sigmoid gate if it has one."""
        bias = None if expert.w2_bias_H is None or not adds_bias else exact(expert.w2_bias_H)
        rows = self._product(act, expert.w2_HI, bias, Stage.SHARED, self.rule(None, False, start), None)
        if gate is None:
            return self.stored(rows, Stage.SHARED)
        if self.numerics.weight_at != "down":
            # Whether the gate comes before or after the store, or between two, is not declared: allow for all.
            rows = self.stored(rows, Stage.SHARED)
        return self.stored(self.weigh(rows, gate), Stage.SHARED)

    def shared_blocks(self, acts: list[Rows], w2_HIs: list[torch.Tensor], gates: list[Rows]) -> Rows:
        """Shared experts of which each has a weight of its own.

        Released code weights activations, rows of each, or one fused row; all of them are allowed for: two stores
        of the weighted activation, three of each row, and their sum in the format of the merge.
        """
        total = None
        gauge = squares = torch.zeros((), dtype=torch.float64, device=gates[0].value.device)
        for act, w2_HI, gate in zip(acts, w2_HIs, gates, strict=True):
            weighted = self.weigh(act, gate)
            weighted = self.stored(self.stored(weighted, Stage.ACT), Stage.ACT)
            product = self._product(weighted, w2_HI, None, Stage.SHARED, self.rule(None, False), None)
            rows = self._sharing_weight(product, gate)
            stores = 1 + 2 * gate.largest.clamp(min=1.0)
            half = self.model.rounded(rows.largest, self.stored_in(Stage.SHARED))
            one = self.model.stored_variance(rows.value, self.stored_in(Stage.SHARED)) * stores.square()
            rows = Rows(rows.value, rows.bound + half * stores, total_variance(rows.variance, one))
            gauge, squares = gauge + rows.largest, squares + rows.value.square()
            total = rows if total is None else Rows(total.value + rows.value, total.bound + rows.bound,
                                                    total_variance(total.variance, rows.variance))
        assert total is not None
        variance = total_variance(total.variance, self.additions(total.value, squares, len(gates)))
        return self.stored(Rows(total.value, self.summed(total.bound, gauge, len(gates)), variance), Stage.SHARED)

    def shared_gate(self, x_TH: torch.Tensor, weights: WeightSource) -> Rows:
        """sigmoid(x @ shared_gate^T), (T, 1)."""
        assert weights.shared_gate_SH is not None
        logit = self.stored(self.linear(exact(x_TH), weights.shared_gate_SH, None, Stage.LOGITS), Stage.LOGITS)
        value_T1 = torch.sigmoid(logit.value)
        units = self.model.tolerances.file.evaluations.score.units + logit.value.abs()
        evaluated_T1 = value_T1 * units * self.model.evaluation_unit
        error_T1 = value_T1 * torch.expm1(2 * logit.bound) + evaluated_T1
        slope_T1 = value_T1 * (1 - value_T1)
        variance = None if logit.variance is None else (
            slope_T1.square() * logit.variance + self.model.evaluated(evaluated_T1))
        return self.stored_as(Rows(value_T1, error_T1, variance), self.stored_in(Stage.WEIGHTS))

    def summed(self, bound: torch.Tensor, gauge: torch.Tensor, num_addends: int) -> torch.Tensor:
        """Error of a running sum whose absolute addends, errors included, sum up to `gauge`."""
        if self.numerics.merge is None:
            return bound + self.model.summed(gauge, num_addends)
        error = torch.zeros_like(bound)
        for _ in range(num_addends):
            error = error + self.model.rounded(gauge + error, self.numerics.merge)
        return bound + error

    def additions(self, total: torch.Tensor, squares: torch.Tensor, num_addends: int) -> torch.Tensor:
        """Expected square of the roundings of a running sum, and of its first addend where it is stored too."""
        model, merge = self.model, self.numerics.merge
        added = model.additions_variance(total, squares, num_addends, merge or self.numerics.accumulate,
                                         largest_first=True)
        if merge is None:
            return added
        return added + ROUNDING * 4.0**-model.tolerances.file.formats[merge].significand_bits * squares


def _with_weight_errors(product: Rows, rows: Rows, weight: Rows) -> Rows:
    """rows @ weight^T with what two right quantisers of the weight differ by."""
    bound = product.bound + nonnegative_product(rows.largest, weight.bound, 1)
    if product.variance is None or weight.variance is None:
        return replace(product, bound=bound)
    variance = product.variance + nonnegative_product(rows.value.square(), weight.variance, 1)
    return replace(product, bound=bound, variance=variance)
