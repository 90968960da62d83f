"""Copies of packages with patched sources: a mutant is a folder that is first on the path, and nothing else differs."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

from moe_ref.contract.errors import UsageValueError
from moe_ref.score.schema import Patch

_JUDGE = "moe_ref"


def package_root(file: str) -> tuple[Path, str]:
    """Where the sources of a patched file are, and the dotted package to copy: the outermost with an __init__.py.

    Raises UsageValueError for files of the judge, outside every package, or of a package that is not there.
    """
    parts = Path(file).parts
    if Path(file).is_absolute() or ".." in parts or len(parts) < 2 or not file.endswith(".py"):
        raise UsageValueError(f"patch of {file!r}, but should be package/.../module.py")
    if parts[0] == _JUDGE:
        raise UsageValueError(f"patch of {file!r}: a mutant changes what is judged, never the judge")
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise UsageValueError(f"patch of {file!r}: package {name} is not there")
        if spec.origin is not None:
            return Path(spec.origin).parent, name
    raise UsageValueError(f"patch of {file!r}, which lies in no package")


def seed(patches: Sequence[Patch], folder: Path) -> None:
    """Write patched copies of all packages concerned below `folder`; raises UsageValueError where a patch is stale."""
    for patch in patches:
        source, name = package_root(patch.file)
        copy = folder.joinpath(*name.split("."))
        if not copy.exists():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        target = folder / patch.file
        text = target.read_text() if target.exists() else ""
        if (count := text.count(patch.old)) != 1:
            raise UsageValueError(f"{patch.file}: the text to replace is there {count} times, but should be once:\n"
                                  f"{patch.old}")
        target.write_text(text.replace(patch.old, patch.new))
