"""What comes from outside is data: nothing in a file is executed, and nothing in a record is markup."""

import ast
import re
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageError, UsageValueError
from moe_ref.records.schema import CaseLine, EndLine, Implementation, RunLine, StageResult
from moe_ref.records.store import FILE_NAME, Run, read_run
from moe_ref.report.evidence import Evidence
from moe_ref.report.page import page
from moe_ref.score.load import load_catalogue
from moe_ref.tolerances.load import load_tolerances
from tests.command_line import command
from tests.page_reader import own_script

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("moe_ref", "moe_fast", "ci")


@cache
def _trees() -> list[tuple[str, ast.Module]]:
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8")))
            for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def _calls() -> list[tuple[str, str, ast.Call]]:
    """File, dotted name of what is called, and the call."""
    return [(file, ast.unparse(node.func), node) for file, tree in _trees() for node in ast.walk(tree)
            if isinstance(node, ast.Call)]


def _keywords(call: ast.Call) -> dict[str | None, str]:
    return {one.arg: ast.unparse(one.value) for one in call.keywords}


EXECUTES = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.save", "runpy.run_path",
            "subprocess.getoutput", "subprocess.getstatusoutput"}
# The interpreter rewrites the source of a kernel, which is part of this package or of its caller, never a file.
ALLOWED = {("moe_fast/interpreter/rewrite.py", "compile")}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "jsonpickle"}


def test_no_code_is_made_of_data() -> None:
    """No eval, exec or shell; and whoever compiles must be on the list, once."""
    found = {(file, name) for file, name, call in _calls()
             if name in EXECUTES or "shell" in _keywords(call)}
    assert found == ALLOWED


