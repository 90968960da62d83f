"""Right layers over encoded experts must pass; an accusation here is a defect of the harness.

The plain one runs the whole pairwise cover of the quick tier; layers that hide, round, store or join otherwise run
parts of it, and everyone meets data that the cover has not: numbers that are not finite.
"""

from itertools import cycle

import pytest

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme, Verdict
from moe_ref.tiers.encoded import SCHEMES, encoded_cases
from tests.in_process import judged
from tests.subjects.quantised import PRODUCTS
from tests.subjects.quantised_variants import RIGHT

COVER: tuple[Case, ...] = tuple(case for case, _ in encoded_cases("quick"))
EVERY = 6
"""A variant runs every sixth case of its schemes, each from another one on."""

GROUPED = tuple(scheme for scheme, one in ENCODINGS.items() if one.rows == 1 and one.columns)
ROUNDED = (*PRODUCTS, Scheme.INT8)
SCHEMES_OF = {
    "Int8Rows": (Scheme.INT8,), "Int8Reciprocals": (Scheme.INT8,), "ScaledOperands": ROUNDED,
    **dict.fromkeys(("Reciprocals", "Fused", "HiddenFused", "ScalesTogether", "SmallerSteps"), tuple(PRODUCTS)),
    "HiddenOperands": tuple(PRODUCTS), "ShuffledScales": GROUPED}
"""Of variants that are the plain layer in other schemes."""

KINDS = (("bf16", "", "-tp3"), ("fp16", "zipf-", ""), ("fp32", "empty-", "-tp2"), ("bf16", "allone-", "-tp8"),
         ("fp32", "", "-tp2-ep2"))
NON_FINITE = tuple(f"v1-T17.H160.I136.E6.K3-{dtype}-{scheme}-norm-{pattern}nonfinite{spread}"
                   for scheme, (dtype, pattern, spread) in zip(SCHEMES, cycle(KINDS), strict=False))
TRAVELLING = tuple(f"v1-T17.H160.I136.E6.K3-{words}" for words in (
    "bf16-fp8block-norm-tp2-ep2-tokensep", "fp32-mxfp8-norm-zipf-ep2-tokensep", "fp16-fp8row-norm-sh136-ep4-tokensep"))


def _cases() -> list[tuple[str, str]]:
    found = [("QuantisedMoE", format_case(case)) for case in COVER]
    found += [("QuantisedMoE", case) for case in NON_FINITE]
    found += [("TravellingCodes", case) for case in TRAVELLING]
    for first, (name, schemes) in enumerate(SCHEMES_OF.items()):
        own = [format_case(case) for case in COVER if case.problem.scheme in schemes]
        found += [(name, case) for case in own[first % EVERY::EVERY]]
    return found


LAYERS = {name: one() for name, one in RIGHT.items()}


@pytest.mark.sampled(every=12)
@pytest.mark.parametrize(("name", "case_id"), _cases())
def test_a_right_layer_passes(name: str, case_id: str) -> None:
    line = judged(LAYERS[name], case_id, runs=1)
    assert line.verdict == Verdict.PASS, line.message


def test_all_of_them_are_tried() -> None:
    assert {*SCHEMES_OF, "QuantisedMoE", "TravellingCodes"} == set(RIGHT)
    assert {case.problem.scheme for case in COVER} == set(SCHEMES)


@pytest.mark.parametrize("scheme", PRODUCTS)
def test_codes_are_judged_where_they_are_shown(scheme: Scheme) -> None:
    """And only there; so layers with and without them have been judged."""
    shown, hidden = (judged(LAYERS[name], f"v1-T9.H96.I257.E5.K1-bf16-{scheme}-norm", runs=1)
                     for name in ("QuantisedMoE", "HiddenOperands"))
    stages = {"permute_scales", "permute_codes", "act_scales", "act_codes"}
    assert stages <= {one.stage for one in shown.stages}
    assert not stages & {one.stage for one in hidden.stages}
