"""The catalogue of defects is whole: strict, with patches that still apply and cases that still carry them.

What becomes of its mutants is what `moe-ref score` measures; here it is made sure that it measures what it should.
"""

import ast
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from moe_ref.contract.case_id import parse_case
from moe_ref.score.choose import carriers, planned_cases
from moe_ref.score.load import Catalogue, load_catalogue
from moe_ref.score.schema import Mutant
from moe_ref.score.seed import seed

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE: Catalogue = load_catalogue(ROOT / "tests" / "catalogue")
ENTRIES, LEAST_RIGHT = 124, 30


def test_every_defect_is_there_and_nearly_all_are_seeded() -> None:
    assert len(CATALOGUE.entries) >= ENTRIES
    assert len(CATALOGUE.right) >= LEAST_RIGHT
    for entry in CATALOGUE.entries:
        assert all(source.startswith("https://") for source in entry.sources), entry.id


@pytest.mark.parametrize("one", [*CATALOGUE.mutants, *CATALOGUE.right], ids=lambda one: one.id)
def test_patches_apply_and_leave_python(one: Mutant, tmp_path: Path) -> None:
    """Also of those that only a GPU can run."""
    seed(one.patches, tmp_path)
    for patch in one.patches:
        ast.parse((tmp_path / patch.file).read_text())


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("mutant", [one for one in CATALOGUE.mutants if not one.equivalent], ids=lambda one: one.id)
def test_the_default_tiers_carry_the_trigger(mutant: Mutant) -> None:
    """By every pattern: a tier that loses a case loses it here first. Its case without the trigger is a case."""
    names = planned_cases()
    if mutant.runs_on == "cpu":
        assert [pattern for pattern in mutant.carried_by if not any(fnmatchcase(name, pattern) for name in names)] == []
    if mutant.silent_on:
        parse_case(mutant.silent_on)
    assert carriers(mutant, names)


@pytest.mark.parametrize("mutant", CATALOGUE.mutants, ids=lambda one: one.id)
def test_a_mutant_is_a_few_lines(mutant: Mutant) -> None:
    """Declarative patches at seams, not rewrites: at most 12 new lines, no branch on being a mutant."""
    new = "\n".join(patch.new for patch in mutant.patches)
    assert new.count("\n") < 12 + len(mutant.patches)
    assert "mutant" not in new
