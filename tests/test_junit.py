"""junit.xml: what CI servers read off it, case by case, and that no record can make it unreadable."""

from pathlib import Path
from xml.etree import ElementTree

import msgspec

from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, Verdict
from moe_ref.records.store import Run
from moe_ref.report.baseline import baseline_of
from moe_ref.report.compare import compare
from moe_ref.report.junit import junit
from moe_ref.report.shards import merge_runs
from tests.made_records import PLAIN, SIZES, TP2, TP4, failing, idle, make_run, passing


def read(run: Run) -> ElementTree.Element:
    """The document, parsed as any reader would."""
    return ElementTree.fromstring("".join(junit(run)).encode())


def test_a_case_becomes_a_test_with_class_time_and_place() -> None:
    line = msgspec.structs.replace(failing(TP2), subject_seconds=1.5, oracle_seconds=0.25)
    root = read(make_run(passing(PLAIN), line))
    run, suite = root.findall("testsuite")
    assert (run.get("name"), suite.get("name")) == ("run", "smoke")
    good, bad = suite.findall("testcase")
    assert (good.get("classname"), good.get("name")) == ("moe_fast.bf16.tp1", PLAIN)
    assert (bad.get("classname"), bad.get("time")) == ("moe_fast.bf16.tp2", "1.750")
    assert {one.get("name"): one.get("value") for one in bad.iter("property")} == {"stage": "down", "ratio": "41"}
    failure = bad.find("failure")
    assert failure is not None
    assert (failure.get("type"), failure.get("message")) == ("mismatch", "down: 41x over bound, expert 5")
    assert failure.text is not None
    assert failing(TP2).message in failure.text, "the whole message"
    assert failing(TP2).replay in failure.text
    assert good.find("failure") is None


def test_every_verdict_has_its_element_and_the_counts_are_those_of_the_elements() -> None:
    """Known failures and whatever did not run are skipped with a reason, never passed over in silence."""
    elements = {Verdict.PASS: None, Verdict.KNOWN_FAILURE: "skipped", Verdict.UNSUPPORTED: "skipped",
                Verdict.NOT_RUN: "skipped", Verdict.CRASH: "error", Verdict.HANG: "error",
                Verdict.HARNESS_ERROR: "error", Verdict.MISMATCH: "failure", Verdict.STRUCT: "failure",
                Verdict.NONDETERMINISTIC: "failure", Verdict.UNEXPECTED_PASS: "failure"}
    assert set(elements) == set(Verdict)
    assert {verdict for verdict, name in elements.items() if name == "skipped"} >= set(Verdict) - EXECUTED_VERDICTS - {
        Verdict.HARNESS_ERROR}
    lines = [idle(f"{SIZES}-s{number}", verdict, f"because {verdict}\nTraceback")
             for number, verdict in enumerate(Verdict, 1)]
    root = read(make_run(*lines))
    suite = root.findall("testsuite")[1]
    for case, verdict in zip(suite.findall("testcase"), Verdict, strict=True):
        found = [one for one in case if one.tag != "properties"]
        assert [one.tag for one in found] == [name for name in [elements[verdict]] if name]
        assert all(f"because {verdict}" in str(one.get("message")) for one in found)
    assert suite.attrib | {"tests": "11", "failures": "4", "errors": "3", "skipped": "3"} == suite.attrib
    for key in ("tests", "failures", "errors", "skipped"):
        assert int(root.attrib[key]) == sum(int(one.attrib[key]) for one in root.findall("testsuite"))


def test_what_makes_a_run_red_without_a_failing_case_is_a_failing_test() -> None:
    """A server that reads junit.xml alone must not show green for a run that was cut short or lost coverage."""
    run = make_run(passing(PLAIN), chosen=[PLAIN, TP4], minimum=2, ended=False)
    comparison = compare(run, baseline_of(make_run(passing(PLAIN), passing(TP2))))
    suite = ElementTree.fromstring("".join(junit(run, comparison)).encode())[0]
    assert [(one.get("name"), one[0].get("message")) for one in suite if len(one)] == [
        ("finished, and executed enough", "run was cut short, executed 1 of at least 2"),
        ("all cases of the baseline executed", "1 cases of the baseline did not run")]
    assert [len(one) for one in read(make_run(passing(PLAIN)))[0]] == [0, 0]


def test_tiers_and_lanes_are_suites_of_their_own() -> None:
    layers = make_run(passing(TP2), tier="layers", run="r2")
    layers.header = msgspec.structs.replace(layers.header, lane="gpu1")
    root = read(merge_runs([make_run(passing(PLAIN)), layers]))
    assert {suite.get("name"): [case.get("name") for case in suite] for suite in root[1:]} == {
        "smoke": [PLAIN], "layers (gpu1)": [TP2]}


def test_no_record_can_make_the_document_unreadable(tmp_path: Path) -> None:
    """Control characters and half surrogates, which XML cannot write at all; the end of a CDATA section; quotes."""
    hostile = "\x00\x1b[31m\ufffe]]>\"' onload='x' </testsuite>&amp;<![CDATA[ \ud800"
    line = msgspec.structs.replace(failing("v1-" + hostile), message=hostile + "\nmore " + hostile, replay=hostile)
    run = make_run(line, idle("other", "unsupported", hostile), tier=hostile)
    run.header = msgspec.structs.replace(run.header, started=hostile, implementation=msgspec.structs.replace(
        run.header.implementation, name=hostile))
    path = tmp_path / "junit.xml"
    path.write_text("".join(junit(run)), encoding="utf-8")
    root = ElementTree.parse(path).getroot()
    assert len(root.findall("testsuite")) == 2
    first = root[1][0]
    assert first.get("classname", "").endswith(".unreadable")
    text = first.findtext("failure", "")
    assert "]]>\"' onload='x' </testsuite>&amp;<![CDATA[ \ufffd" in text
    assert "\nmore \ufffd\ufffd[31m" in text
