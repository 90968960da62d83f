"""Protects the fingerprint: an accumulator is recognised as what it is, and no right order of fp32 sums as another."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from moe_ref.cli.main import cli
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics import summation
from moe_ref.numerics.fingerprint import Fingerprint, Matmul, classify, fingerprint, matching
from moe_ref.numerics.formats import round_to
from moe_ref.numerics.tensor_core import TensorCore, matmul, tensor_core, tf32x3_matmul, with_fp16_accumulator
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify import hardware
from moe_ref.verify.hardware import hardware_class, simulated_class

HARDWARE = load_tolerances().file.hardware
FP32_SUM = Fingerprint(Format.BF16, 8, "none", 24, "nearest", 0, 0)
"""What bf16 operands leave where every addition is rounded to fp32."""


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("name", ["sm80", "sm90", "sm100"])
def test_a_simulated_class_is_recognised_as_itself(name: str) -> None:
    """By tf32, 16-bit and 8-bit operands together, and every number of its entry is found."""
    found, one = simulated_class(name), HARDWARE[name]
    assert found.name == name
    tf32, fp16, bf16, e4m3 = found.fingerprints
    wide = (one.significand_bits, "truncate", one.kept_bits)
    assert tf32 == Fingerprint(Format.FP32, 11, one.tf32_operands, *wide, one.tf32_products_per_step)
    assert fp16 == Fingerprint(Format.FP16, 11, "none", *wide, one.products_per_step)
    assert bf16 == Fingerprint(Format.BF16, 8, "none", *wide, one.products_per_step)
    assert e4m3 == Fingerprint(Format.E4M3, 4, "none", one.fp8_significand_bits, "truncate", one.fp8_kept_bits,
                               one.fp8_products_per_step)


@pytest.mark.parametrize("operand", [Format.TF32, Format.E5M2])
def test_other_operands_name_the_class_too(operand: Format) -> None:
    """Numbers that are tf32 already, and the second 8-bit format."""
    found = fingerprint(partial(matmul, core=tensor_core(HARDWARE["sm80"], operand)), operand)
    assert matching(found, HARDWARE) == ("sm80",)


def test_classes_that_differ_in_fp8_alone_need_fp8() -> None:
    """Hopper and Blackwell add 16-bit operands alike: no class is named, and none where fingerprints disagree."""
    hopper = simulated_class("sm90").fingerprints
    assert matching(hopper[2], HARDWARE) == ("sm90", "sm100")
    assert classify(hopper[:3], HARDWARE) == ""
    assert classify(hopper[3:], HARDWARE) == "sm90"
    assert classify([hopper[0], simulated_class("sm80").fingerprints[1]], HARDWARE) == ""
    assert classify([], HARDWARE) == ""


def test_operands_rounded_by_software_still_name_the_class() -> None:
    """Kernels that round to tf32 themselves leave the hardware nothing to cut."""
    tf32 = simulated_class("sm80").fingerprints[0]
    assert matching(replace(tf32, operand_rounding="nearest"), HARDWARE) == ("sm80",)


def in_dtype(dtype: torch.dtype) -> Matmul:
    return lambda a_MK, b_KN: (a_MK.to(dtype) @ b_KN.to(dtype)).double()


def test_torch_on_a_cpu_is_the_cpu() -> None:
    """Whatever its BLAS: rounded to nearest, 24 bits, whole operands, and no products at once."""
    found = hardware_class("cpu")
    assert found.name == "cpu"
    assert found.fingerprints[0] == Fingerprint(Format.FP32, 24, "none", 24, "nearest", 0, 0)
    assert found.fingerprints[2] == FP32_SUM
    assert matching(fingerprint(in_dtype(torch.bfloat16), Format.BF16), HARDWARE) == ("cpu",)
    assert found.words()["hardware"] == "cpu"


@pytest.mark.parametrize(("name", "wanted", "words"), [
    ("sm80", "sm80", "the only class"), ("sm90", "cuda", "sm90 and sm100 leave the same"),
    ("fp16 sums", "cuda", "fp32: cpu, sm80, sm90, sm100; fp16: none; bf16: none"),
])
def test_a_device_that_is_not_recognised_is_the_worst_of_all(monkeypatch: pytest.MonkeyPatch, name: str, wanted: str,
                                                             words: str) -> None:
    """With the reason: two classes fit, or none does. fp32 operands are multiplied outside the tensor cores here."""
    def product(a_MK: torch.Tensor, b_KN: torch.Tensor, device: str, operand: Format) -> torch.Tensor:
        if operand is Format.FP32:
            return in_dtype(torch.float32)(a_MK, b_KN)
        if name == "fp16 sums":
            return matmul(a_MK, b_KN, with_fp16_accumulator(tensor_core(HARDWARE["sm90"], operand)))
        return matmul(a_MK, b_KN, tensor_core(HARDWARE[name], operand))
    monkeypatch.setattr(hardware, "_on_device", product)
    found = hardware.hardware_class.__wrapped__("cpu")
    assert found.name == wanted
    assert words in found.reason


def in_a_random_tree(a_MK: torch.Tensor, b_KN: torch.Tensor, seed: int) -> torch.Tensor:
    """Every addition rounded to fp32, between any two of the sums that are left."""
    drawn = torch.Generator().manual_seed(seed)
    sums = list((a_MK.T[:, :, None] * b_KN[:, None, :]).float())
    while len(sums) > 1:
        first, second = torch.randperm(len(sums), generator=drawn)[:2].sort().values.tolist()
        right = sums.pop(second)
        sums[first] = sums[first] + right
    return sums[0].double()


def test_a_device_without_fp8_is_named_by_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch may refuse 8-bit operands on a device that has them; any other refusal is no fingerprint but an error."""
    def product(a_MK: torch.Tensor, b_KN: torch.Tensor, device: str, operand: Format) -> torch.Tensor:
        if operand is refused:
            raise RuntimeError("not compiled for this device")
        return in_dtype(torch.float32)(a_MK, b_KN)
    monkeypatch.setattr(hardware, "_on_device", product)
    monkeypatch.setattr(hardware, "_formats", lambda device: (Format.BF16, Format.E4M3))
    refused = Format.E4M3
    found = hardware.hardware_class.__wrapped__("cpu")
    assert (found.name, len(found.fingerprints)) == ("cpu", 1)
    refused = Format.BF16
    with pytest.raises(RuntimeError, match="not compiled"):
        hardware.hardware_class.__wrapped__("cpu")


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_an_fp32_sum_is_taken_for_another_accumulator(seed: int) -> None:
    """Random trees of additions, one per seed."""
    assert fingerprint(partial(in_a_random_tree, seed=seed), Format.BF16) == FP32_SUM


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("accumulator", "bits", "order"), [
    *((Format.FP32, 24, order) for order in summation.ORDERS),
    *((Format.FP16, 11, order) for order in ("reversed", "split_k")),
    *((Format.BF16, 8, order) for order in ("sequential", "pairwise")),
])
def test_the_accumulator_is_named_in_every_order(accumulator: Format, bits: int, order: summation.Order) -> None:
    """fp16 and bf16 sums are told from fp32 ones, with the usual orders of kernels."""
    found = fingerprint(partial(summation.matmul, order=order, fmt=accumulator), Format.BF16)
    assert found == replace(FP32_SUM, significand_bits=bits)
    assert found.accumulator == accumulator


