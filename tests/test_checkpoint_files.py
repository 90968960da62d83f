"""Protects the reading of files that somebody made to be misread, and of arguments that name no checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_ref.checkpoints.files import INDEX, SINGLE
from moe_ref.checkpoints.name_ranges import name_ranges
from moe_ref.checkpoints.reader import open_checkpoint
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from tests.checkpoint_models import GATE_NAME, PLAIN, mixtral, write


def fault(path: Path) -> str:
    """What opening says."""
    with pytest.raises(UsageValueError) as caught:
        open_checkpoint(path, 0, "mixtral", PLAIN)
    return str(caught.value)


def members(entries: dict[str, str]) -> str:
    """The members of a JSON object, without its braces."""
    return json.dumps(entries)[1:-1]


def test_a_name_twice_in_an_index(tmp_path: Path) -> None:
    """Two readers that take the first and the last one read other weights from the same files."""
    save_file(mixtral(), tmp_path / "a.safetensors")
    save_file({GATE_NAME: torch.ones(6, 12)}, tmp_path / "b.safetensors")
    once, again = members(dict.fromkeys(mixtral(), "a.safetensors")), members({GATE_NAME: "b.safetensors"})
    (tmp_path / INDEX).write_text(f'{{"weight_map": {{{once}}}}}')
    assert torch.equal(open_checkpoint(tmp_path, 0, "mixtral", PLAIN).router_EH, mixtral()[GATE_NAME])
    for text in (f'{{"weight_map": {{{once}, {again}}}}}', f'{{"weight_map": {{{again}, {once}}}}}'):
        (tmp_path / INDEX).write_text(text)
        said = fault(tmp_path)
        assert INDEX in said
        assert f"keys that stand there more than once, but should once: {GATE_NAME}" in said


def test_two_weight_maps_in_an_index(tmp_path: Path) -> None:
    """The same one level up; escapes do not hide a key."""
    save_file(mixtral(), tmp_path / "a.safetensors")
    entries = members(dict.fromkeys(mixtral(), "a.safetensors"))
    (tmp_path / INDEX).write_text(f'{{"weight_map": {{{entries}}}, "weight_ma\\u0070": {{}}}}')
    assert "more than once, but should once: weight_map" in fault(tmp_path)


def test_a_name_twice_in_a_header(tmp_path: Path) -> None:
    """The same bytes as F16 and as BF16: the shapes cannot show which one is meant."""
    file = write(tmp_path, mixtral(torch.float16)) / SINGLE
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    other = {GATE_NAME: header[GATE_NAME] | {"dtype": "BF16"}}
    text = f"{json.dumps(header)[:-1]}, {json.dumps(other)[1:]}".encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size:])
    said = fault(tmp_path)
    assert f"{SINGLE}: not a safetensors file: keys that stand there more than once" in said
    assert GATE_NAME in said


@pytest.mark.parametrize("text", [
    b"[" * 100_000, b'{"metadata": ' + b"[" * 100_000, b'{"weight_map": ' * 100_000, b"\xff\xfe\xfd", b"",
    b"9" * 5000,
], ids=["lists", "lists in the metadata", "objects", "no text", "nothing", "a long number"])
def test_an_index_that_no_parser_takes(text: bytes, tmp_path: Path) -> None:
    """Too deep for the stack, not UTF-8, empty, more digits than Python turns into an integer."""
    (tmp_path / INDEX).write_bytes(text)
    assert f"{INDEX}: not an index of safetensors files" in fault(tmp_path)


def test_a_path_that_the_system_refuses(tmp_path: Path) -> None:
    """Too long for any file system, as the argument and in an index."""
    assert "cannot be read: File name too long" in fault(tmp_path / ("x" * 5000))
    long = "x" * 5000 + ".safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(mixtral(), long)}))
    assert "cannot be read: File name too long" in fault(tmp_path)


@pytest.mark.parametrize(("change", "words"), [
    ({"path": None}, "path: NoneType, but should be str or Path"),
    ({"path": 3}, "path: int, but should be str or Path"),
    ({"layer": None}, "layer: NoneType, but should be int or str"),
    ({"layer": True}, "layer: bool, but should be int or str"),
    ({"naming": None}, "naming: NoneType, but should be str or Naming"),
    ({"spec": None}, "spec: NoneType, but should be MoESpec"),
    ({"parallel": 2}, "parallel: int, but should be Parallel or None"),
    ({"path": None, "naming": 3, "spec": "mixtral"}, "path: NoneType.*naming: int.*spec: str"),
])
def test_arguments_of_another_type(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    """All of them at once, before anything is opened."""
    right: dict[str, Any] = {"path": write(tmp_path, mixtral()), "layer": 0, "naming": "mixtral", "spec": PLAIN}
    open_checkpoint(**right)
    with pytest.raises(UsageTypeError, match=words):
        open_checkpoint(**(right | change))


def test_numbers_in_names_that_are_no_expert_numbers() -> None:
    """Leading zeros would not be shown, and 5000 digits are more than Python turns into an integer."""
    long = f"a.{'1' * 5000}.w"
    assert name_ranges(["a.07.w", "a.08.w", "a.9.w", long]) == ["a.9.w", "a.07.w", "a.08.w", long]
