"""The pytest plugin: options --moe-*, a test per case, a record, a summary. Imports no torch when loaded.

A test that takes the fixture `moe_case` is run once per case of the chosen tier, under the case's id;
`moe_verify(moe_case)` runs the implementation and fails with the ten-line message:

    def test_matrix(moe_case, moe_verify):
        moe_verify(moe_case)

`moe_conforms` is assert_conforms with the device and the record folder of the command line:

    def test_fused_experts(moe_conforms):
        moe_conforms(fused_experts, spec)
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from moe_ref.conforms.mismatch import Mismatch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe-ref", "mixture-of-experts verification")
    group.addoption("--moe-impl", default="moe_fast", help="implementation: registered name, module or module:attr")
    group.addoption("--moe-tier", default="smoke", help="smoke, quick, full, nightly, families, ranks, conformance")
    group.addoption("--moe-case", action="append", default=[], help="a case id instead of a tier; repeatable")
    group.addoption("--moe-ranks", default=None, help="local, gloo or nccl for all cases; torchrun: moe-ref verify")
    group.addoption("--moe-device", default="auto", help="auto, cpu or cuda")
    group.addoption("--moe-record", default=None, help="folder for records.jsonl (one per xdist worker)")


def pytest_report_header(config: pytest.Config) -> str:
    cases = config.getoption("moe_case")
    chosen = f"{len(cases)} named cases" if cases else f"tier {config.getoption('moe_tier')}"
    return f"moe-ref: implementation {config.getoption('moe_impl')}, {chosen}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "moe_case" not in metafunc.fixturenames:
        return
    planned = _planned(metafunc.config)
    # Under its own id a case can be selected with -k and keeps its name in every report.
    metafunc.parametrize("moe_case", planned, ids=[one.case_id for one in planned])


def _planned(config: pytest.Config) -> list:
    from dataclasses import replace

    from moe_ref.contract.case_id import parse_case
    from moe_ref.contract.errors import UsageError
    from moe_ref.contract.vocabulary import Ranks
    from moe_ref.tiers.tiers import PlannedCase, tier
    try:
        named = config.getoption("moe_case")
        planned = [PlannedCase(case=parse_case(text), purpose="named on the command line") for text in named]
        planned = planned or list(tier(config.getoption("moe_tier")).cases)
        ranks = config.getoption("moe_ranks")
        return [replace(one, ranks=Ranks(ranks)) for one in planned] if ranks else planned
    except (UsageError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def moe_session(request: pytest.FixtureRequest) -> Iterator:
    """One child for all cases of a worker; raises a usage error when the implementation cannot be loaded."""
    from moe_ref.contract.errors import UsageError
    from moe_ref.verify.run.session import Session
    config = request.config
    record = config.getoption("moe_record")
    worker = getattr(config, "workerinput", {}).get("workerid", "")
    try:
        session = Session.start(config.getoption("moe_impl"), config.getoption("moe_device"),
                                Path(record, worker) if record else None)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    yield session
    session.close()


@pytest.fixture
def moe_verify(moe_session, request: pytest.FixtureRequest) -> Callable:
    """Run a planned case and raise Mismatch unless it passes; unsupported and not-run cases are skips with a reason."""

    def verify(planned: object) -> None:
        __tracebackhide__ = True
        line = moe_session.run(planned)
        request.node.user_properties += [("moe_case", line.case), ("moe_verdict", str(line.verdict))]
        if line.verdict in ("unsupported", "not_run"):
            pytest.skip(f"{line.verdict}: {line.reason}")
        if line.verdict != "pass":
            raise Mismatch(line.message)
    return verify


@pytest.fixture
def moe_conforms(request: pytest.FixtureRequest) -> Callable:
    """moe_ref.assert_conforms on --moe-device, with a record folder of the test's own in --moe-record."""
    from moe_ref.conforms.assertion import assert_conforms
    from moe_ref.verify.run.environment import default_device
    device, record = request.config.getoption("moe_device"), request.config.getoption("moe_record")
    calls = count(1)

    def conforms(function: Callable, spec: object, **options: object) -> object:
        __tracebackhide__ = True
        # A folder holds one run, and a test may make several calls.
        place = f"{re.sub(r'[^A-Za-z0-9]+', '-', request.node.nodeid).strip('-')}-{next(calls)}"
        given = {"device": default_device() if device == "auto" else device,
                 "record": Path(record, place) if record else None}
        result = assert_conforms(function, spec, **given | options)  # pyrefly: ignore
        request.node.user_properties += [("moe_verdict", str(line.verdict)) for line in result.lines]
        return result
    return conforms


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    verdicts = Counter(value for reports in terminalreporter.stats.values() for report in reports
                       if getattr(report, "when", "") == "call"
                       for name, value in report.user_properties if name == "moe_verdict")
    if verdicts:
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        terminalreporter.write_line(f"moe-ref verdicts: {counts}")