def test_nothing_is_unpickled() -> None:
    """Neither by a module that does it, nor by torch.load, numpy.load or a pipe of multiprocessing."""
    modules = {(file, name) for file, tree in _trees() for node in ast.walk(tree)
               for name in ([one.name for one in node.names] if isinstance(node, ast.Import) else
                            [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
               if name.split(".")[0] in PICKLES}
    loads = {(file, name) for file, name, call in _calls()
             if (name.endswith("torch.load") and _keywords(call).get("weights_only") != "True")
             or name in ("np.load", "numpy.load") or name.endswith((".recv", "torch.jit.load", "torch.package"))}
    assert (modules, loads) == (set(), set())


def test_every_yaml_reader_is_the_safe_one() -> None:
    """ruamel's default keeps tags and comments, its unsafe one makes any object."""
    readers = [(file, _keywords(call)) for file, name, call in _calls() if name.split(".")[-1] == "YAML"]
    assert len(readers) >= 5
    assert [file for file, options in readers if options.get("typ") != "'safe'"] == []


def test_no_option_of_the_command_line_is_evaluated() -> None:
    """A word that is code is a wrong word."""
    code = "__import__('os').abort()"
    for arguments in (["list", "--tier", code], ["show", code], ["verify", "moe_ref", "--case", code],
                      ["verify", "moe_ref", "--tp", code], ["verify", "moe_ref", "--shard", code],
                      ["verify", "moe_ref", "--time-limit", code], ["bench", "moe_ref", "--tokens", code],
                      ["report", code]):
        assert command(*arguments) == 2, arguments
    with pytest.raises(UsageValueError):
        parse_case(f"v1-T5.H32.I48.E4.K2-bf16-{code}")


TAGS = ("!!python/object/apply:os.abort []", "!!python/name:os.abort", "!!python/object/new:os.abort []",
        "!!python/module:os", "!unknown x")


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("read", [lambda folder: load_tolerances(folder / "a_file.yaml"), load_catalogue],
                         ids=["tolerances", "catalogue"])
def test_a_tag_in_yaml_is_an_error(tmp_path: Path, read: Callable[[Path], object], tag: str) -> None:
    """Never a Python object; the message names the file."""
    for name in ("a_file.yaml", "right.yaml"):
        (tmp_path / name).write_text(f"schema: {tag}\nname: {tag}\n")
    with pytest.raises(UsageError, match=r"(a_file|right)\.yaml"):
        read(tmp_path)


def test_a_record_is_only_data(tmp_path: Path) -> None:
    """A pickle, a module and an object with another type's name are no lines; nothing of them is called."""
    for text in (b"\x80\x04\x95\x0c.", b"import os; os.abort()\n",
                 b'{"type":"run","__class__":"os.abort","__reduce__":["os.abort",[]]}\n'):
        (tmp_path / FILE_NAME).write_bytes(text)
        with pytest.raises(UsageValueError):
            read_run(tmp_path)


class _Seen(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = self.handlers = 0
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag in ("script", "iframe", "object", "embed", "img", "base", "link")
        self.handlers += sum(name.startswith("on") or (value or "").strip().lower().startswith("javascript:")
                             for name, value in attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


HOSTILE = ("</td></script><script>alert(1)</script><img src=x onerror=alert(2)>\" onclick=\"alert(3)' onload='alert(4) "
           "{{7*7}}")


def test_a_page_shows_what_a_subject_says_and_runs_none_of_it() -> None:
    """Every text field of a record, filled with markup, quotes and a template's braces."""
    who = Implementation(name=HOSTILE, version=HOSTILE, source_digest=HOSTILE)
    cases = ["v1-T5.H32.I48.E4.K2-bf16-norm-tp3", "v1-T6.H32.I48.E4.K2-bf16-norm-tp3"]
    header = RunLine(run=HOSTILE, started=HOSTILE, implementation=who, tier=HOSTILE, cases=cases, minimum_executed=1,
                     axis_pairs=(1, 2), environment={"device": HOSTILE, "commit": HOSTILE, HOSTILE: HOSTILE},
                     tolerances_digest=HOSTILE, oracle_version=HOSTILE)
    lines = [CaseLine(run=HOSTILE, case=case, purpose=HOSTILE, implementation=who, ranks="local", device="cpu",
                      verdict=verdict, reason=HOSTILE, first_stage="act" if verdict == "mismatch" else None,
                      stages=[StageResult(stage="act", ratio=2.0, num_checked=4, num_bad=1, note=HOSTILE)],
                      guard={HOSTILE: HOSTILE}, batches={HOSTILE: HOSTILE}, numerics={HOSTILE: HOSTILE},
                      message=HOSTILE, replay=HOSTILE)
             for case, verdict in zip(cases, ("mismatch", "not_run"), strict=True)]
    end = EndLine(run=HOSTILE, finished=HOSTILE, seconds=1.0, verdicts={"mismatch": 1}, executed=1, exit_code=1)
    html = page(Evidence(Run(header, {line.case: line for line in lines}, end)), [HOSTILE])
    seen = _Seen()
    seen.feed(html)
    assert (seen.scripts, seen.handlers, html.count(own_script())) == (1, 0, 1), "the page's own filter, and no other"
    assert any("<script>alert(1)</script>" in words for words in seen.words), "escaped, so that it can be read"
    assert "{{7*7}}" in html


def test_templates_escape_and_never_stop_escaping() -> None:
    """Autoescape is on in every environment, and no template or module calls anything safe but drawn plots."""
    environments = [_keywords(call) for file, name, call in _calls() if name.split(".")[-1] == "Environment"
                    # Workflows are no markup, and are made of ci/lanes.yaml alone.
                    and file != "moe_ref/lanes/generate.py"]
    assert environments
    assert all(options.get("autoescape") == "True" for options in environments)
    templates = list((ROOT / "moe_ref" / "report" / "templates").rglob("*.j2"))
    assert templates
    for template in templates:
        assert re.search(r"\|\s*safe|autoescape\s+false", template.read_text(encoding="utf-8")) is None
    trusted = [(file, ast.unparse(call)) for file, name, call in _calls() if name.split(".")[-1] == "Markup"]
    view = "moe_ref/report/sections/view.py"
    assert trusted == [(view, "Markup(_environment().get_template(template).render(**words))"),
                       (view, "Markup(_source(name))"),
                       (view, "Markup(f'<div class=\"plot\">{lean}</div>' if lean else '')")]
