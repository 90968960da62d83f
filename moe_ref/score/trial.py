"""One subject on some cases inside a forked process: the same request, measurement and verdict as in any run."""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import msgspec

from moe_ref.contract.case_id import parse_case
from moe_ref.contract.vocabulary import RED_VERDICTS, Ranks, Verdict
from moe_ref.records.schema import Implementation
from moe_ref.score.criteria import refused
from moe_ref.score.messages import Done, Job, Trial
from moe_ref.tiers.tiers import PlannedCase
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.child.execute import execute, run_job
from moe_ref.verify.child.messages import Request, unpack_runs
from moe_ref.verify.child.process_ranks import RankPool
from moe_ref.verify.run.case_runner import RunSettings, run_case
from moe_ref.verify.run.children import Answer, ChildHung
from moe_ref.verify.run.subjects import load_subject


class OwnProcess:
    """Stands where a pool of children stands; the process itself was forked for the subject."""

    def __init__(self, subject: ModuleType) -> None:
        self.subject, self.ranks = subject, RankPool(partial(run_job, subject))
        self.bits = ""

    @contextmanager
    def lease(self, process_ranks: bool) -> Iterator["OwnProcess"]:
        """Itself."""
        yield self

    def ask(self, request: Request, on_progress: Callable[[str], None] = lambda text: None) -> Answer:
        """What a child answers; keeps a digest of the first run's tensors."""
        reply, payload = execute(self.subject, request, on_progress, self.ranks)
        if reply.ranks[0].kind == "hang":
            raise ChildHung(reply.ranks[0].error)
        self.bits = hashlib.sha256(payload).hexdigest()[:16]
        return Answer(reply, unpack_runs(payload, len(reply.ranks)))


def try_cases(job: Job, send: Callable[[msgspec.Struct], None]) -> None:
    """Send a Trial for every case and Done; with `stop`, none after the first that is red."""
    if job.folder:
        sys.path.insert(0, job.folder)
    try:
        subject = load_subject(job.subject)
    except BaseException as error:  # also SyntaxError and the like, by the patch or by what it breaks
        return send(Done(failed=f"{type(error).__name__}: {error}"))
    pool = OwnProcess(subject)
    settings = RunSettings(run="score", implementation=Implementation(name=job.subject, version="1"),
                           capabilities=subject.CAPABILITIES, tolerances=load_tolerances(), device=job.device,
                           time_limit=job.seconds)
    left = job.criteria
    for place, one in enumerate(job.cases):
        began, pool.bits = time.monotonic(), ""
        planned = PlannedCase(case=parse_case(one.case), purpose="score", ranks=Ranks(one.ranks))
        line = run_case(planned, settings, pool)
        ends = job.stop and place >= job.unstopped and line.verdict in RED_VERDICTS
        asked = left > 0 and (ends or (not job.stop and line.verdict == Verdict.PASS))
        left -= asked
        try:
            others = refused(subject, one.case) if asked else {}
        except Exception as error:  # the judge's own, which must not pass for a catch
            pool.ranks.close()
            return send(Done(failed=f"criteria of other projects, {one.case}: {type(error).__name__}: {error}"))
        send(Trial(case=one.case, verdict=line.verdict, first_stage=line.first_stage or "", message=line.message,
                   bits=pool.bits, seconds=round(time.monotonic() - began, 2),
                   refused=others))
        if ends:
            break
    pool.ranks.close()
    return send(Done())
