"""Sums in matrix units that keep 14 bits, as Hopper's for 8 bits do: right layers are never accused of them, whether
their sums join a register in fp32 or not, as long as they say so; what is wrong shows nevertheless.

`python -m tests.test_narrow_sums [SEEDS]` prints how near right layers come to what is allowed, and what mistakes get.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch

from moe_fast.capabilities import CAPABILITIES as MOE_FAST
from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.vocabulary import Dtype, Format, Scheme, Stage, Verdict
from moe_ref.inputs import build
from moe_ref.numerics.formats import round_to
from moe_ref.numerics.gauges import gauges
from moe_ref.numerics.narrow_sums import narrow_errors
from moe_ref.numerics.tensor_core import matmul, tensor_core
from moe_ref.records.schema import CaseLine
from moe_ref.tolerances.load import load_tolerances
from moe_ref.tolerances.quantile import tau
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import exact
from moe_ref.verify.bounds.steps import Steps
from moe_ref.verify.run.case_runner import numerics_words
from tests.in_process import judged
from tests.subjects import narrow_units as units

CHECKS = load_tolerances().file.checks
DATA = ("unit", "positive", "outlier", "zipf", "large")
SIZES = "v1-T9.H384.I256.E3.K2"


def numerics(promoted_after: int | None = None) -> Numerics:
    return Numerics(storage={}, products="fp8_row", promoted_after=promoted_after)


def model(promoted_after: int | None, hardware: str = "sm90", dtype: Dtype = Dtype.BF16) -> RoundingModel:
    declared = numerics(promoted_after)
    return RoundingModel.of(load_tolerances(), hardware, declared, dtype).of_experts(declared)


def codes(data: str, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a (16, K) and w (64, K) of numbers of e4m3, in fp64."""
    drawn = torch.Generator().manual_seed(terms)
    a, w = (torch.randn(rows, terms, generator=drawn, dtype=torch.float64) for rows in (16, 64))
    if data == "positive":
        a, w = a.abs(), w.abs()
    if data == "outlier":
        a[:, ::64] *= 64
    if data == "spikes":
        a[:, ::max(1, terms // 4)] *= 1000
    if data == "sorted":  # every block of 128 adds up, and takes it away again
        a, w = a.abs() * torch.where(torch.arange(terms) % 128 < 64, 1.0, -1.0), w.abs()
    if data == "hidden":  # large products of both signs above small ones of one
        a, w = a.abs() / 50, w.abs()
        a[:, ::16], w[:, ::32], w[:, 16::32] = 8.0, 8.0, -8.0
    return tuple(round_to(one * (448 / one.abs().amax(1, keepdim=True)), Format.E4M3) for one in (a, w))


@pytest.mark.parametrize("promoted_after", [32, 128, None])
@pytest.mark.parametrize("data", ["unit", "positive", "outlier", "spikes", "sorted", "hidden"])
@pytest.mark.parametrize("terms", [100, 1024])
def test_a_unit_errs_as_its_class_says(terms: int, data: str, promoted_after: int | None) -> None:
    """Bit by bit, on data of one sign, with outliers and of signs that lie in order: inside bound and expectation."""
    a_MK, w_NK = codes(data, terms)
    core = replace(tensor_core(load_tolerances().file.hardware["sm90"], Format.E4M3),
                   promote_every=promoted_after or 0)
    sums, judge = gauges(a_MK, w_NK, absolute=True), model(promoted_after)
    off = matmul(a_MK, w_NK.T.contiguous(), core) - sums.value
    variance, _ = judge.product_errors(a_MK, w_NK, sums, terms)
    assert bool((off.abs() <= judge.summed(sums.absolute, terms)).all())
    assert float((off / variance.sqrt()).square().mean().sqrt()) < 1
    assert float((off / variance.sqrt()).abs().max()) < CHECKS.output.sigmas_factor * tau(len(off), 1e-9) / 1.5


def test_losses_of_one_sign_are_what_is_predicted() -> None:
    """All numbers positive, so that all losses agree: the drift, which is taken off sums of errors, is their size."""
    a_MK, w_NK = codes("positive", 4096)
    core = tensor_core(load_tolerances().file.hardware["sm90"], Format.E4M3)
    sums = gauges(a_MK, w_NK, absolute=True)
    off = matmul(a_MK, w_NK.T.contiguous(), core) - sums.value
    _, drift = model(None).product_errors(a_MK, w_NK, sums, 4096)
    assert float((off / drift).min()) > 0.5
    assert float((off / drift).max()) < 1


def test_a_promoted_sum_is_bounded_by_its_blocks() -> None:
    """And a whole one by what it can lose at most, however long it is: cutting makes no partial sum larger."""
    one = torch.ones((), dtype=torch.float64)
    short, long = (float(model(128).summed(one, terms)) for terms in (128, 8192))
    assert long < short + 8192 * 2.0**-23
    assert short < 0.02
    assert [float(model(None).summed(one, terms)) < 2.1 for terms in (4096, 8192, 65536)] == [True] * 3
    assert float(model(None).summed(one, 4096)) > 0.5


def test_blocks_begin_where_the_parts_of_a_rank_do() -> None:
    """61 columns of one block and 128 of the next: the errors of two sums, each of its own."""
    a_MK, w_NK = codes("unit", 189)
    unit = model(128).accumulation
    variance, drift = narrow_errors(a_MK, w_NK, unit, 128, start=67)
    parts = [narrow_errors(a_MK[:, first:stop], w_NK[:, first:stop], unit, 128)
             for first, stop in pairwise([0, 61, 189])]
    assert torch.allclose(drift, sum(part[1] for part in parts), rtol=1e-4, atol=float(drift.abs().max()) * 1e-5)
    spread = sum(part[0] - part[1].square() for part in parts)
    assert torch.allclose(variance, spread + drift.square(), rtol=1e-3)
    nothing, _ = narrow_errors(a_MK[:, :0], w_NK[:, :0], unit, 128)
    assert nothing.shape == (16, 64)
    assert not bool(nothing.any())


def test_nothing_changes_where_units_are_not_narrow() -> None:
    """On a CPU, of int8, and of codes that are decoded first, the model is that of the case; Blackwell has 24
    bits; sums elsewhere, as of biases, stay in fp32."""
    for dtype in Dtype:
        assert model(None, "cpu", dtype) == RoundingModel.of(load_tolerances(), "cpu", numerics(), dtype)
    plain = RoundingModel.of(load_tolerances(), "sm90", numerics(), Dtype.BF16)
    assert plain.of_experts(replace(numerics(), products="int8_row")) is plain
    assert plain.of_experts(numerics(promoted_after=1)) is plain
    assert [model(128, name).is_narrow for name in ("sm80", "sm90", "sm100", "cuda")] == [False, True, False, True]
    spec = MoESpec(hidden_size=64, intermediate_size=64, router=Router(num_experts=2, top_k=1))
    steps = Steps(spec, numerics(), plain)
    found = steps.linear(exact(torch.zeros(1, 64)), torch.zeros(1, 64), exact(torch.ones(1)), Stage.DOWN,
                         steps.experts_model)
    assert float(found.bound) < 1e-4


def test_contracts_say_after_how_many_products() -> None:
    """moe_fast's sums are those of a block of scales, or of 128 products; the record says so where one is declared."""
    declared = {scheme: MOE_FAST.schemes[scheme][Dtype.BF16] for scheme in
                (Scheme.FP8_TENSOR, Scheme.FP8_ROW, Scheme.FP8_BLOCK, Scheme.MXFP8, Scheme.INT8)}
    assert [one.promoted_after for one in declared.values()] == [128, 128, 128, 32, None]
    assert numerics_words(declared[Scheme.MXFP8])["promoted_after"] == "32"
    assert "promoted_after" not in numerics_words(declared[Scheme.INT8])


# Layers.


@contextmanager
def positive() -> Iterator[None]:
    """Tokens and codes of one sign."""
    tokens, encoded = build.grid_tensor, build.encoded_matrix

    def tokens_of(name: str, kind: str, *others: object) -> torch.Tensor:
        drawn = tokens(name, kind, *others)  # type: ignore[arg-type]
        return drawn.abs() if kind == "x" else drawn

    def without_sign(*others: object) -> object:
        matrix = encoded(*others)  # type: ignore[arg-type]
        return replace(matrix, codes=(matrix.codes.view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn))

    with mock.patch.object(build, "grid_tensor", tokens_of), mock.patch.object(build, "encoded_matrix", without_sign):
        yield


def on_hopper(layer: units.NarrowUnit, sizes: str, words: str, data: str = "unit") -> CaseLine:
    name, *spread = words.split("-tp")
    shown = "" if data in ("unit", "positive") else f"-{data}"
    case_id = f"{sizes}-{name}-norm{shown}" + "".join(f"-tp{one}" for one in spread)
    with positive() if data == "positive" else nullcontext():
        return judged(layer, case_id, runs=1, hardware="sm90")


RIGHT = (
    (units.OneSum, "bf16-fp8row", "outlier"), (units.OneSum, "fp32-fp8row-tp2", "positive"),
    (units.OneSum, "bf16-fp8tensor-tp2", "zipf"), (units.HiddenOneSum, "fp32-fp8row-tp2", "unit"),
    (units.NarrowUnit, "fp32-fp8row", "positive"), (units.NarrowUnit, "bf16-fp8row-tp2", "unit"),
    (units.NarrowUnit, "fp32-fp8block-tp2", "large"), (units.NarrowUnit, "bf16-fp8block", "positive"),
    (units.NarrowUnit, "bf16-mxfp8-tp2", "outlier"), (units.NarrowUnit, "fp32-mxfp8", "zipf"),
    (units.Hidden, "bf16-fp8block", "unit"),
)


@pytest.mark.parametrize(("layer", "words", "data"), RIGHT)
def test_right_layers_pass(layer: type[units.NarrowUnit], words: str, data: str) -> None:
    line = on_hopper(layer(), SIZES, words, data)
    assert line.verdict is Verdict.PASS, line.message


@pytest.mark.parametrize(("layer", "words"), [(units.Training, "fp32-norm-tp2"), (units.Training, "bf16-norm"),
                                              (units.TrainingInOneSum, "fp32-norm"),
                                              (units.TrainingInOneSum, "bf16-norm-outlier-tp2")])
def test_right_gradients_pass(layer: type[units.Training], words: str) -> None:
    """Products of a backward pass are the unit's as well; sums of weights' gradients, routers and rows are not."""
    line = judged(layer(), f"v1-T48.H192.I160.E3.K2-{words}-bwd", runs=1, hardware="sm90")
    assert line.verdict is Verdict.PASS, line.message


def test_without_the_unit_they_would_be_accused() -> None:
    """Declared as sums in fp32, of codes that are decoded first, the same layer fails at its first product."""
    layer = units.OneSum()
    schemes = {Scheme.FP8_ROW: {Dtype.FP32: replace(layer.CAPABILITIES.schemes[Scheme.FP8_ROW][Dtype.FP32],
                                                    promoted_after=1)}}
    layer.CAPABILITIES = replace(layer.CAPABILITIES, schemes=schemes)
    line = on_hopper(layer, SIZES, "fp32-fp8row")
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.ACT), line.message


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_register_that_is_not_there_is_seen(dtype: str) -> None:
    """4096 products of one sign, in a unit that no register relieves: beyond what sums of 128 can lose."""
    line = on_hopper(units.DeclaredShorter(), "v1-T4.H4096.I32.E2.K1", f"{dtype}-fp8row", "positive")
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.ACT), line.message


