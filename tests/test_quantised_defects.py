"""Mistakes with codes and scales must be caught, on the case that owns each, at the stage where it starts.

Data whose scales are all equal hide every mistake of a scale's address, as random weights do in tests elsewhere: that
trap is shown here, and is why scales of unit data differ from all their neighbours.
"""

from dataclasses import dataclass

import pytest

from moe_ref.contract.vocabulary import Stage, Verdict
from tests.in_process import verdict
from tests.subjects import mistaken_codes, mistaken_quantisers, mistaken_scales
from tests.subjects.quantised import HiddenOperands, QuantisedMoE

WIDE, ODD = "v1-T9.H256.I256.E3.K2-bf16", "v1-T17.H160.I136.E6.K3-bf16"
"""Whole blocks of 128, and blocks of which ranks hold parts."""


@dataclass(frozen=True)
class Caught:
    """A mistake, its scheme with the words behind it, and the first failing stage."""

    name: str
    sizes: str
    words: str
    stage: Stage

    def case(self, data: str = "") -> str:
        """With data of one's own: they stand before the degrees."""
        scheme, *degrees = self.words.split("-tp")
        return "-".join([self.sizes, scheme, *([data] if data else [])]) + "".join(f"-tp{one}" for one in degrees)


ADDRESSES = (
    Caught("ScaleOfNextBlock", WIDE, "gptq32-norm", Stage.ACT),
    Caught("ScaleOfNextBlock", WIDE, "mxfp8-norm", Stage.ACT),
    Caught("ScaleOfNextBlock", WIDE, "fp8block-norm", Stage.ACT),
    Caught("ScaleOfNextRow", WIDE, "fp8row-norm", Stage.ACT),
    Caught("ScaleOfNextRow", WIDE, "mxfp4-norm", Stage.ACT),
    Caught("ScaleOfNextRow", WIDE, "fp8block-norm", Stage.ACT),
    Caught("ScaleOfRowBefore", WIDE, "int8-norm", Stage.ACT),
    Caught("ScaleOfNextExpert", WIDE, "fp8tensor-norm", Stage.ACT),
    Caught("ScaleOfNextExpert", WIDE, "int8-norm", Stage.ACT),
    Caught("TailOfNextExpert", WIDE, "nvfp4-norm", Stage.ACT),
    Caught("UpScalesForGate", WIDE, "fp8tensor-norm", Stage.ACT),
    Caught("UpScalesForGate", WIDE, "awq-norm", Stage.ACT),
    Caught("FirstScaleOfAll", WIDE, "gptq32-norm", Stage.ACT),
    Caught("RunsForGroups", WIDE, "gptqorder32-norm", Stage.ACT),
    Caught("HalfOfTheShuffle", WIDE, "gptq-norm", Stage.ACT),
    Caught("LocalWidthForTheWhole", ODD, "gptq-norm-tp2", Stage.ACT),
    Caught("LocalWidthForTheWhole", ODD, "awq32-norm-tp8", Stage.ACT),
    Caught("ActOrderScalesByRank", WIDE, "gptqorder32-norm-tp2", Stage.DOWN),
    Caught("GroupSizeFromShapes", WIDE, "gptq32-norm-tp2", Stage.DOWN),
    Caught("ScalesByRankTimesWidth", ODD, "mxfp4-norm-tp8", Stage.DOWN),
    Caught("ShardBeginsABlock", ODD, "awq32-norm-tp2", Stage.DOWN),
    Caught("ShardBeginsABlock", ODD, "fp8block-norm-tp3", Stage.DOWN),
)