def test_a_sum_rounded_once_per_block_is_no_fp32_sum() -> None:
    """fp32 within blocks of 64, bf16 between them: the narrow rounding is found."""
    blocked = partial(summation.matmul, order="blocked", fmt=Format.BF16, inside=Format.FP32)
    found = fingerprint(blocked, Format.BF16)
    assert (found.accumulator, found.rounding) == ("bf16", "nearest")
    assert matching(found, HARDWARE) == ()


def test_fp16_results_of_tensor_cores() -> None:
    """Eleven bits, rounded to nearest, though the addends of an instruction are cut."""
    for name, kept, products in (("sm80", 24, 8), ("sm90", 25, 16)):
        core = with_fp16_accumulator(tensor_core(HARDWARE[name], Format.FP16))
        found = fingerprint(partial(matmul, core=core), Format.FP16)
        assert found == Fingerprint(Format.FP16, 11, "none", 11, "nearest", kept, products)
        assert found.accumulator == "fp16"
        assert matching(found, HARDWARE) == ()


@pytest.mark.parametrize("stored", [Format.BF16, Format.FP16])
def test_a_16_bit_result_hides_nothing(stored: Format) -> None:
    """Only small powers of two are read, which every store keeps."""
    core = tensor_core(HARDWARE["sm90"], Format.FP16)
    plain = fingerprint(partial(matmul, core=core), Format.FP16)
    assert fingerprint(lambda a_MK, b_KN: round_to(matmul(a_MK, b_KN, core), stored), Format.FP16) == plain


