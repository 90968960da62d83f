"""Protects attribution: every cause of a divergence is named, whatever the length of sums, and no right sum accused."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.attribution import Cause, Finding, attribute
from moe_ref.diverge.growth import Growth, GrowthClass
from moe_ref.diverge.problem import GroupedProblem
from moe_ref.diverge.subjects import Place, find_subject
from moe_ref.diverge.truth import Bench
from moe_ref.diverge.words import Question, answer, verdict
from moe_ref.numerics.formats import round_to

LENGTHS = (256, 2048, 14336)


@cache
def bench(terms: int, dtype: Format = Format.FP32, tp: int = 1) -> Bench:
    """Four experts of unequal load."""
    return Bench(GroupedProblem(terms=terms, rows=24, columns=32, dtype=dtype, tp=tp))


@cache
def finding(name: str, terms: int, dtype: Format = Format.FP32, tp: int = 1) -> Finding:
    """What is found of one subject."""
    where = bench(terms, dtype, tp)
    return attribute(find_subject(name, dtype, Place()).run(where.problem, where.operands)[0], where)


@cache
def right(terms: int, dtype: Format) -> torch.Tensor:
    """A right product: fp32 sums of blocks."""
    where = bench(terms, dtype)
    return find_subject("model:blocked:ieee", dtype, Place()).run(where.problem, where.operands)[0]


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("terms", LENGTHS)
@pytest.mark.parametrize("name", ["model:sequential:ieee", "model:reversed:ieee", "model:pairwise:ieee",
                                  "model:split_k:ieee", "model:shuffled:ieee", "torch:loop"])
def test_orders_of_summation_are_nothing_else(name: str, terms: int) -> None:
    """fp32 sums of fp32 operands, rounded to nearest, in whatever order."""
    found = finding(name, terms)
    assert found.causes == (Cause.ORDER,)
    assert found.sigmas < 1.2


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("terms", LENGTHS)
@pytest.mark.parametrize(("name", "words"), [
    ("model:blocked:tf32-rounded", "tf32 operands (or fp16, which looks the same)"),
    ("model:blocked:tf32-cut", "tf32 operands, cut off"), ("model:blocked:bf16", "bf16 operands"),
    ("model:blocked:fp8", "e4m3 operands"), ("model:sm90:tf32", "tf32 operands, cut off")])
def test_operands_of_lower_precision(name: str, words: str, terms: int) -> None:
    """The error is the counterfactual's, with factor one; rounding and cutting off are told apart."""
    found = finding(name, terms)
    assert found.causes[0] is Cause.OPERANDS
    assert found.words.startswith(f"it multiplies {words}")
    assert found.operands.rho2 > 0.99
    assert found.operands.beta == pytest.approx(1, abs=0.06)


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("terms", LENGTHS)
@pytest.mark.parametrize("name", ["model:sequential-fp16:bf16", "model:sequential-bf16:bf16",
                                  "model:pairwise-fp16:bf16", "model:sm90-fp16:fp16"])
def test_low_precision_accumulation(name: str, terms: int) -> None:
    """The level gives the bits, the output grid the format."""
    dtype = Format(name.rpartition(":")[2])
    found = finding(name, terms, dtype)
    assert found.causes == (Cause.LOW_PRECISION,)
    assert 9.5 < found.bits < 17
    assert found.grid is (Format.BF16 if "-bf16" in name else Format.FP16)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("terms", LENGTHS[1:])
@pytest.mark.parametrize("name", ["model:sm80:fp16", "model:sm90:fp16"])
def test_truncating_accumulation(name: str, terms: int) -> None:
    """Errors towards zero, larger than rounding to nearest makes them, and no larger than cutting can."""
    found = finding(name, terms, Format.FP16)
    assert found.causes == (Cause.TRUNCATION,)
    assert found.share < -0.7


