"""Finding implementations: by entry point, as an adapter, by `module` or `module:attr`; none is imported unless asked
for."""

import hashlib
import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from moe_ref.adapters.catalogue import ADAPTERS, find
from moe_ref.contract.capabilities import Capabilities
from moe_ref.contract.errors import UsageValueError

ENTRY_POINT_GROUP = "moe_ref.implementations"
BUILT_IN = ("moe_fast", "moe_ref")


def known_names() -> list[str]:
    """Registered names, the two packages of this project and the adapters."""
    registered = [point.name for point in entry_points(group=ENTRY_POINT_GROUP)]
    return sorted({*BUILT_IN, *registered, *(adapter.name for adapter in ADAPTERS)})


def _is_module(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except (ImportError, ValueError):
        return False


def load_subject(name: str) -> ModuleType:
    """The object that holds `moe` and `CAPABILITIES`; raises UsageValueError that names what is known or missing."""
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    adapter = None if name in points else find(name)
    if adapter is not None and (lacking := adapter.lacking()):
        raise UsageValueError(f"implementation {name!r}: {lacking}")
    target = adapter.target if adapter else points[name].value if name in points else name
    module_name, _, attribute = target.partition(":")
    try:
        subject = importlib.import_module(module_name)
        for part in filter(None, attribute.split(".")):
            subject = getattr(subject, part)
    except (ImportError, AttributeError, ValueError) as error:
        # A file mypkg/layer.py is the module mypkg.layer; mypkg:layer would be an attribute of mypkg.
        dotted = target.replace(":", ".")
        hint = f"; did you mean {dotted}?" if attribute and _is_module(dotted) else ""
        raise UsageValueError(f"unknown implementation {name!r} ({type(error).__name__}: {error}{hint}); "
                              f"known: {', '.join(known_names())}, or module:attr") from error
    faults = ["moe"] * (not callable(getattr(subject, "moe", None)))
    faults += ["CAPABILITIES"] * (not isinstance(getattr(subject, "CAPABILITIES", None), Capabilities))
    if faults:
        raise UsageValueError(f"implementation {name!r} lacks {' and '.join(faults)}; it should export the "
                              "function moe and CAPABILITIES, a moe_ref.Capabilities")
    return subject


def source_digest(subject: object) -> str:
    """16 hex digits over the Python sources of what is judged, so that a record says what it was.

    The package of a module; of an object the files of its class and of the functions that it holds.
    """
    parts = [subject] if isinstance(subject, ModuleType) else [
        subject, *(value for value in getattr(subject, "__dict__", {}).values() if callable(value))]
    files = dict.fromkeys(filter(None, map(_file_of, parts)))
    hasher = hashlib.sha256()
    for path in files:
        for source in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
            hasher.update(source.relative_to(path.parent).as_posix().encode() + source.read_bytes())
    return hasher.hexdigest()[:16] if files else ""


def _file_of(part: object) -> Path | None:
    module = sys.modules.get(getattr(part, "__module__", "") or "")
    file = getattr(part, "__file__", None) or getattr(module, "__file__", None)
    return Path(file) if file else None
