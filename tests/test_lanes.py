"""Protects the file of lanes: it is read strictly, what is wrong in it is named, and every lane has a minimum."""

from pathlib import Path

import msgspec
import pytest

from moe_ref.contract.errors import UsageValueError
from moe_ref.lanes.load import load_lanes
from moe_ref.lanes.schema import Counts
from tests.made_lanes import TEXT
from tests.test_imports import forbidden


def test_this_repository_has_the_lanes_that_ci_is_made_of() -> None:
    """A lane that goes is a decision: it would be lost without a trace otherwise."""
    wanted = {"cpu", "interpreter", "compile", "studies", "score-sample", "divergence", "gpu1", "gpuN", "sanitizer"}
    assert wanted <= load_lanes().lanes.keys()


@pytest.mark.parametrize(("old", "new", "line", "said"), [
    pytest.param("minutes: 5", "minutes: 5\n    retries: 2", 11, "lanes.cpu.retries: unknown key", id="unknown key"),
    pytest.param("    forks: true\n", "", 6, "lanes.cpu: forks is missing", id="missing key"),
    pytest.param("minutes: 5", "minutes: soon", 10, "lanes.cpu.minutes", id="wrong type"),
    pytest.param("minimum: 2}", "minimum: 0}", 8, "lanes.cpu.counts.minimum", id="a minimum of nothing"),
    pytest.param("minutes: 5", "minutes: 5\n    minutes: 6", 11, "duplicate key", id="duplicate key"),
    pytest.param("what: cases, minimum: 2}", "what: luck, minimum: 2}", 8, "lanes.cpu.counts.what", id="unknown count"),
    pytest.param("label: gpu\n", "label: \"x') || true || ('\"\n", 2, "label", id="a label that is no word"),
    pytest.param("purpose: tests", "purpose: \"a\\n  - run: b\"", 6, "lanes.cpu.purpose", id="a purpose of two lines"),
    pytest.param("  cpu:\n", "  \"a;b\":\n", 5, "letters and digits", id="a name that is no name of a job"),
    pytest.param("triggers: [label, nightly]", "triggers: [push]", 18, "machine of one's own", id="GPU on every push"),
    pytest.param("forks: false", "forks: true", 18, "trusts forks", id="forks on one's own machine"),
    pytest.param("runners: [self-hosted, gpu]", "runners: [ubuntu-latest]", 18, "should go together",
                 id="workflow and runner"),
    pytest.param("bash ci/gpu {record}", "bash ci/gpu runs", 18, "without {record}", id="nothing to count"),
    pytest.param("43 4 * * 0", "17 2 * * *", 3, "should differ", id="one cron line for two events"),
    pytest.param("schema: 1", "schema: 2", 1, "schema", id="another schema"),
    pytest.param("paths: []", "paths: &x []", 1, "", id="nothing wrong with an anchor alone"),
])
def test_what_is_wrong_in_the_file_is_named(lanes_file: Path, old: str, new: str, line: int, said: str) -> None:
    """File, line and key, before anything runs."""
    lanes_file.write_text(TEXT.replace(old, new, 1))
    if not said:
        load_lanes(lanes_file)
        return
    with pytest.raises(UsageValueError) as caught:
        load_lanes(lanes_file)
    assert f"{lanes_file}:{line}: " in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_is_no_yaml_or_not_there(lanes_file: Path) -> None:
    lanes_file.write_text("lanes: [")
    with pytest.raises(UsageValueError, match=r"lanes.yaml:1"):
        load_lanes(lanes_file)
    with pytest.raises(UsageValueError, match="No such file"):
        load_lanes(lanes_file.with_name("none.yaml"))


def test_lanes_need_no_torch() -> None:
    """They are chosen and reported where nothing is installed that could run them."""
    assert forbidden(("moe_ref/lanes", "moe_ref/cli/lane_commands.py", "moe_ref/cli/lane_options.py"),
                     ("torch", "triton", "moe_ref.verify", "moe_ref.oracle", "moe_ref.tiers")) == []


def test_counts_have_a_minimum() -> None:
    """A lane that may execute nothing would be green without having run."""
    assert all(one.counts.minimum > 0 for one in load_lanes().lanes.values())
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"what": "cases", "minimum": 0}, Counts)
