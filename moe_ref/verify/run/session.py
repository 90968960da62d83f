"""A run whose cases come one at a time, as a test runner hands them over."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_ref.contract.capabilities import Capabilities
from moe_ref.expectations.load import Expectations
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import RecordWriter
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.verify.run.case_runner import RunSettings, run_case
from moe_ref.verify.run.children import Child, ChildPool
from moe_ref.verify.run.environment import default_device
from moe_ref.verify.run.in_process import InProcess
from moe_ref.verify.run.run import Plan, end_line, new_header, run_settings
from moe_ref.verify.run.subjects import source_digest


@dataclass
class Session:
    """Settings, children and the record of a run in progress."""

    plan: Plan
    settings: RunSettings
    pool: ChildPool | InProcess
    writer: RecordWriter | None
    started: float = field(default_factory=time.monotonic)
    lines: list[CaseLine] = field(default_factory=list)

    @classmethod
    def start(cls, implementation: str, device: str = "auto", record: Path | None = None,
              expectations: Expectations | None = None) -> "Session":
        """Load the implementation in a child; raises UsageValueError when that fails."""
        torch.set_num_threads(1)
        pool, first = ChildPool(implementation), Child(implementation)
        capabilities = first.capabilities()
        pool.adopt(first)
        return cls._open(implementation, pool, capabilities, first.source_digest, device, record, expectations)

    @classmethod
    def in_process(cls, name: str, pool: InProcess, device: str = "auto", record: Path | None = None,
                   expectations: Expectations | None = None) -> "Session":
        """The same for a subject that is an object of this process, under a name for messages and the record."""
        return cls._open(name, pool, pool.subject.CAPABILITIES, source_digest(pool.subject), device, record,
                         expectations)

    @classmethod
    def _open(cls, implementation: str, pool: ChildPool | InProcess, capabilities: Capabilities, digest: str,
              device: str, record: Path | None, expectations: Expectations | None) -> "Session":
        device = default_device() if device == "auto" else device
        plan = Plan(implementation=implementation, cases=[], tier="", minimum_executed=0, device=device, record=record,
                    lane=os.environ.get("MOE_LANE", ""), expectations=expectations)
        header = new_header(plan, capabilities, digest)
        writer = RecordWriter(record) if record else None
        if writer:
            writer.append(header)
        return cls(plan, run_settings(plan, header, capabilities), pool, writer)

    def run(self, planned: PlannedCase) -> CaseLine:
        """Judge one case and put it on record."""
        line = run_case(planned, self.settings, self.pool)
        self.lines.append(line)
        if self.writer:
            self.writer.append(line)
        return line

    def close(self) -> None:
        """End the children and the record."""
        self.pool.close()
        if self.writer:
            self.writer.append(end_line(self.plan, self.settings.run, self.lines, time.monotonic() - self.started))
            self.writer.close()