def test_a_cut_that_is_smaller_than_rounding_is_no_cause() -> None:
    """Short sums on tensor cores err less than fp32 additions do: nothing is there to be told."""
    assert finding("model:sm90:fp16", 256, Format.FP16).causes == (Cause.ORDER,)


def test_positive_data_tell_a_cut_narrow_accumulator() -> None:
    """fp8 tensor cores look like any narrow accumulator on symmetric data; the class of growth settles it."""
    where = bench(2048, Format.E4M3)
    y_RN = find_subject("model:sm90:fp8", Format.E4M3, Place()).run(where.problem, where.operands)[0]
    assert attribute(y_RN, where).causes == (Cause.LOW_PRECISION,)
    assert attribute(y_RN, where, GrowthClass.TRUNCATING).causes == (Cause.TRUNCATION,)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("terms", LENGTHS)
@pytest.mark.parametrize("stored", [Format.BF16, Format.FP16])
def test_rounding_of_the_output(stored: Format, terms: int) -> None:
    """A store rounded to nearest, and one that is cut off, which is called so."""
    y_RN, where = right(terms, Format.BF16), bench(terms, Format.BF16)
    rounded = attribute(round_to(y_RN, stored), where)
    assert rounded.causes[0] is Cause.STORE
    assert rounded.words.startswith(f"it rounds the output to {stored}")
    cut = attribute(round_to(y_RN, stored, "truncate"), where)
    assert cut.causes[0] is Cause.STORE
    assert cut.words.startswith(f"it cuts the output off to {stored}, not rounding it")


@pytest.mark.sampled(every=3, each="name")
@pytest.mark.parametrize("terms", LENGTHS)
@pytest.mark.parametrize("name", ["torch:loop", "moe_fast:bf16"])
def test_rounding_of_partial_sums(name: str, terms: int) -> None:
    """Four ranks hand on bf16: the partial sums' stores make the error, not the last one."""
    found = finding(name, terms, Format.BF16, 4)
    assert found.causes[0] is Cause.PARTIAL_SUMS
    assert found.words.startswith("the partial sums of ranks are rounded to bf16")


