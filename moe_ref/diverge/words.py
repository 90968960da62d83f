"""The verdict on two subjects, and answers to a reader's questions, in words."""

from dataclasses import dataclass
from enum import StrEnum

from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.attribution import Cause, Finding
from moe_ref.diverge.growth import Growth, GrowthClass

_DOMINATES = 3.0
"""Ratio of two errors from which on the larger alone makes the difference."""


class Question(StrEnum):
    """What `--ask` answers of the first subject."""

    TF32 = "tf32"
    LOW_PRECISION = "low-precision"
    BUG = "bug"


@dataclass(frozen=True)
class Verdict:
    """answer: "no", "yes", or "loss" where nothing is mistaken but fewer bits are kept than fp32 sums have."""

    answer: str
    words: str


def verdict(first: str, one: Finding, second: str, other: Finding, relative: float, terms: int,
            predicted: frozenset[str] = frozenset()) -> Verdict:
    """Why two subjects differ by `relative` (rms, of the result), from what each one's own error is made of.

    predicted: names of those in whose place a model was computed.
    """
    (_, good), (worse, bad) = sorted(((first, one), (second, other)), key=lambda pair: _badness(pair[1]))
    answer = "yes" if bad.is_mistake else "loss" if Cause.LOW_PRECISION in bad.causes else "no"
    opening = {"yes": f"Yes, in {worse}: {bad.words}", "no": "No: ",
               "loss": f"No mistake, but a loss: {worse} breaks a promise of fp32 accumulation: {bad.words}"}[answer]
    if answer == "no" and relative == 0:
        opening += "they agree to the bit"
    elif answer == "no" and bad.relative > _DOMINATES * good.relative:
        opening += f"the difference is the error of {worse}, {_why(bad)}"
    elif answer == "no":
        opening += "both are about as far from the truth, each with errors of its own"
    names = [name + " (PREDICTED)" * (name in predicted) for name in (first, second)]
    parts = [f"{names[0]} and {names[1]} differ by {relative:.2g} of the result (rms) at K = {terms}.",
             f"Is it a bug? {opening}."]
    parts += [f"{name}: error {found.relative:.2g}, {found.words} ({found.evidence})."
              for name, found in ((first, one), (second, other))]
    return Verdict(answer, " ".join(parts))


def _badness(found: Finding) -> tuple[bool, bool, float]:
    return found.is_mistake, Cause.LOW_PRECISION in found.causes, found.relative


def _why(found: Finding) -> str:
    first = found.causes[0]
    return {Cause.OPERANDS: "made by the operands that it multiplies", Cause.STORE: "made by the store of its output",
            Cause.PARTIAL_SUMS: "made by storing partial sums", Cause.ORDER: "made by its order of summation",
            Cause.TRUNCATION: "made by an accumulator that cuts sums off"}.get(first, f"made by {first}")


def answer(question: Question, name: str, found: Finding, law: Growth, terms: int) -> str:
    """One sentence or two; "cannot be told" where the subject's own store or its data hide it."""
    if question is Question.BUG:
        opening = "Yes" if found.is_mistake else "No"
        return (f"Does {name} compute something else than the product at K = {terms}? {opening}: {found.words} "
                f"({found.evidence}).")
    if question is Question.TF32:
        return _tf32(name, found, terms)
    narrow = Cause.LOW_PRECISION in found.causes or law.growth_class is GrowthClass.LOW_PRECISION
    cut = law.growth_class is GrowthClass.TRUNCATING or Cause.TRUNCATION in found.causes
    question_words = f"Does {name} accumulate in less than fp32? "
    if found.is_mistake:
        return question_words + f"Cannot be told: {found.words}."
    if narrow:
        return question_words + f"Yes: {found.words}; {law.evidence} ({found.evidence})."
    if cut:
        return question_words + f"No, but its sums are cut off, not rounded: {law.evidence} ({found.evidence})."
    if law.growth_class is GrowthClass.UNCLEAR:
        return question_words + f"Nothing of the kind is seen: {law.evidence} ({found.evidence})."
    return question_words + f"No: {law.evidence} ({found.evidence})."


def _tf32(name: str, found: Finding, terms: int) -> str:
    opening = f"Does {name} multiply tf32 operands? "
    if found.is_mistake:
        return opening + f"Cannot be told: {found.words}."
    conversion = found.conversion
    if Cause.OPERANDS in found.causes and conversion.stored is Format.TF32:
        return opening + f"Yes: at K = {terms} {found.words} ({found.evidence})."
    if Cause.OPERANDS in found.causes:
        return opening + f"No, coarser ones: {found.words} ({found.evidence})."
    if not found.inputs_tell:
        return opening + "Cannot be told from these data: tf32 holds every operand; draw them in fp32 (--dtype fp32)."
    return opening + f"No: {found.words} ({found.evidence})."
