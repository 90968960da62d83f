"""The whole flow of one case without a child process: the same request, reply, measurement and verdict."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from moe_ref.contract.case_id import parse_case
from moe_ref.records.schema import CaseLine, Implementation
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.run import case_runner
from moe_ref.verify.run.case_runner import RunSettings, run_case
from moe_ref.verify.run.in_process import InProcess


def judged(subject: Any, case_id: str, runs: int = 2, other_batches: bool = False, **others: Any) -> CaseLine:
    """The record line of one case; `subject` has `moe` and `CAPABILITIES`; others: of the run's settings."""
    implementation = Implementation(name=type(subject).__name__, version="1")
    settings = RunSettings(run="test", implementation=implementation, capabilities=subject.CAPABILITIES, device="cpu",
                           runs=runs, **{"tolerances": load_tolerances(), **others})
    pool = InProcess(SimpleNamespace(moe=subject.moe, CAPABILITIES=subject.CAPABILITIES))
    planned = PlannedCase(case=parse_case(case_id), purpose="test", other_batches=other_batches)
    return run_case(planned, settings, pool)


def verdict(subject: Any, case_id: str) -> CaseLine:
    """The same of one run without a diagnosis: what is said of a mismatch beside its verdict takes most of the time."""
    with patch.multiple(case_runner, diagnosable=lambda case: False, small_enough=lambda case: False):
        return judged(subject, case_id, runs=1)
