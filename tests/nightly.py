"""What a night's run has and a push's has not: tests marked `nightly` are skipped unless pytest is given --nightly.

    @pytest.mark.nightly("why")      this test, or this parameter of one (pytest.param(..., marks=...))
    @pytest.mark.sampled(every=4)    of its parameters every 4th stays in the default run, the others are nightly
    @pytest.mark.sampled(every=4, each="kind")   the same among those that share a value of argument `kind`, or of an
                                                 attribute of an argument, "caught.name"
    examples(100)                    of Hypothesis: a quarter of them in the default run

Which stay follows from the order of the parameters alone, never from what was chosen with -k or by name; every value of
`each` keeps one at least. The skips are one line per reason at the end of a run, not one per test.
"""

from collections import Counter
from collections.abc import Generator, Sequence
from operator import attrgetter
from types import SimpleNamespace

import pytest

_REASON = "nightly: "
_all = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="Run tests marked nightly too.")


def pytest_configure(config: pytest.Config) -> None:
    global _all
    _all = config.getoption("nightly")
    config.addinivalue_line("markers", "nightly(reason): skipped unless --nightly is given")
    config.addinivalue_line("markers", "sampled(every, each=''): all but every n-th parameter are nightly")


def examples(number: int) -> int:
    """How many examples Hypothesis draws: so many with --nightly, else a quarter."""
    return number if _all else -(-number // 4)


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(name: str) -> Generator[None, object, object]:
    """The items of one test function, before any of them is left out of the run."""
    made = yield
    items = [item for item in made if isinstance(item, pytest.Function)] if isinstance(made, list) else []
    marker = items[0].get_closest_marker("sampled") if items else None
    if marker is not None:
        stay = sampled([_group(item, **marker.kwargs) for item in items], marker.kwargs["every"])
        for item in (item for item, stays in zip(items, stay, strict=True) if not stays):
            item.add_marker(pytest.mark.nightly(f"one parameter in {marker.kwargs['every']} runs by default"))
    return made


def _group(item: pytest.Function, every: int, each: str = "") -> object:
    return attrgetter(each)(SimpleNamespace(**item.callspec.params)) if each else None


def sampled(groups: Sequence[object], every: int) -> list[bool]:
    """Which of the members stay, each given by its group: one in `every` of a group, and of the n-th group from its
    n-th member on, so that groups of the same members keep different ones."""
    sizes, seen = Counter(groups), Counter[object]()
    first = {group: place % min(every, sizes[group]) for place, group in enumerate(sizes)}
    stay = []
    for group in groups:
        stay.append(seen[group] % every == first[group])
        seen[group] += 1
    return stay


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("nightly")
    if marker is not None and not item.config.getoption("nightly"):
        (reason,) = marker.args
        pytest.skip(_REASON + reason)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str, str] | None:
    """A number of its own in the last line, and no part in the list of skips."""
    return ("nightly", "", "NIGHTLY") if _reason(report) else None


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test waits for the night, "" where it does not."""
    where = report.longrepr
    said = where[2].removeprefix("Skipped: ") if report.skipped and isinstance(where, tuple) else ""
    return said.removeprefix(_REASON) if said.startswith(_REASON) else ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = Counter(map(_reason, terminalreporter.stats.get("nightly", [])))
    if reasons:
        terminalreporter.section("left to --nightly")
        for reason, number in reasons.most_common():
            terminalreporter.line(f"{number:6} {reason}")
