"""Protects tolerances.yaml: every number of a verdict stands there with its reason, and no atol or rtol can."""

import math
from pathlib import Path

import pytest
import torch

from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.verify.bounds.tolerances import default_path, load_tolerances

TEXT = default_path().read_text()


@pytest.mark.parametrize(("old", "new", "words"), [
    ("schema: 1\n", "schema: 1\natol: 1.0e-2\n", "atol"),
    ("schema: 1\n", "schema: 1\nrtol: 1.0e-2\n", "rtol"),
    ("  ratio:\n", "  ratio:\n    atol: 0.1\n", "atol"),
    ("  activation:\n", "  activation:\n    rtol: 0.1\n", "rtol"),
    ("  ratio:\n", "  ratio_bf16: {max: 2.0, reason: r, source: s}\n  ratio:\n", "ratio_bf16"),
    ("schema: 1\n", "schema: 1\nschema: 1\n", "duplicate key"),
    ("    max: 1.0\n", "    max: 1.0\n    max: 2.0\n", "duplicate key"),
    ("    reason: the bound is rigorous, so nothing above it is an accident\n", "", "reason"),
    ("    reason: every product and every addition is rounded to nearest once\n", "", "reason"),
    ("reason: IEEE binary64, ", "", "reason"),
    ("schema: 1\n", "schema: 2\n", "schema 2"),
    ("  fp16: {", "  fp12: {", "fp12"),
    ("    max: 1.0\n", "    max: one\n", "max"),
    ("schema: 1\n", "schema: [1\n", ""),
])
def test_a_wrong_file_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    """An unknown key is a wish that nobody would hear; the message has the file and what is wrong in it."""
    assert old in TEXT
    path = tmp_path / "tolerances.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UsageValueError) as caught:
        load_tolerances(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(("old", "new"), [
    ("reason: IEEE binary64, ", 'reason: "", '),
    ("  cpu:\n", "  tpu:\n"),
    ("    factor: 1.375\n", "    factor: -1.0\n"),
    ("    factor: 1.375\n", "    factor: .nan\n"),
    ("    max: 1.0\n", "    max: .inf\n"),
], ids=["empty reason", "no cpu accumulator", "negative factor", "factor nan", "limit inf"])
def test_a_number_that_decides_nothing_is_refused(tmp_path: Path, old: str, new: str) -> None:
    """Each of these would make every case pass, or fail in the middle of a run."""
    assert old in TEXT
    path = tmp_path / "tolerances.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UsageValueError):
        load_tolerances(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """As wrong use, not as a traceback."""
    with pytest.raises(UsageValueError, match=r"nowhere\.yaml"):
        load_tolerances(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", list(Format))
def test_formats_are_those_of_torch(name: Format) -> None:
    """Significand, smallest normal and largest number, against torch's own tables."""
    entry, info = load_tolerances().file.formats[name], torch.finfo(TORCH_DTYPES[name])
    assert 2.0 ** (1 - entry.significand_bits) == info.eps
    assert 2.0**entry.min_exponent == info.smallest_normal
    assert entry.max == info.max


def test_the_shipped_file_is_complete() -> None:
    """Both device classes, rigorous limits, and a digest that changes with any byte."""
    file = load_tolerances().file
    assert {"cpu", "cuda"} <= set(file.accumulators)
    assert all(entry.factor >= 1.0 and math.isfinite(entry.factor) for entry in file.accumulators.values())
    assert file.limits.ratio.max == 1.0
    assert file.limits.power.min > 1.0


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    """A comment is enough to change it: a record says exactly which file judged it."""
    path = tmp_path / "tolerances.yaml"
    path.write_text(TEXT + "# later\n")
    assert load_tolerances(path).file == load_tolerances().file
    assert load_tolerances(path).digest != load_tolerances().digest