def dropped(where: Bench, y_RN: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """The last 64 terms are missing in a rectangle."""
    tail = where.operands.rank_part(where.problem.terms - 64, where.problem.terms)
    missing_RN = torch.cat([tail.x_RK[start:stop].double() @ tail.w_ENK[e].double().T
                            for e, start, stop in where.operands.groups()])
    wrong_RN = y_RN.clone()
    wrong_RN[rows, columns] -= missing_RN[rows, columns]
    return wrong_RN


def neighbour(where: Bench, y_RN: torch.Tensor) -> torch.Tensor:
    """Row 5, of expert 0, meets the weights of expert 1."""
    wrong_RN = y_RN.clone()
    wrong_RN[5] = where.operands.w_ENK[1].double() @ where.operands.x_RK[5].double()
    return wrong_RN


def exchanged(where: Bench, y_RN: torch.Tensor) -> torch.Tensor:
    """Columns 3 and 4 change places."""
    columns = list(range(32))
    columns[3:5] = 4, 3
    return y_RN[:, columns]


def zeroed(where: Bench, y_RN: torch.Tensor) -> torch.Tensor:
    """A tile of columns was never written."""
    return torch.cat([y_RN[:, :16], torch.zeros_like(y_RN[:, 16:])], 1)


EVERYTHING = slice(None)
MISTAKES: dict[str, tuple[Callable[[Bench, torch.Tensor], torch.Tensor], str, str]] = {
    "block": (lambda where, y_RN: dropped(where, y_RN, EVERYTHING, EVERYTHING), "are missing", "everywhere"),
    "block of a tile": (lambda where, y_RN: dropped(where, y_RN, EVERYTHING, slice(0, 16)), "are missing",
                        "columns 0-15"),
    "block of an expert": (lambda where, y_RN: dropped(where, y_RN, slice(*where.operands.groups()[1][1:]), EVERYTHING),
                           "are missing", "expert 1"),
    "neighbour": (neighbour, "weights of expert 1 in place of 0", "expert 0, rows 5"),
    "columns": (exchanged, "columns are exchanged: 3 holds 4, 4 holds 3", "columns 3-4"),
    "scale": (lambda where, y_RN: y_RN * (1 + 2.0**-7), "the result is scaled by 1.007", "everywhere"),
    "zeros": (zeroed, "the result is missing", "columns 16-31"),
}


@pytest.mark.sampled(every=3, each="mistake")
@pytest.mark.parametrize("terms", LENGTHS)
@pytest.mark.parametrize("dtype", [Format.FP32, Format.BF16])
@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_named_and_located(mistake: str, dtype: Format, terms: int) -> None:
    """Through a bf16 store as well; terms, experts, rows and columns are those of the mistake."""
    make, words, place = MISTAKES[mistake]
    found = attribute(round_to(make(bench(terms, dtype), right(terms, dtype)), dtype), bench(terms, dtype))
    assert found.causes[0] is Cause.MISTAKE, found.words
    assert words in found.words
    assert f"({place})" in found.words
    if "missing" in words and mistake.startswith("block"):
        assert f"terms {terms - 64}-{terms - 1} of the sum" in found.words


def test_what_nothing_explains_is_not_called_rounding() -> None:
    """Noise of a tenth of the result in one expert's rows has no name, and is accused with its place."""
    where, y_RN = bench(2048), right(2048, Format.FP32).clone()
    _, start, stop = where.operands.groups()[2]
    noise = torch.randn(y_RN[start:stop].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y_RN[start:stop] += 0.1 * noise
    found = attribute(y_RN, where)
    assert found.causes[0] is Cause.UNEXPLAINED
    assert "(expert 2)" in found.words


LAW = Growth(0.0, 0.0, (15.0, 16.0), GrowthClass.UNCLEAR, "no curve")


def test_verdicts_on_pairs() -> None:
    """The answer follows from what each of two errors is made of, not from the size of the difference."""
    order, other = finding("torch:loop", 14336), finding("model:split_k:ieee", 14336)
    tf32, narrow = finding("model:sm90:tf32", 14336), finding("model:sequential-fp16:bf16", 14336, Format.BF16)
    wrong = attribute(zeroed(bench(14336), right(14336, Format.FP32)), bench(14336))
    assert verdict("a", order, "b", other, 1e-7, 14336).answer == "no"
    with_tf32 = verdict("a", order, "b", tf32, 7e-4, 14336)
    assert with_tf32.answer == "no"
    assert "the difference is the error of b, made by the operands that it multiplies" in with_tf32.words
    assert verdict("a", narrow, "b", tf32, 2e-3, 14336).answer == "loss"
    accused = verdict("a", wrong, "b", narrow, 0.7, 14336)
    assert accused.answer == "yes"
    assert "Yes, in a: the result is missing (columns 16-31)" in accused.words
    assert "agree to the bit" in verdict("a", order, "b", order, 0.0, 14336).words


@pytest.mark.parametrize(("question", "name", "dtype", "start"), [
    (Question.TF32, "model:sm90:tf32", Format.FP32, "Yes"), (Question.TF32, "torch:loop", Format.FP32, "No"),
    (Question.TF32, "model:blocked:bf16", Format.FP32, "No, coarser ones"),
    (Question.TF32, "model:sequential:bf16", Format.BF16, "Cannot be told from these data"),
    (Question.LOW_PRECISION, "model:sequential-fp16:bf16", Format.BF16, "Yes"),
    (Question.LOW_PRECISION, "torch:loop", Format.FP32, "Nothing of the kind"),
    (Question.BUG, "torch:loop", Format.FP32, "No")])
def test_questions_are_answered(question: Question, name: str, dtype: Format, start: str) -> None:
    """One sentence, which says so where the data cannot tell."""
    words = answer(question, name, finding(name, 2048, dtype), LAW, 2048)
    assert words.partition("? ")[2].startswith(start)
