"""docs/findings: index, pages and scripts belong together, scripts need nothing of ours, and what they claim is seen.

Left to `ci/findings`: packages outside of the test environment, which it takes from EXTRA, and the scripts of LONG.
"""

import ast
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from ci import findings_run
from ci.findings_run import EXPECTED, FOLDER, WORDS, Page, disagrees, main, pages, read_page, run_script
from tests.documents import ROOT, figures_left_out

PAGES = {page.name: page for page in pages()}
ENVIRONMENT = ("torch", "triton", "transformers")
"""Packages that the tests have in the versions of constraints.txt."""

LONG = tuple(name for name, page in PAGES.items() if page.package == "transformers" and name not in (
    "transformers_grouped_mm_ids", "transformers_bias_gradient"))
"""Half a minute each on a machine with other work, most of it for the import of transformers."""

ROW = re.compile(r"^\| \[.+?\]\((\w+)\.md\) \| (\S+) (\S+) \| (\w+) \| (\S+) \| \[(\w+)\.py\]\((\w+)\.py\) \|$",
                 re.MULTILINE)


def shown(page: Page) -> str:
    """What the page says that its script prints."""
    [output] = re.findall(r"^```text\n(.*?)^```$", (FOLDER / f"{page.name}.md").read_text(), re.MULTILINE | re.DOTALL)
    return output


def test_every_script_has_a_page_and_a_row() -> None:
    """The row of the index says what the head of the page says."""
    rows = ROW.findall((FOLDER / "README.md").read_text())
    assert [(row[0], *row[1:5]) for row in rows] == [
        (page.name, page.package, page.tested, page.verdict, page.day) for page in PAGES.values()]
    assert all(name == script == link for name, *_, script, link in rows)
    assert {path.stem for path in FOLDER.glob("*.py")} == PAGES.keys()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_a_report(name: str) -> None:
    """Its parts, its own command, an output that ends as the verdict says, and short enough to be read."""
    text, page = (FOLDER / f"{name}.md").read_text(), PAGES[name]
    assert re.findall(r"^\*\*(.+?)\.\*\*", text, re.MULTILINE) == [
        "Claim", "See it", "Why it is not rounding", "Where", "Fix", "Upstream"]
    assert f"`python docs/findings/{name}.py`" in text.replace("\n", " ")
    assert shown(page).splitlines()[-1].partition(":")[0] == EXPECTED[page.verdict]
    assert len(text.splitlines()) <= 60


@pytest.mark.parametrize("name", PAGES)
def test_script_needs_only_its_package(name: str) -> None:
    """A maintainer has their own package, torch and NumPy, and nothing of this repository."""
    tree = ast.parse(PAGES[name].script.read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    beyond = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
    assert beyond <= {PAGES[name].package, "torch", "numpy"}


def test_pages_are_of_the_pinned_versions() -> None:
    """With other versions in constraints.txt the pages are to be tested again; below they would be skipped."""
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {(page.name, page.tested) for page in PAGES.values() if page.package in ENVIRONMENT} == {
        (page.name, pinned[page.package]) for page in PAGES.values() if page.package in ENVIRONMENT}


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("name", [
    name for name, page in PAGES.items() if page.package in ENVIRONMENT and name not in LONG])
def test_finding_is_seen(name: str) -> None:
    """The script agrees with its page, and prints what the page shows but for versions, its first line, and figures."""
    page = PAGES[name]
    here = version(page.package).partition("+")[0]
    if here != page.tested:
        pytest.skip(f"{page.package} {here} here, but the page is of {page.tested}; ci/findings says what holds")
    outcome = run_script(page.script, limit=120)
    assert outcome.word == EXPECTED[page.verdict], outcome.output
    printed, expected = (text.partition("\n")[2] for text in (outcome.output, shown(page)))
    assert figures_left_out(printed) == figures_left_out(expected)


@pytest.mark.parametrize(("source", "word"), [
    ("print('SEEN: two')", "SEEN"),
    ("import sys; print('NOT SEEN'); sys.exit(1)", "NOT SEEN"),
    ("import sys; print('CANNOT RUN: absent'); sys.exit(2)", "CANNOT RUN"),
    ("raise RuntimeError('wrong')", "BROKEN"),
    ("import sys; print('SEEN'); sys.exit(1)", "BROKEN"),
    ("print('nothing said')", "BROKEN"),
    ("import time; time.sleep(60)", "TIMED OUT")])
def test_outcomes(source: str, word: str, tmp_path: Path) -> None:
    """A traceback ends with 1, as NOT SEEN does; only the last line tells them apart."""
    script = tmp_path / "script.py"
    script.write_text(source)
    assert run_script(script, limit=1 if "sleep" in source else 30).word == word


@pytest.mark.parametrize(("verdict", "word", "expected"), [
    ("confirmed", "SEEN", False), ("confirmed", "NOT SEEN", True), ("confirmed", "BROKEN", True),
    ("confirmed", "TIMED OUT", True), ("confirmed", "CANNOT RUN", False), ("changed", "SEEN", False),
    ("refuted", "NOT SEEN", False), ("refuted", "SEEN", True)])
def test_when_page_and_script_disagree(verdict: str, word: str, expected: bool) -> None:
    """A finding that upstream has mended is news, and so is a refuted one that is seen."""
    outcome = findings_run.Outcome(word, "", "", 0.0)
    assert disagrees(Page("name", "torch", "1.0", verdict, "2026-01-01"), outcome) is expected


@pytest.mark.parametrize(("code", "exit_code"), [(0, 0), (1, 1), (2, 0)])
def test_exit_code(code: int, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 where a confirmed finding is not seen; a package that is absent is named and is no failure."""
    monkeypatch.setattr(findings_run, "FOLDER", tmp_path)
    (tmp_path / "one.md").write_text("# one\n\n| torch | 1.0 | confirmed | 2026-01-01 |\n")
    (tmp_path / "one.py").write_text(f"import sys\nprint('{WORDS[code]}: because [a] b')\nsys.exit({code})\n")
    result = CliRunner().invoke(main, [])
    assert result.exit_code == exit_code, result.output
    assert f"1 {WORDS[code]}" in result.output
    assert "because" in result.output
    assert CliRunner().invoke(main, ["two"]).exit_code == 2


def test_a_page_without_a_verdict_is_refused(tmp_path: Path) -> None:
    """It would otherwise be expected to be neither seen nor not seen."""
    path = tmp_path / "one.md"
    path.write_text("# one\n\n| torch | 1.0 | perhaps | 2026-01-01 |\n")
    with pytest.raises(ValueError, match=r"one\.md: 0 heads, but should be 1"):
        read_page(path)