MISTAKES = ((units.NextRow, "bf16-fp8row"), (units.NextRowOneSum, "bf16-fp8row"), (units.NextBlock, "bf16-fp8block"),
            (units.BlockMissing, "bf16-mxfp8"), (units.BlockMissingOneSum, "bf16-fp8row"),
            (units.BF16Register, "fp32-fp8row"))


@pytest.mark.parametrize(("layer", "words"), MISTAKES)
def test_mistakes_are_seen(layer: type[units.NarrowUnit], words: str) -> None:
    line = on_hopper(layer(), "v1-T6.H512.I256.E2.K1", words)
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.ACT), line.message


# What the documents show.

KINDS = ((units.OneSum, "fp8row"), (units.NarrowUnit, "fp8row"), (units.NarrowUnit, "fp8block"),
         (units.NarrowUnit, "mxfp8"))
SHOWN = (Stage.ACT, Stage.DOWN, Stage.OUTPUT)


def table(seeds: int) -> None:
    """Right layers by data, then mistakes."""
    print("| layer | data | judged | act | down | output |\n|---|---|---|---|---|---|")
    for layer, scheme in KINDS:
        for data in DATA:
            found, verdicts = defaultdict(float), Counter()
            for words in (f"{dtype}-{scheme}{spread}" for dtype in ("bf16", "fp32") for spread in ("", "-tp2")):
                for sizes in (SIZES.replace("T9", f"T{9 + seed}") for seed in range(seeds)):
                    line = on_hopper(layer(), sizes, words, data)
                    verdicts[line.verdict] += 1
                    for stage in line.stages:
                        found[stage.stage] = max(found[stage.stage], float(stage.ratio))
            numbers = " | ".join(f"{found[stage]:.2f}" for stage in SHOWN)
            words = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
            print(f"| {layer.__name__} {scheme} | {data} | {words} | {numbers} |", flush=True)
    print("\n| mistake | case | first stage | act | down | output |\n|---|---|---|---|---|---|")
    for layer, words, sizes, data in (
            *((layer, words, "v1-T6.H512.I256.E2.K1", "unit") for layer, words in MISTAKES),
            (units.BF16RegisterOneSum, "fp32-fp8row", "v1-T6.H512.I256.E2.K1", "unit"),
            *((units.DeclaredShorter, "fp32-fp8row", f"v1-T4.H{hidden}.I32.E2.K1", "positive")
              for hidden in (1024, 2048, 4096))):
        line = on_hopper(layer(), sizes, words, data)
        found = {stage.stage: float(stage.ratio) for stage in line.stages}
        print(f"| {layer.__name__} | {words}, {sizes.split('.')[1]}, {data} | {line.first_stage or 'none'} | "
              + " | ".join(f"{found[stage]:.2g}" for stage in SHOWN) + " |", flush=True)


if __name__ == "__main__":
    table(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
