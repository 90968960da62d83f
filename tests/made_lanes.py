"""A file of two lanes, for tests: cpu on every push, gpu1 on label and at night; its fixtures are conftest's."""

from pathlib import Path

import pytest

from moe_ref.lanes.load import load_lanes
from moe_ref.lanes.schema import LanesFile

TEXT = """\
schema: 1
label: gpu
schedules: {nightly: "17 2 * * *", weekly: "43 4 * * 0"}
lanes:
  cpu:
    purpose: tests
    command: "{python} -c pass {record}"
    counts: {what: cases, minimum: 2}
    device: {gpus: 0, architecture: any, programs: []}
    minutes: 5
    workflow: cpu
    triggers: [push, pull_request]
    paths: []
    runners: [ubuntu-latest]
    forks: true
    baseline: ""
    keep_days: 14
  gpu1:
    purpose: one GPU
    command: bash ci/gpu {record}
    counts: {what: cases, minimum: 250}
    device: {gpus: 1, architecture: any, programs: []}
    minutes: 15
    workflow: gpu
    triggers: [label, nightly]
    paths: ["moe_fast/**", tolerances.yaml]
    runners: [self-hosted, gpu]
    forks: false
    baseline: ""
    keep_days: 30
"""


@pytest.fixture
def lanes_file(tmp_path: Path) -> Path:
    """The file, written."""
    path = tmp_path / "lanes.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def two_lanes(lanes_file: Path) -> LanesFile:
    """The same, read."""
    return load_lanes(lanes_file)
