"""Protects what the default run keeps: of a sweep a sample that spans it, of every file something, and all at night."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.nightly import sampled

ROOT = Path(__file__).parents[1]
SWEEP = """
    import pytest

    @pytest.mark.sampled(every=3, each="kind")
    @pytest.mark.parametrize("number", range(4))
    @pytest.mark.parametrize("kind", ["a", "b"])
    def test_sweep(kind, number):
        pass

    @pytest.mark.nightly("takes long")
    def test_long():
        pass

    def test_short():
        pass
"""


def test_every_third_stays() -> None:
    assert sampled([None] * 7, 3) == [True, False, False, True, False, False, True]


def test_groups_keep_different_members() -> None:
    """So that a second axis is spanned too; a group of one keeps that one."""
    groups = [group for group in "abc" for _ in range(3)] + ["d"]
    assert [place % 3 for place, stays in enumerate(sampled(groups, 3)[:9]) if stays] == [0, 1, 2]
    assert sampled(groups, 3)[9]
    for every in range(1, 12):
        assert {group for group, stays in zip(groups, sampled(groups, every), strict=True) if stays} == set(groups)


def test_the_night_runs_what_the_day_counts(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests left out are a number and reasons at the end, whatever of the sweep was asked for by name."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(SWEEP)
    day = pytester.runpytest_subprocess("-p", "tests.nightly", "-ra", "-rs")
    assert day.parseoutcomes() == {"passed": 4, "nightly": 6}
    day.stdout.fnmatch_lines(["*left to --nightly*", "     5 one parameter in 3 runs by default", "     1 takes long"])
    day.stdout.no_fnmatch_line("SKIPPED*")
    assert pytester.runpytest_subprocess("-p", "tests.nightly", "--nightly").parseoutcomes() == {"passed": 10}
    named = pytester.runpytest_subprocess("-p", "tests.nightly", "-k", "a-1 or a-3")
    assert named.parseoutcomes() == {"passed": 1, "nightly": 1, "deselected": 8}


def test_no_file_waits_for_the_night(request: pytest.FixtureRequest) -> None:
    """Of all that this run has collected: a file whose tests are all nightly would be unwatched by day."""
    waiting, files = defaultdict[Path, int](int), Counter(item.path for item in request.session.items)
    for item in request.session.items:
        waiting[item.path] += item.get_closest_marker("nightly") is not None
    assert [file.name for file, number in files.items() if waiting[file] == number] == []
