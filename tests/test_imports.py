"""Protects the direction of imports: what may know of what, read from the sources, and what a bare import costs."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDARD = frozenset(sys.stdlib_module_names)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module of these files and folders with its syntax tree."""
    found = 0
    for folder in folders:
        path = ROOT / folder
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found += 1
            yield file.relative_to(ROOT).as_posix(), parsed(file)
    assert found, f"no sources in {folders}"


def imported(tree: ast.Module) -> set[str]:
    """Full names of everything a module imports, at any depth, type checking included.

    `from a import b` counts as a.b: b may be a module. Relative imports are not used here.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def inside(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the packages or lies in it."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def outside(folders: tuple[str, ...], allowed: tuple[str, ...], standard: bool = True) -> list[str]:
    """Imports beyond `allowed` and the standard library, as "file: name"."""
    return [f"{file}: {name}" for file, tree in sources(*folders) for name in sorted(imported(tree))
            if not inside(name, allowed) and not (standard and name.partition(".")[0] in STANDARD)]


def forbidden(folders: tuple[str, ...], packages: tuple[str, ...]) -> list[str]:
    """Imports of `packages`, as "file: name"."""
    return [f"{file}: {name}" for file, tree in sources(*folders) for name in sorted(imported(tree))
            if inside(name, packages)]


def test_the_oracle_knows_only_the_contract() -> None:
    """Truth must not depend on what it judges, nor on the judge."""
    assert outside(("moe_ref/oracle",), ("torch", "moe_ref.contract", "moe_ref.oracle")) == []


def test_the_contract_knows_neither_side() -> None:
    """Both packages build on it."""
    beyond = ("moe_ref.oracle", "moe_ref.verify", "moe_ref.report", "moe_ref.records", "moe_ref.inputs",
              "moe_ref.tiers", "moe_ref.cli")
    assert forbidden(("moe_ref/contract",), beyond) == []


def test_the_fast_package_knows_only_the_contract() -> None:
    """No look at the oracle or the harness; NumPy only where the interpreter lives."""
    found = outside(("moe_fast",), ("torch", "triton", "moe_fast", "moe_ref.contract", "numpy"))
    numpy = [line for line in forbidden(("moe_fast",), ("numpy",)) if not line.startswith("moe_fast/interpreter/")]
    assert found + numpy == []


def test_the_reference_knows_nothing_of_the_fast_package() -> None:
    """Implementations are found by name when a run starts.

    One adapter file uses the interpreter: it runs other people's Triton kernels on a CPU, and judges and computes
    nothing of its own. No other module of moe_ref may, and that one nothing else of the package.
    """
    allowed = "moe_ref/adapters/interpreted.py: moe_fast.interpreter"
    assert [line for line in forbidden(("moe_ref",), ("moe_fast",)) if not f"{line}.".startswith(f"{allowed}.")] == []


def test_only_the_command_line_knows_the_score() -> None:
    """The suite is the same whether it is judged itself or not."""
    others = tuple(f"moe_ref/{one.name}" for one in (ROOT / "moe_ref").iterdir()
                   if one.name not in ("score", "cli", "__pycache__") and (one.is_dir() or one.suffix == ".py"))
    assert forbidden((*others, "moe_fast"), ("moe_ref.score",)) == []


def test_inputs_know_only_the_contract() -> None:
    """Inputs are a pure function of the problem."""
    assert outside(("moe_ref/inputs",), ("torch", "numpy", "moe_ref.contract", "moe_ref.inputs")) == []


def test_encoders_know_no_answers() -> None:
    """What is encoded is decoded by the oracle, which must not meet itself on the other side."""
    assert outside(("moe_ref/schemes",), ("torch", "moe_ref.contract", "moe_ref.numerics", "moe_ref.schemes")) == []


def test_reports_and_records_need_no_torch() -> None:
    """A page can be made on a machine that has only the record."""
    assert forbidden(("moe_ref/report", "moe_ref/records"),
                     ("torch", "numpy.random", "triton", "moe_ref.oracle", "moe_ref.verify", "moe_ref.inputs")) == []


def test_the_judge_needs_no_torch() -> None:
    """A verdict is a function of numbers."""
    assert forbidden(("moe_ref/verify/judge.py", "moe_ref/verify/explain.py",
                      "moe_ref/verify/expected.py", "moe_ref/verify/paste.py"), ("torch", "numpy")) == []


def test_tolerances_need_no_torch() -> None:
    """A threshold is read where no tensor is."""
    assert outside(("moe_ref/tolerances",), ("msgspec", "ruamel.yaml", "moe_ref.contract", "moe_ref.tolerances")) == []


def test_expectations_need_no_torch() -> None:
    """What is known to fail is read where pytest starts."""
    assert outside(("moe_ref/expectations",), ("msgspec", "ruamel.yaml", "moe_ref.contract", "moe_ref.tolerances",
                                               "moe_ref.tiers", "moe_ref.expectations")) == []
    assert run("import sys, moe_ref.expectations.load, moe_ref.expectations.stale; print('torch' in sys.modules)"
               ) == "False\n"


def test_arithmetic_and_simulated_layers_know_no_answers() -> None:
    """Simulated layers run as subjects too, and formats and accumulators are under both sides."""
    answers = ("moe_ref.oracle", "moe_ref.verify", "moe_ref.report")
    assert forbidden(("moe_ref/simulated", "moe_ref/numerics"), answers) == []


def test_adapters_know_the_contract_and_their_libraries() -> None:
    """An adapter translates; the list of all needs no package at all, and is what the rest knows of them."""
    answers = ("moe_ref.oracle", "moe_ref.verify", "moe_ref.report", "moe_ref.inputs", "moe_ref.simulated")
    assert forbidden(("moe_ref/adapters",), answers) == []
    listed = ("moe_ref/adapters/catalogue.py", "moe_ref/adapters/library.py")
    assert outside(listed, ("moe_ref.adapters.library",)) == []
    known = ("moe_ref.adapters.catalogue", "moe_ref.adapters.experts_layer", "moe_ref.adapters.routed")
    others = tuple(f"moe_ref/{one.name}" for one in (ROOT / "moe_ref").iterdir()
                   if one.name not in ("adapters", "__pycache__") and (one.is_dir() or one.suffix == ".py"))
    named = forbidden((*others, "moe_fast"), ("moe_ref.adapters",))
    assert [line for line in named if not inside(line.partition(": ")[2], known)] == []


def test_the_child_knows_neither_oracle_nor_judge() -> None:
    """The process that runs the subject must not hold the answers."""
    answers = ("moe_ref.oracle", "moe_ref.verify.measure", "moe_ref.verify.bounds", "moe_ref.verify.judge")
    assert forbidden(("moe_ref/verify/child",), answers) == []


def run(script: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("module", ["moe_ref", "moe_ref.contract.case_id", "moe_ref.tiers.tiers",
                                    "moe_ref.records.store", "moe_ref.verify.explain",
                                    "moe_ref.pytest_plugin", "moe_ref.cli.main"])
def test_imports_that_stay_cheap(module: str) -> None:
    """`moe-ref --help`, `list`, reading records and explaining them start without torch."""
    assert run(f"import sys, {module}; print('torch' in sys.modules)") == "False\n"


def test_the_child_refuses_the_oracle_to_a_subject() -> None:
    """A subject that asks the oracle gets an ImportError, also through the public name."""
    script = ("import sys\nfrom moe_ref.verify.child.refuse_oracle import refuse_oracle\nrefuse_oracle()\n"
              "held = [n for n in sys.modules if n.startswith(('moe_ref.oracle', 'moe_ref.verify.measure.stages'))]\n"
              "try:\n    from moe_ref import moe\n    print('imported', held)\n"
              "except ImportError as error:\n    print('refused', held, error)")
    assert run(script).startswith("refused [] moe_ref.oracle")


def calls(tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_nothing_is_executed_that_came_from_outside() -> None:
    """No pickle, eval, exec, shell or torch.load anywhere in moe_ref: records and answers are only data."""
    banned_calls = ("eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.save",
                    "subprocess.getoutput", "yaml.load")
    found = forbidden(("moe_ref",), ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch.load"))
    found += [f"{file}: {name}" for file, tree in sources("moe_ref") for name in calls(tree) if name in banned_calls]
    shells = [f"{file}: shell" for file, tree in sources("moe_ref") for node in ast.walk(tree)
              if isinstance(node, ast.keyword) and node.arg == "shell"]
    assert found + shells == []


def test_scripts_import_what_there_is() -> None:
    """Scripts of ci are outside the type check, and most run only in a longer lane."""
    gone = []
    for file, tree in sources("ci"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and inside(node.module or "", ("moe_ref", "moe_fast")):
                module = importlib.import_module(str(node.module))
                gone += [f"{file}: {node.module}.{one.name}" for one in node.names if not hasattr(module, one.name)
                         and importlib.util.find_spec(f"{node.module}.{one.name}") is None]
    assert gone == []
