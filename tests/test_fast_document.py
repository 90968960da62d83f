"""docs/fast.md says of every kernel where it is used and of every constant what it means."""

import ast
from pathlib import Path

from tests.test_compile import started

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "fast.md").read_text()


def constants() -> set[str]:
    """Names of the arguments that kernels, and what they call, take as tl.constexpr."""
    arguments = [argument for file in (ROOT / "moe_fast" / "kernels").glob("*.py")
                 for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
                 for argument in node.args.args]
    return {one.arg for one in arguments if one.annotation and ast.unparse(one.annotation) == "tl.constexpr"}


def test_every_constant_is_explained() -> None:
    """And none that is gone."""
    table = TEXT.partition("## Constants of the kernels")[2]
    named = {word for line in table.splitlines() if line.startswith("| `")
             for word in line.split("|")[1].replace("`", "").replace(",", " ").split()}
    inside = {word for word in table.split("`")[1::2] if word.isupper()}
    assert constants() == named | (inside & constants())
    assert named <= constants()


def test_files_and_kernels_that_it_names_exist() -> None:
    """A document that names what was renamed sends its reader astray."""
    words = TEXT.split("`")[1::2]
    kernels = {word for word in words if word.endswith("_kernel")}
    assert kernels <= started()
    files = {word for word in words if word.endswith(".py")}
    assert {file for file in files if not (ROOT / file).exists() and not (ROOT / "moe_fast" / file).exists()} == set()
