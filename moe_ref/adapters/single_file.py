"""One source file of a package that does not import as a whole without a GPU.

The file is the package's own. What it imports of its package is stood in for by the names that an adapter lists, no
more: a name that is not listed fails at the import, one that is listed as `absent` fails when it is used.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from moe_ref.contract.errors import UsageValueError


class Absent(type):
    """A class that can be named in annotations and in nothing else."""

    def __call__(cls, *args: object, **kwargs: object) -> object:
        """Raises RuntimeError: what is called was said to be of no use."""
        raise RuntimeError(f"{cls.__name__} is called, but stands for nothing here; the adapter should provide it")

    def __getattr__(cls, name: str) -> object:
        """Raises RuntimeError; names of Python's own protocols are AttributeErrors, as they are probed for."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"{cls.__name__}.{name} is used, but stands for nothing here; the adapter should provide it")


def absent(*names: str) -> dict[str, object]:
    """Names that are imported and not used."""
    return {name: Absent(name, (), {}) for name in names}


def load(module: str, stand_ins: Mapping[str, Mapping[str, object]]) -> ModuleType:
    """The module of that dotted name: imported with its package where there is a GPU, else its file alone.

    stand_ins: full name of an imported module -> its attributes. They are modules during the load only: afterwards
    nobody finds them, nor the loaded module. Raises ImportError for what the file imports and `stand_ins` lacks,
    UsageValueError where there is no such file.
    """
    if torch.cuda.is_available():
        return importlib.import_module(module)
    package, *rest = module.split(".")
    found = importlib.util.find_spec(package)
    folders = found.submodule_search_locations or () if found else ()
    paths = [path for folder in folders for path in (Path(folder).joinpath(*rest).with_suffix(".py"),) if path.exists()]
    if not paths:
        raise UsageValueError(f"module {module}: no file {'/'.join(rest)}.py in package {package}")
    spec = importlib.util.spec_from_file_location(module, paths[0])
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    with _standing_in({**stand_ins, module: {}}, {module: loaded}):
        spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def _standing_in(stand_ins: Mapping[str, Mapping[str, object]], given: Mapping[str, ModuleType]) -> Iterator[None]:
    """Modules of these names, and the packages above them, inside the block; what was there before, after it."""
    packages = {name.split(".")[0] for name in stand_ins}
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in packages}
    above = {name.rsplit(".", depth)[0] for name in stand_ins for depth in range(1, name.count(".") + 1)}
    modules = {name: given.get(name) or ModuleType(name) for name in sorted({*above, *stand_ins})}
    for name, module in modules.items():
        vars(module).update(stand_ins.get(name, {}), **({} if name in given else {"__path__": []}))
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in packages]:
            del sys.modules[name]
        sys.modules.update(before)
