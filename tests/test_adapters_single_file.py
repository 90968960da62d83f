"""Protects the loading of one file of a package: nothing that a result could come from is made up."""

import sys
from pathlib import Path

import pytest
import torch

from moe_ref.adapters.single_file import absent, load
from moe_ref.contract.errors import UsageValueError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU packages are imported whole")

SOURCE = """
import one_big_package.settings as settings
from one_big_package import operators as ops
from one_big_package.kinds import Kind
from .beside import half

def double(x: Kind | None) -> float:
    return half(x) * settings.FACTOR

def operate(x):
    return ops.fast(x)

def kind():
    return Kind.GATED, Kind()
"""
STAND_INS = {"one_big_package.settings": {"FACTOR": 4}, "one_big_package.operators": {},
             "one_big_package.kinds": absent("Kind"), "one_big_package.layers.beside": {"half": lambda x: x / 2}}


@pytest.fixture
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "one_big_package" / "layers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('needs a GPU')\n")
    (folder / "experts.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("_package")
def test_the_file_is_the_packages_own() -> None:
    """It runs with what stands in for its imports; no stand-in is left to be found as the package."""
    module = load("one_big_package.layers.experts", STAND_INS)
    assert module.double(3.0) == 6.0
    assert Path(module.__file__).read_text() == SOURCE
    assert [name for name in sys.modules if name.startswith("one_big_package")] == []


@pytest.mark.usefixtures("_package")
def test_what_is_not_provided_is_an_error() -> None:
    """At the import where no one named it, at its use where it was said to be of no use."""
    with pytest.raises(ImportError, match="cannot import name 'Kind'"):
        load("one_big_package.layers.experts", {**STAND_INS, "one_big_package.kinds": {}})
    module = load("one_big_package.layers.experts", STAND_INS)
    with pytest.raises(AttributeError, match="has no attribute 'fast'"):
        module.operate(1)
    with pytest.raises(RuntimeError, match=r"Kind\.GATED is used, but stands for nothing"):
        module.kind()
    with pytest.raises(RuntimeError, match="Kind is called, but stands for nothing"):
        absent("Kind")["Kind"]()  # type: ignore[operator]


@pytest.mark.usefixtures("_package")
def test_a_missing_file_is_said() -> None:
    """A release that moved it."""
    with pytest.raises(UsageValueError, match=r"no file layers/gone\.py in package one_big_package"):
        load("one_big_package.layers.gone", {})