@pytest.mark.parametrize("core", [
    TensorCore(4, 23, operand=Format.FP16), TensorCore(8, 24, operand=Format.FP16),
    TensorCore(16, 22, 20, operand=Format.FP16), TensorCore(32, 13, 14, operand=Format.E4M3),
    TensorCore(16, 13, 14, operand=Format.E4M3), TensorCore(32, 13, 14, operand=Format.E4M3, promote_every=128),
    TensorCore(4, 25, final="nearest", operand=Format.TF32),
])
def test_any_tensor_core_is_read_from_its_products(core: TensorCore) -> None:
    """Also those in no entry: Volta, Ada's fp8, one with promotion, made-up ones."""
    found = fingerprint(partial(matmul, core=core), core.operand)
    assert (found.products_per_step, found.kept_bits) == (core.products_per_step, core.kept_bits)
    assert (found.significand_bits, found.rounding) == (core.significand_bits, core.final)


def test_products_in_reverse_are_counted_as_well() -> None:
    """The pair that comes first has no sum before it, at whichever end it is."""
    core = tensor_core(HARDWARE["sm90"], Format.BF16)
    found = fingerprint(lambda a_MK, b_KN: matmul(a_MK.flip(1), b_KN.flip(0), core), Format.BF16)
    assert found.products_per_step == 16


def test_an_exact_instruction_keeps_all_bits() -> None:
    """Steps that add exactly and cut the sum show their size, and no alignment."""
    found = fingerprint(partial(summation.truncating_matmul, products_per_step=16), Format.BF16)
    assert found == replace(FP32_SUM, rounding="truncate", products_per_step=16)
    assert matching(found, HARDWARE) == ()


@pytest.mark.parametrize(("operand_of", "bits", "rounding"), [
    (lambda value: value, 24, "none"),
    (partial(round_to, stored=Format.TF32), 11, "nearest"),
    (partial(round_to, stored=Format.TF32, mode="truncate"), 11, "truncate"),
    (partial(round_to, stored=Format.BF16), 8, "nearest"),
])
def test_what_becomes_of_fp32_operands(operand_of: Matmul, bits: int, rounding: str) -> None:
    """Whole, tf32 by either way, or bf16, with fp32 sums; one narrowed side is enough."""
    for sides in ((True, True), (True, False), (False, True)):
        def narrowed(a_MK: torch.Tensor, b_KN: torch.Tensor, sides: tuple[bool, bool] = sides) -> torch.Tensor:
            a_MK, b_KN = (operand_of(one) if narrow else one for one, narrow in zip((a_MK, b_KN), sides, strict=True))
            return in_dtype(torch.float32)(a_MK, b_KN)
        found = fingerprint(narrowed, Format.FP32)
        assert found.operand_bits == bits
        assert found.operand_rounding == (rounding if all(sides) or bits == 24 else "other")


def test_three_tf32_products_are_neither_tf32_nor_whole() -> None:
    """Two parts of 11 bits hold 23 of the pattern 1.0101..."""
    core = tensor_core(HARDWARE["sm90"], Format.TF32)
    found = fingerprint(partial(tf32x3_matmul, core=core, operands="truncate"), Format.FP32)
    assert found.operand_bits == 23


def test_sums_wider_than_fp32_are_seen() -> None:
    """An fp64 accumulator, and one that no probe of 8-bit operands fills."""
    assert fingerprint(lambda a_MK, b_KN: a_MK @ b_KN, Format.FP32).accumulator == "fp64"
    assert fingerprint(lambda a_MK, b_KN: a_MK @ b_KN, Format.E4M3).accumulator == "wider than shown"


def test_the_command_prints_the_table() -> None:
    """For the device and for a simulated class; a class without a tensor core is wrong use."""
    plain = CliRunner().invoke(cli, ["fingerprint", "--device", "cpu"], standalone_mode=False)
    assert plain.output.splitlines()[-1].startswith("class     cpu: ")
    shown = CliRunner().invoke(cli, ["fingerprint", "--simulate", "sm90", "--json"], standalone_mode=False)
    document = json.loads(shown.output)
    assert (document["class"], document["simulated"]) == ("sm90", True)
    assert document["fingerprints"][3]["accumulator"] == "14 bits"
    wrong = CliRunner().invoke(cli, ["fingerprint", "--simulate", "cpu"], standalone_mode=False)
    assert isinstance(wrong.exception, UsageValueError)
    assert "one of sm80, sm90, sm100" in str(wrong.exception)


def test_what_cannot_be_measured_is_refused() -> None:
    """A device that is no device here, and operands that no format below fp64 holds."""
    with pytest.raises(UsageValueError, match="'tpu', but should be cpu or cuda"):
        hardware_class("tpu")
    with pytest.raises(UsageValueError, match="operand=fp64"):
        fingerprint(in_dtype(torch.float64), Format.FP64)