VALUES = (
    Caught("CutAfterThePermutation", WIDE, "gptqorder32-norm-tp2", Stage.DOWN),
    Caught("ScalesLeftAsTheyCame", WIDE, "fp8block-norm-tp2-ep2-tokensep", Stage.PERMUTE_SCALES),
    Caught("NibblesSwapped", ODD, "gptq32-norm", Stage.ACT), Caught("NibblesSwapped", ODD, "nvfp4-norm", Stage.ACT),
    Caught("AWQOrderForPlain", ODD, "awq-norm", Stage.ACT),
    Caught("ZerosOffByOne", ODD, "gptq-norm", Stage.ACT), Caught("ZerosOffByOne", ODD, "awq-norm", Stage.ACT),
    Caught("UnsignedBytes", ODD, "int8-norm", Stage.ACT),
    Caught("WrongTableEntry", ODD, "mxfp4-norm", Stage.ACT), Caught("WrongTableEntry", ODD, "nvfp4-norm", Stage.ACT),
    Caught("E5M2ForE4M3", ODD, "fp8row-norm", Stage.ACT), Caught("BiasOfFNUZ", ODD, "fp8block-norm", Stage.ACT),
    Caught("Bias126", ODD, "mxfp4-norm", Stage.ACT), Caught("Bias126", ODD, "mxfp8-norm", Stage.ACT),
    Caught("SecondScaleInverted", ODD, "nvfp4-norm", Stage.ACT),
    Caught("TinyScalesFlushed", ODD, "fp8row-norm-extreme", Stage.ACT),
    Caught("TinyScalesFlushed", ODD, "gptq32-norm-extreme", Stage.ACT),
    Caught("ScalesThroughHalf", ODD, "fp8block-norm", Stage.ACT),
    Caught("ScalesThroughHalf", ODD, "gptq-norm-extreme", Stage.ACT),
    Caught("ScaleOfTheTensor", ODD, "fp8row-norm", Stage.PERMUTE_SCALES),
    Caught("ScaleOfTheTensor", ODD, "mxfp8-norm", Stage.PERMUTE_SCALES),
    Caught("ScaleOfTheRow", ODD, "fp8block-norm", Stage.PERMUTE_SCALES),
    Caught("ScaleOfTheRow", ODD, "mxfp8-norm", Stage.PERMUTE_SCALES),
    Caught("ScalesRoundedDown", ODD, "mxfp8-norm", Stage.PERMUTE_SCALES),
    Caught("FixedScaleMissing", ODD, "fp8tensor-norm", Stage.PERMUTE_SCALES),
    Caught("NotSaturating", ODD, "fp8tensor-norm", Stage.PERMUTE_CODES),
    Caught("CodesCutOff", ODD, "fp8row-norm", Stage.PERMUTE_CODES),
    Caught("CodesCutOff", ODD, "mxfp8-norm", Stage.PERMUTE_CODES),
    Caught("RoundedTwice", ODD, "fp8row-norm", Stage.PERMUTE_CODES),
    Caught("RoundedTwice", ODD, "fp8block-norm", Stage.PERMUTE_CODES),
    Caught("RowsAsE5M2", ODD, "fp8block-norm", Stage.PERMUTE_CODES),
    Caught("BlocksBeginWithTheShard", WIDE, "fp8block-norm-tp3", Stage.DOWN),
    Caught("NotPromoted", WIDE, "fp8row-norm", Stage.ACT), Caught("NotPromoted", WIDE, "fp8tensor-norm", Stage.ACT),
)

MISTAKES = {name: one for module in (mistaken_scales, mistaken_codes, mistaken_quantisers)
            for name, one in vars(module).items()
            if isinstance(one, type) and issubclass(one, QuantisedMoE) and one.__module__ == module.__name__}


def _name(caught: Caught) -> str:
    return f"{caught.name}-{caught.words}"


@pytest.mark.sampled(every=3, each="caught.name")
@pytest.mark.parametrize("caught", ADDRESSES + VALUES, ids=_name)
def test_a_mistake_is_caught_where_it_starts(caught: Caught) -> None:
    line = verdict(MISTAKES[caught.name](), caught.case())
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, caught.stage), line.message


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("case", sorted({caught.case() for caught in ADDRESSES + VALUES}))
def test_the_right_layer_passes_the_same_case(case: str) -> None:
    """So that it is the mistake that was caught, not the case."""
    line = verdict(QuantisedMoE(), case)
    assert line.verdict == Verdict.PASS, line.message


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("caught", ADDRESSES, ids=_name)
def test_equal_scales_hide_a_wrong_address(caught: Caught) -> None:
    """The trap: the same mistake on the same case with equal scales is not there to be seen."""
    line = verdict(MISTAKES[caught.name](), caught.case("equal"))
    assert line.verdict == Verdict.PASS, line.message


def hiding(one: type[QuantisedMoE]) -> QuantisedMoE:
    """The same layer with its codes and scales of rows hidden."""
    return type(one.__name__, (one,), {"shows_operands": False})()


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("caught", [one for one in VALUES if one.stage in QuantisedMoE().shows[-4:]], ids=_name)
def test_a_wrong_quantiser_shows_in_what_follows(caught: Caught) -> None:
    """With hidden codes it is the activation that cannot come from right ones."""
    line = verdict(hiding(MISTAKES[caught.name]), caught.case())
    assert line.verdict == Verdict.MISMATCH, line.message


def test_every_mistake_is_tried() -> None:
    assert {caught.name for caught in ADDRESSES + VALUES} == set(MISTAKES)
    assert issubclass(MISTAKES["BlocksBeginWithTheShard"], HiddenOperands)
