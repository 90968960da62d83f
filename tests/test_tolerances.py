"""Protects tolerances.yaml: every number of a verdict stands there with its reason, and no atol or rtol can."""

from pathlib import Path

import pytest

from moe_ref.contract.errors import UsageValueError
from moe_ref.tolerances.load import default_path, load_tolerances

TEXT = default_path().read_text()


def write(folder: Path, *changes: tuple[str, str]) -> Path:
    """The shipped file with the first of each old text replaced, in a folder."""
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    folder.mkdir(exist_ok=True)
    path = folder / "tolerances.yaml"
    path.write_text(text)
    return path


def refusal(path: Path) -> str:
    """What the error says."""
    with pytest.raises(UsageValueError) as caught:
        load_tolerances(path)
    return str(caught.value)


def line_of(path: Path, part: str) -> int:
    """The number of the first line that holds `part`."""
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if part in line)


@pytest.mark.parametrize(("old", "new", "at", "words"), [
    ("schema: 1\n", "schema: 1\natol: 1.0e-2\n", "atol: 1", "has no atol or rtol"),
    ("schema: 1\n", "schema: 1\nrtol: 1.0e-2\n", "rtol: 1", "has no atol or rtol"),
    ("  ratio:\n", "  ratio:\n    atol: 0.1\n", "    atol", "limits.ratio.atol: tolerances.yaml has no atol or rtol"),
    ("  activation:\n", "  activation:\n    rtol: 0.1\n", "    rtol", "has no atol or rtol"),
    ("  ratio:\n", "  ratio:\n    absolute: 0.1\n", "    absolute", "has no atol or rtol"),
    ("  registers:\n", "  relative:\n", "  relative:", "contracts.relative: tolerances.yaml has no atol or rtol"),
    ("  ratio:\n", "  ratio_bf16: {max: 2.0, reason: r, source: s}\n  ratio:\n", "ratio_bf16", "unknown key"),
    ("schema: 1\n", "schema: 1\nSchema: 1\n", "Schema:", "Schema: unknown key, but should be one of schema, formats"),
    ("    max: 1.0\n", "    max: 1.0\n    max: 2.0\n", "max: 2.0", "limits.ratio.max: duplicate key, first on line "),
    ("    reason: the bound is rigorous, so nothing above it is an accident\n", "", "max: 1.0", "reason is missing"),
    ("     source: \"Higham 2002, section 3.1\"}", "    }", "{factor: 1.0, truncates: false", "source is missing"),
    ("reason: IEEE binary64, ", 'reason: "", ', 'reason: ""', "formats.fp64.reason"),
    ("schema: 1\n", "schema: 2\n", "schema:", "schema: Invalid"),
    ("  fp16: {sig", "  fp12: {sig", "fp12", "formats.fp12"),
    ("  sm90:\n", "  tpu:\n", "hardware:", "hardware: sm90 is missing"),
    ("  sm90:\n", "  tpu:\n", "hardware:", "hardware: tpu is unknown"),
    ("    max: 1.0\n", "    max: one\n", "max: one", "limits.ratio.max: Expected `float`"),
    ("    max: 1.0\n", "    max: .inf\n", "max: .inf", "limits.ratio.max"),
    ("    max: 1.0\n", "    max: .nan\n", "max: .nan", "limits.ratio.max"),
    ("    max: 1.0\n", "    max: -1.0\n", "max: -1.0", "limits.ratio.max"),
    ("alpha: 1.0e-9", "alpha: 0.5", "alpha: 0.5", "checks.stage.alpha"),
    ("{mismatches: 0", "{mismatches: 3", "mismatches: 3", "checks.exact.mismatches"),
    ("gate: false", "gate: true", "gate: true", "checks.semantic.gate"),
    ("filters: [sign,", "filters: [sigh,", "filters: [sigh", "checks.output.filters[0]"),
    ("    fp16: {floor", "    tf32: {floor", "tf32: {floor", "power_guard.floors.tf32"),
    ("storage: {reduced: dtype}", "storage: {reduce: dtype}", "{reduce:", "contracts.registers.storage.reduce"),
    ("storage: {reduced: dtype}", "storage: {reduced: int8}", "int8", "contracts.registers.storage.reduced"),
    ("kind: cosine", "kind: sine", "kind: sine", "published.deepgemm: kind is 'sine'"),
    ("bf16: {max: 1.0e-5}", "bf16: {max: 1.0e-5, rms: 1.0}", "rms: 1.0}", "published.deepgemm.numbers.bf16.rms"),
    ("filters: [sign, slots, ranks]", "filters: sign", "filters: sign", "checks.output.filters: Expected `array`"),
    ("factor: 1.375, trunc", "factor: 1.25, trunc", "factor: 1.25", "factor 1.25, but products_per_step, kept_bits"),
    ("factor: 1.375, trunc", "factor: .nan, trunc", "factor: .nan", "hardware.sm80.factor"),
    ("{factor: 1.375, truncates: true, products_per_step: 8, kept_bits: 24", "{factor: 1.375, truncates: true, "
     "products_per_step: 8, kept_bits: 0", "products_per_step: 8, kept_bits: 0", "should be at least 1 then"),
    ("    max: 1.0\n", "    max: &limit 1.0\n    reason: *limit\n", "&limit", "alias"),
    ("schema: 1\n", "schema: 1\n<<: {schema: 1}\n", "<<", "a key should be text"),
    ("schema: 1\n", "schema: !!python/object/apply:os.getcwd []\n", "os.getcwd", "tag"),
    ("schema: 1\n", "schema: " + "9" * 5000 + "\n", "schema: 9", "5000 characters"),
    ("schema: 1\n", "schema: [1\n", "formats:", ""),
])
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, old: str, new: str, at: str, words: str) -> None:
    """An unknown key is a wish that nobody would hear; the message has file, line and what is wrong there."""
    path = write(tmp_path, (old, new))
    first = next(line for line in refusal(path).split("\n") if words in line)
    assert first.startswith(f"{path}:{line_of(path, at)}: ")


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """In the order of the file, a line of the message each."""
    path = write(tmp_path, ("units: 8.0", "units: 0.0"), ("    max: 1.0\n", "    max: 1.0\n    atol: 1.0\n"),
                 ("rms_base: 1.08", "rms_base: none"))
    found = [line.removeprefix(f"{path}:").split(": ")[:2] for line in refusal(path).split("\n")]
    assert found == [[str(line_of(path, "units: 0.0")), "evaluations.activation.units"],
                     [str(line_of(path, "    atol")), "limits.ratio.atol"],
                     [str(line_of(path, "rms_base")), "checks.output.rms_base"]]


@pytest.mark.parametrize("content", ["", "1\n", "- 1\n", "[" * 3000 + "]" * 3000, "\x01", "a: 1\n---\nb: 1\n", "{"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: str) -> None:
    """Nothing, another document, one nested without end, and bytes that are no text."""
    path = tmp_path / "tolerances.yaml"
    path.write_text(content)
    assert refusal(path).startswith(f"{path}:")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """As wrong use, not as a traceback."""
    assert "nowhere.yaml" in refusal(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("section", [line.partition(":")[0] for line in TEXT.splitlines() if line[:1].isalpha()])
def test_every_section_must_be_there(tmp_path: Path, section: str) -> None:
    """Nothing has a default: what is not in the file is not decided."""
    path = write(tmp_path, (f"\n{section}:", f"\nno_{section}:"))
    assert f"the file: {section} is missing" in refusal(path)


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    """A comment is enough to change it: a record says exactly which file judged it."""
    path = write(tmp_path, ("schema: 1\n", "schema: 1\n# later\n"))
    as_it_was = load_tolerances(write(tmp_path / "before"))
    assert load_tolerances(path).file == as_it_was.file
    assert load_tolerances(path).digest != as_it_was.digest
