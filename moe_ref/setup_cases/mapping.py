"""Which mistaken mapping of weights, routing or options explains the output of a subject."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.routing import Routing
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.vocabulary import Stage
from moe_ref.inputs.build import Inputs
from moe_ref.verify.bounds.output import output_bound
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.diagnosis.diagnose import FAULTS, LEAST_SHARE, MOST_OF_NEXT, Candidate, Comparison, named_order
from moe_ref.verify.diagnosis.known import Known
from moe_ref.verify.diagnosis.layer import Layer
from moe_ref.verify.diagnosis.mapping_faults import MAPPING_FAULTS, OF_ADAPTERS
from moe_ref.verify.diagnosis.placed import placed
from moe_ref.verify.measure.placing import RankTensors

Whose = Literal["adapter", "kernel"]

_NAMES = 2
"""Mistakes that predict the same and are named together."""


@dataclass(frozen=True)
class Explained:
    """A mistake in words, whose it usually is, the share of the difference that it explains, and what is left of it
    over what is allowed (NaN where that was not asked).
    """

    fault: str
    whose: Whose
    share: float
    left: float

    @property
    def words(self) -> str:
        """As a message says it."""
        whole = "all" if self.share > 0.999 else f"{100 * self.share:.1f} %"
        leaves = "" if math.isnan(self.left) else f" and leaves {self.left:.2g} of what is allowed"
        return f"{self.fault}, which explains {whole} of the difference{leaves}"


def explained(case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics,
              model: RoundingModel) -> Explained | None:
    """The mistake that explains the output, from the layer's inputs alone; None where none does, or more than one.

    A mistake is named where it explains more than 0.9 and what is left of the difference is within the bound of the
    right layer; or, as the diagnosis of a mismatch does, where no mistake that predicts something else explains half.
    """
    comparison = _comparison(case, inputs, ranks, numerics)
    if comparison is None:
        return None
    allowed_TH = _allowed(comparison.right, model)
    found = [_Form(one, candidate, _left(comparison, candidate, allowed_TH)) for one in (*MAPPING_FAULTS, *FAULTS)
             if (candidate := comparison.best_form(one)) is not None and candidate.share > 0]
    best = max(found, key=lambda form: form.candidate.share, default=None)
    if best is None or best.candidate.share <= LEAST_SHARE:
        order = named_order(comparison)
        return Explained(order.fault, "adapter", order.share, math.nan) if order else None
    whole = [one for one in found if one.left <= 1 and one.candidate.share > LEAST_SHARE]
    if not whole:
        same = [one for one in found if comparison.alike(one.candidate, best.candidate)]
        if any(one.candidate.share >= MOST_OF_NEXT for one in found if one not in same):
            return None
        whole = same
    return _named(whole)


@dataclass(frozen=True)
class _Form:
    fault: type[Layer]
    candidate: Candidate
    left: float

    @property
    def whose(self) -> Whose:
        return "adapter" if self.fault in OF_ADAPTERS and not self.candidate.local else "kernel"


def _named(forms: list[_Form]) -> Explained:
    """An adapter's mistakes before a kernel's that predict the same."""
    of_adapter = [one for one in forms if one.whose == "adapter"] or forms
    best = max(of_adapter, key=lambda form: form.candidate.share)
    named = " or ".join(one.candidate.fault for one in of_adapter[:_NAMES])
    return Explained(named, best.whose, best.candidate.share, best.left)


def _comparison(case: Case, inputs: Inputs, ranks: list[RankTensors], numerics: Numerics) -> Comparison | None:
    """The output beside that of the right layer; None where nothing finite differs."""
    shares, stage = rank_shares(case), Stage.REDUCED
    known = Known(case, inputs, numerics, shares, {})
    right = Layer(known)
    shown, wanted = placed(stage, ranks, case, shares, torch.empty(0)), right.shown(stage)
    there = ~shown.isnan() & wanted.isfinite()
    if not shown[there].isfinite().all() or torch.equal(shown[there], wanted[there]):
        return None
    return Comparison(known, right, stage, shown, wanted, there)


def _allowed(right: Layer, model: RoundingModel) -> torch.Tensor:
    """What an element of the right output may be off, (T, H); routing weights are taken as exact."""
    inputs, spec, numerics = right.inputs, right.spec, right.known.numerics
    routing = Routing(right.stage(Stage.IDS), right.stage(Stage.WEIGHTS), shared_TS=right.routed[2])
    _, bound_TH = output_bound(inputs.x_TH, routing, inputs.weights, spec, numerics, model)
    return bound_TH


def _left(comparison: Comparison, candidate: Candidate, allowed_TH: torch.Tensor) -> float:
    """The largest error / allowed that a mistake leaves."""
    error = comparison.error(candidate.predicted).abs()
    return float((error / allowed_TH.clamp(min=torch.finfo(torch.float32).tiny)).nan_to_num(0.0).max())

