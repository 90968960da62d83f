"""What the documents say of this repository is so: links, numbers of cases and models, one message in three places."""

import re
from datetime import date
from pathlib import Path

import pytest

from moe_ref.contract.capabilities import Capabilities
from moe_ref.expectations.load import load_expectations
from moe_ref.models.registry import models
from moe_ref.report.tables import write_between
from moe_ref.score.load import load_catalogue
from moe_ref.tiers.tiers import MINIMUM_EXECUTED, tier
from tests.documents import DOCUMENTS, ROOT, blocks, commands, layer

TEXT = {file.relative_to(ROOT).as_posix(): file.read_text() for file in DOCUMENTS}


@pytest.mark.parametrize("file", DOCUMENTS, ids=TEXT)
def test_links_lead_somewhere(file: Path) -> None:
    """A relative link names a file."""
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text())
    assert [link for link in links if "://" not in link and not (file.parent / link).exists()] == []


def test_the_index_names_every_document() -> None:
    """A document that nothing leads to is not read."""
    named = set(re.findall(r"\]\(([a-z_]+\.md)\)", TEXT["docs/README.md"]))
    assert named == {file.name for file in (ROOT / "docs").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("name", MINIMUM_EXECUTED)
def test_tiers_have_as_many_cases_as_is_said(name: str) -> None:
    """In the list of tiers, as "smoke (51 cases"."""
    [number] = re.findall(rf"\b{name} \((\d+)\b", TEXT["docs/commands.md"])
    assert int(number) == len(tier(name).cases)


def declared() -> Capabilities:
    """What the documented layer declares; its text is this repository's own."""
    namespace: dict[str, object] = {}
    exec(compile(layer(), "mypkg/layer.py", "exec"), namespace)
    capabilities = namespace["CAPABILITIES"]
    assert isinstance(capabilities, Capabilities)
    return capabilities


def test_the_documented_layer_supports_what_is_said() -> None:
    """Of smoke, of quick, and of ranks when those are virtual; the tutorial shows the first as executed."""
    capabilities = declared()
    local = {name: sum(capabilities.refusal(one.case, one.ranks if name != "ranks" else tier("smoke").cases[0].ranks,
                                            "cpu") is None for one in tier(name).cases)
             for name in ("smoke", "quick", "ranks")}
    said = re.search(r"(\d+) cases of smoke, (\d+) of quick and (\d+) of ranks", TEXT["docs/plugging_in.md"])
    assert said is not None
    assert [int(number) for number in said.groups()] == list(local.values())
    assert f"{local['smoke']} of {len(tier('smoke').cases)} executed" in TEXT["docs/tutorial.md"]


def test_counts_on_the_front_page() -> None:
    """Models, and defects of the catalogue."""
    assert f"{len(models())} published models" in TEXT["README.md"]
    entries = sum(len(one.entries) for one in load_catalogue(ROOT / "tests" / "catalogue").classes)
    assert f"{entries} defects" in TEXT["README.md"]


def test_the_front_page_has_the_score_of_its_document(tmp_path: Path) -> None:
    """Word by word; and `moe-ref score --write docs/score.md` finds its marks."""
    [result] = re.findall(r"`moe-ref score`: (.*)", TEXT["docs/score.md"])
    assert result in TEXT["README.md"]
    rows = re.findall(r"^\| (?:class \| moe-ref|all mutants|right variants) .*$", TEXT["README.md"], re.M)
    assert len(rows) == 3
    assert set(rows) <= set(TEXT["docs/score.md"].splitlines()), "the table of criteria, its last two rows"
    copy = tmp_path / "score.md"
    copy.write_text(TEXT["docs/score.md"])
    write_between(copy, "score", "anew")
    assert "anew" in copy.read_text()
    assert result not in copy.read_text()


def test_the_message_of_the_front_page_is_the_tutorials() -> None:
    """Which the test of documented commands compares with what is printed."""
    [shown] = [one.output for one in commands() if one.place.startswith("docs/tutorial.md") and "forgets" in one.text
               and one.output]
    message = shown.partition("\n\n")[0] + "\n"
    texts = [block.text for block in blocks("text") if block.text.startswith("mismatch: reduced")]
    assert texts == [message, message]


def test_documented_expectations_are_read(tmp_path: Path) -> None:
    """By the names of their implementations, on the days that stand there."""
    found = [one for one in blocks("yaml") if "\nentries:" in one.text]
    assert len(found) >= 2
    for block in found:
        path = tmp_path / "expectations.yaml"
        path.write_text(block.text)
        [name] = re.findall(r"^implementation: (\S+)", block.text, re.M)
        load_expectations(path, name, date(2026, 12, 1))
