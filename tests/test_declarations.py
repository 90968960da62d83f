"""An implementation that declares several contracts: which one a case is judged by, and what is said when none fits."""

from dataclasses import replace

import msgspec

from moe_ref.adapters.torch_grouped import GROUPED_MM
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.features import NOT_RENORMALIZED, RENORMALIZED, Feature
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage, Verdict
from tests.in_process import judged

STORED = {Stage.WEIGHTS: Format.BF16}
PLAIN = Capabilities(name="library", version="1", numerics=dict.fromkeys(Dtype, Numerics(storage={})),
                     needs=(RENORMALIZED,))
SHARED = replace(PLAIN, numerics=dict.fromkeys(Dtype, Numerics(storage=STORED)), needs=(NOT_RENORMALIZED,),
                 features=(Feature.SHARED_EXPERT,))
LIBRARY = replace(PLAIN, others=(SHARED,))


def serving(words: str) -> Capabilities:
    """The declaration for a case of these words."""
    return LIBRARY.serving(parse_case(f"v1-T9.H64.I48.E4.K2-bf16{words}"), Ranks.LOCAL, "cpu")


def refusal(words: str) -> str | None:
    """What is said of it."""
    return LIBRARY.refusal(parse_case(f"v1-T9.H64.I48.E4.K2-bf16{words}"), Ranks.LOCAL, "cpu")


def test_the_first_that_does_not_refuse() -> None:
    """A block that always renormalises and one that never does round in their own ways."""
    assert serving("-norm") is LIBRARY
    assert serving("") is SHARED
    assert serving("-sh16") is SHARED


def test_the_refusal_of_the_one_that_comes_closest() -> None:
    """Not that of the first, which may be of another architecture altogether."""
    assert refusal("-norm") is None
    assert refusal("-gelu") == "not declared: activation gelu"
    assert refusal("-norm-sh16") == "not declared: a shared expert"
    assert refusal("-sh16-res") == "not declared: a residual"
    assert PLAIN.refused_mathematics(parse_case("v1-T9.H64.I48.E4.K2-bf16").problem.spec) == [
        "a layer without renormalised weights"]


def test_it_travels_from_the_child() -> None:
    """As JSON, like every declaration."""
    assert msgspec.json.decode(msgspec.json.encode(LIBRARY), type=Capabilities) == LIBRARY


def test_a_case_is_judged_by_its_own() -> None:
    """A right layer whose second declaration is its own passes; one that declares too few roundings there does not."""
    own = replace(GROUPED_MM.CAPABILITIES, needs=(RENORMALIZED,))
    bf16 = own.numerics[Dtype.BF16]
    kept = {stage: stored for stage, stored in bf16.storage.items() if stage is not Stage.GATE_UP}
    strict = replace(own, numerics={Dtype.BF16: replace(bf16, storage=kept, activation=None)})
    for second, verdict in ((own, Verdict.PASS), (strict, Verdict.MISMATCH)):
        declared = replace(own, needs=(NOT_RENORMALIZED,), others=(second,))
        layer = replace(GROUPED_MM, CAPABILITIES=declared)
        assert judged(layer, "v1-T9.H64.I48.E4.K2-bf16-norm").verdict is verdict
