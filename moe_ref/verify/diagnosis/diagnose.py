"""Which fault explains a mismatch: every one that a case can have is computed and compared with what the subject shows.

A fault is named where the subject is so near to a layer with it that little is left, and far from all with others.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.vocabulary import Stage
from moe_ref.inputs.build import Inputs
from moe_ref.verify.diagnosis.activation_faults import ACTIVATION_FAULTS
from moe_ref.verify.diagnosis.encoded_faults import ENCODED_FAULTS
from moe_ref.verify.diagnosis.expert_faults import EXPERT_FAULTS
from moe_ref.verify.diagnosis.known import ORDER, Known
from moe_ref.verify.diagnosis.layer import Layer
from moe_ref.verify.diagnosis.parallel_faults import PARALLEL_FAULTS
from moe_ref.verify.diagnosis.placed import placed
from moe_ref.verify.diagnosis.router_faults import ROUTER_FAULTS
from moe_ref.verify.diagnosis.shared_faults import SHARED_FAULTS
from moe_ref.verify.measure.placing import RankTensors, over_all_tokens, servers

FAULTS = ROUTER_FAULTS + ACTIVATION_FAULTS + EXPERT_FAULTS + SHARED_FAULTS + PARALLEL_FAULTS + ENCODED_FAULTS

LEAST_SHARE, MOST_OF_NEXT = 0.9, 0.5
"""What a named fault explains at least, and what the next best that predicts something else must stay below."""

SAME_PREDICTION = 0.05
"""Faults whose predictions differ by less than this part of the error are one to a reader of the numbers."""

LARGEST_CASE, LARGEST_WEIGHTS, MOST_EXPERTS = 2**22, 2**23, 64
"""Products of one projection, elements of w2 and experts of a case: some hundred layers of it take about a second."""

MOST_MATCHED_ROWS = 1024
"""Rows of which each is compared with every other."""

_ROW_STAGES = (Stage.GATE_UP, Stage.ACT, Stage.DOWN)
_COLUMNS = 16
"""Columns of the narrowest tile that has a fault of its own."""

_NAMES = 2
"""Faults that predict the same and are named together."""


@dataclass(frozen=True)
class Diagnosis:
    """The fault in words, the share of the error that it explains, and that of the next best."""

    fault: str
    share: float
    next_share: float


@dataclass(frozen=True)
class Candidate:
    """A fault in words, the failing stage of a layer with it, the share of the error that it explains, and whether it
    holds in some experts, rows or columns only.
    """

    fault: str
    predicted: torch.Tensor
    share: float
    local: bool = False


def diagnosable(case: Case) -> bool:
    """Whether the candidates of a case are computed in about a second."""
    spec = case.problem.spec
    weights = spec.hidden_size * spec.intermediate_size
    return (case.problem.num_tokens * spec.top_k * weights <= LARGEST_CASE and spec.num_experts <= MOST_EXPERTS
            and spec.num_experts * weights <= LARGEST_WEIGHTS)


def diagnose(case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics,
             failing: Stage) -> Diagnosis | None:
    """The one fault that explains what every rank showed at the failing stage, or None.

    The share is 1 - |shown - predicted| / |shown - right|, of all numbers that are finite. Where the subject shows what
    is not, and should not, nothing is explained. Everything is fp64.
    """
    stage = Stage.REDUCED if failing is Stage.OUTPUT else failing
    if stage not in ORDER or stage not in ranks[0]:
        return None
    comparison = Comparison.of(case, inputs, ranks, numerics, failing)
    if comparison is None:
        return None
    return named(comparison, list(comparison.candidates())) or named_order(comparison)


@dataclass(frozen=True)
class Comparison:
    """The failing stage as it is shown and as it should be, both as `placed`; compared: where both are finite."""

    known: Known
    right: Layer
    stage: Stage
    shown: torch.Tensor
    wanted: torch.Tensor
    compared: torch.Tensor

    @classmethod
    def of(cls, case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics,
           failing: Stage) -> "Comparison | None":
        """None where nothing finite is wrong, or what is wrong is not finite."""
        stage = Stage.REDUCED if failing is Stage.OUTPUT else failing
        known, server_TK = _known(case, inputs, ranks, numerics, failing)
        right = Layer(known)
        shown, wanted = placed(stage, ranks, case, known.shares, server_TK), right.shown(stage)
        ones = [{stage: torch.ones_like(tensors[stage])} for tensors in ranks]
        there = placed(stage, ones, case, known.shares, server_TK).isfinite() & wanted.isfinite()
        if not shown[there].isfinite().all() or torch.equal(shown[there], wanted[there]):
            return None
        return cls(known, right, stage, shown, wanted, there)

    def error(self, predicted: torch.Tensor) -> torch.Tensor:
        """Differences from what is shown, zero where nothing is compared."""
        return torch.where(self.compared, self.shown - predicted, 0.0)

    def share(self, predicted: torch.Tensor) -> float:
        """Of the error that a prediction explains."""
        return 1.0 - float(self.error(predicted).norm() / self.error(self.wanted).norm())

    def alike(self, one: Candidate, other: Candidate) -> bool:
        """Whether a reader of the numbers cannot tell them apart."""
        differs = torch.where(self.compared, one.predicted - other.predicted, 0.0).norm()
        return bool(differs <= SAME_PREDICTION * self.error(self.wanted).norm())

    def candidates(self) -> Iterator[Candidate]:
        """The best form of every fault that comes no later than the failing stage."""
        return filter(None, map(self.best_form, FAULTS))

    def best_form(self, fault: type[Layer]) -> Candidate | None:
        """The one of its forms that explains most; None where the case can have none, or a later stage is failing."""
        if ORDER.index(fault.first) > ORDER.index(self.stage):
            return None
        forms = [form for variant in fault.variants(self.known) for form in self.forms(fault, variant)
                 if form.predicted[self.compared].isfinite().all()]
        return max(forms, key=lambda form: form.share, default=None)

    def forms(self, fault: type[Layer], variant: object) -> Iterator[Candidate]:
        """One form of a fault, everywhere and where it fits."""
        layer, words = fault(self.known, self.right, variant), fault.words.format(variant)
        everywhere = layer.shown(self.stage)
        yield Candidate(words, everywhere, self.share(everywhere))
        if fault.local and self.stage in _ROW_STAGES:
            yield self.in_rows(words, everywhere, fault.local)
            if fault.in_tiles:
                yield from self.in_columns(words, everywhere)
        elif fault.local and Stage.DOWN not in self.known.given and ORDER.index(self.stage) > ORDER.index(Stage.DOWN):
            yield from self.in_one_expert(words, layer)
        if fault.local == "row" and self.stage in (Stage.MERGED, Stage.REDUCED):
            yield self.in_rows(words, everywhere, fault.local)

    def in_rows(self, words: str, everywhere: torch.Tensor, unit: str) -> Candidate:
        """The fault in those rows, or those experts, that are nearer to it than to what is right."""
        axis = 1 if self.stage not in (Stage.GATE_UP, Stage.ACT) else 0
        squares_R, right_R = (self.error(one).square().transpose(0, axis).flatten(1).sum(1)
                              for one in (everywhere, self.wanted))
        fits_R = squares_R < right_R
        where = f", in {int(fits_R.sum())} of {len(fits_R)} rows"
        if unit == "expert":
            fits_R, where = self.fitting_experts(squares_R, right_R)
        at = fits_R.view(-1, *(1,) * (everywhere.dim() - 1)).transpose(0, axis)
        predicted = torch.where(at, everywhere, self.wanted)
        return Candidate(words + where, predicted, self.share(predicted), bool(where))

    def fitting_experts(self, squares_R: torch.Tensor, right_R: torch.Tensor) -> tuple[torch.Tensor, str]:
        """Rows of the experts that as a whole are nearer to the fault, and which these are."""
        fits_R, experts = torch.zeros(len(squares_R), dtype=torch.bool), []
        for e, row_R in self.right.rows_of:
            if squares_R[row_R].sum() < right_R[row_R].sum():
                fits_R[row_R] = True
                experts.append(e)
        return fits_R, self.named_experts(experts)

    def named_experts(self, experts: list[int]) -> str:
        """Where a fault is, unless it is in all."""
        if len(experts) == len(self.right.rows_of):
            return ""
        return f", in expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts[:4]))}" + (
            f" and {len(experts) - 4} more" if len(experts) > 4 else "")

    def in_columns(self, words: str, everywhere: torch.Tensor) -> Iterator[Candidate]:
        """The fault in some tiles of columns, the same of some experts, that are nearer to it than to what is right."""
        axis = 1 if self.stage is Stage.DOWN else 0
        rows, width = everywhere.shape[axis], everywhere.shape[-1]
        squares_RN, right_RN = (_by_tile(self.error(one).square().transpose(0, axis).reshape(rows, -1, width).sum(1))
                                for one in (everywhere, self.wanted))
        fits_EN = torch.stack([squares_RN[row_R].sum(0) < right_RN[row_R].sum(0) for _, row_R in self.right.rows_of])
        fits_E, fits_N = fits_EN.any(1), fits_EN.any(0)
        if bool(fits_N.all()) or not torch.equal(fits_EN, fits_E[:, None] & fits_N) or not bool(fits_N.any()):
            return
        at_RC = torch.zeros(rows, width, dtype=torch.bool)
        column_C = fits_N.repeat_interleave(_COLUMNS)[:width]
        for fits, (_, row_R) in zip(fits_E.tolist(), self.right.rows_of, strict=True):
            at_RC[row_R] = column_C & fits
        at = at_RC if everywhere.dim() == 2 else at_RC[:, None].transpose(0, axis)
        predicted = torch.where(at, everywhere, self.wanted)
        experts = [e for fits, (e, _) in zip(fits_E.tolist(), self.right.rows_of, strict=True) if fits]
        first, last = column_C.nonzero()[[0, -1], 0].tolist()
        whole = int(column_C.sum()) == last - first + 1
        where = f", in columns {first} to {last}" if whole else f", in {int(column_C.sum())} of {width} columns"
        yield Candidate(words + self.named_experts(experts) + where, predicted, self.share(predicted), True)

    def in_one_expert(self, words: str, layer: Layer) -> Iterator[Candidate]:
        """The fault in each expert alone, where its rows are not shown and their sums are."""
        right_PRH, wrong_PRH = self.right.stage(Stage.DOWN), layer.stage(Stage.DOWN)
        for e, row_R in self.right.rows_of:
            down_PRH = right_PRH.clone()
            down_PRH[:, row_R] = wrong_PRH[:, row_R]
            given = {**self.known.given, Stage.IDS: self.right.stage(Stage.IDS), Stage.DOWN: down_PRH,
                     Stage.WEIGHTS: self.right.stage(Stage.WEIGHTS), Stage.SHARED: self.right.stage(Stage.SHARED)}
            predicted = Layer(replace(self.known, given=given)).shown(self.stage)
            yield Candidate(f"{words}, in expert {e}", predicted, self.share(predicted), True)


def _by_tile(squares_RC: torch.Tensor) -> torch.Tensor:
    """Sums over tiles of columns, the last of which may be narrower."""
    return torch.stack([part.sum(1) for part in squares_RC.split(_COLUMNS, 1)], 1)


def named(comparison: Comparison, candidates: list[Candidate]) -> Diagnosis | None:
    """The best candidate, with others that predict the same; None where another explains much, too."""
    best = max(candidates, key=lambda one: one.share, default=None)
    if best is None or best.share <= LEAST_SHARE:
        return None
    same, other = [best], []
    for one in candidates:
        if one is not best:
            (same if comparison.alike(one, best) else other).append(one)
    next_share = max((one.share for one in other), default=0.0)
    if next_share >= MOST_OF_NEXT or len(same) > _NAMES:
        return None
    return Diagnosis(" or ".join(one.fault for one in same), best.share, max(0.0, next_share))


def named_order(comparison: Comparison) -> Diagnosis | None:
    """Right rows in another order, which has too many forms to try: each row is matched with the nearest right one."""
    if comparison.stage in ORDER[:3] or not comparison.compared.all():
        return None
    shown, wanted = comparison.shown, comparison.wanted
    if comparison.stage in (Stage.GATE_UP, Stage.ACT):
        shown, wanted = shown.flatten(1)[None], wanted.flatten(1)[None]
    if shown.shape[1] > MOST_MATCHED_ROWS:
        return None
    nearest_PR = torch.cdist(shown, wanted).argmin(2)
    rows_R = torch.arange(nearest_PR.shape[1])
    if (nearest_PR == rows_R).all() or not torch.equal(nearest_PR.sort(1).values, rows_R.expand_as(nearest_PR)):
        return None
    moved = wanted.gather(1, nearest_PR[..., None].expand_as(wanted)).view_as(comparison.wanted)
    share = comparison.share(moved)
    return Diagnosis("right rows in another order", share, 0.0) if share > LEAST_SHARE else None


def _known(case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics,
           failing: Stage) -> tuple[Known, torch.Tensor]:
    """What the subject rightly showed before the failing stage, and which ep rank serves each slot.

    The output is judged from the layer's inputs, so that only the choice of experts is taken from the subject.
    """
    shares = rank_shares(case)
    routing = over_all_tokens(ranks, shares, case.problem.num_tokens)[0]
    known = Known(case, inputs, numerics, shares, {})
    before = [stage for stage in ORDER[:ORDER.index(failing)] if stage in ranks[0] and stage is not Stage.REDUCED]
    if failing is Stage.OUTPUT:
        before = [stage for stage in before if stage is Stage.IDS]
    given: dict[Stage, torch.Tensor] = {}
    if Stage.IDS in before:
        given[Stage.IDS] = routing[Stage.IDS].long()
    ids_TK = given.get(Stage.IDS, torch.zeros(case.problem.num_tokens, case.problem.spec.top_k, dtype=torch.int64))
    server_TK = servers(ids_TK, case, shares)
    for stage in before:
        if stage in (Stage.LOGITS, Stage.WEIGHTS):
            given[stage] = routing[stage].double()
        elif stage is not Stage.IDS:
            shown = placed(stage, ranks, case, shares, server_TK)
            given[stage] = torch.where(shown.isnan(), Layer(replace(known, given=dict(given))).stage(stage), shown)
    return replace(known, given=given), server_TK
