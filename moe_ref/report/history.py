"""Runs over time in an embedded database: a line per run, and the worst ratio of each class of cases and stage.

The file is SQLite's. It is refused where it is none of ours, of another version or damaged, and then never written.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.schema import CaseLine
from moe_ref.records.store import Run
from moe_ref.report.axes import read_case
from moe_ref.report.baseline import device_class
from moe_ref.report.facts import case_lines, is_executed, is_red, ratio_of

APPLICATION, VERSION = 0x6D6F6568, 1
"""PRAGMA application_id ("moeh") and user_version; the version changes with the tables."""

WATCHED = ("device", "driver", "torch", "triton", "cuda", "hardware", "tolerances")
"""What a change of results may come from besides the implementation."""

SHARDS = "+"
"""Between the ids of shards in that of the run which they make."""

_WAIT_SECONDS = 30.0
_TABLES = (
    "CREATE TABLE runs (run TEXT PRIMARY KEY, started TEXT NOT NULL, implementation TEXT NOT NULL, "
    "version TEXT NOT NULL, source TEXT NOT NULL, commit_name TEXT NOT NULL, device_class TEXT NOT NULL, "
    "device TEXT NOT NULL, driver TEXT NOT NULL, torch TEXT NOT NULL, triton TEXT NOT NULL, cuda TEXT NOT NULL, "
    "hardware TEXT NOT NULL, tolerances TEXT NOT NULL, tier TEXT NOT NULL, lane TEXT NOT NULL)",
    "CREATE TABLE verdicts (run TEXT NOT NULL, verdict TEXT NOT NULL, cases INTEGER NOT NULL, "
    "PRIMARY KEY (run, verdict))",
    "CREATE TABLE ratios (run TEXT NOT NULL, dtype TEXT NOT NULL, tp INTEGER NOT NULL, ep INTEGER NOT NULL, "
    "pattern TEXT NOT NULL, stage TEXT NOT NULL, worst REAL, cases INTEGER NOT NULL, failures INTEGER NOT NULL, "
    "PRIMARY KEY (run, dtype, tp, ep, pattern, stage))")


class PastRun(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a run line; words that were not recorded are empty. tolerances: their digest."""

    run: str
    started: str
    implementation: str
    version: str
    source: str
    commit_name: str
    device_class: str
    device: str
    driver: str
    torch: str
    triton: str
    cuda: str
    hardware: str
    tolerances: str
    tier: str
    lane: str


class PastRatio(msgspec.Struct, frozen=True, array_like=True):
    """One class of cases at one stage: the worst ratio, how many cases showed the stage, how many failed first there.

    stage: "" for red cases without a failing stage (a crash), of which worst is None.
    """

    run: str
    dtype: str
    tp: int
    ep: int
    pattern: str
    stage: str
    worst: float | None
    cases: int
    failures: int

    @property
    def group(self) -> str:
        """The class in words, as "bf16 tp4 ep1 uniform"."""
        return f"{self.dtype} tp{self.tp} ep{self.ep} {self.pattern}"


class Past(msgspec.Struct, frozen=True):
    """Runs from the oldest to the newest, their ratios, and their cases by verdict."""

    runs: tuple[PastRun, ...]
    ratios: tuple[PastRatio, ...]
    verdicts: dict[str, dict[str, int]]


def past_run(run: Run) -> PastRun:
    """What is kept of a run's first line. Raises UsageValueError where it names no device."""
    header, facts = run.header, run.header.environment
    return PastRun(
        run=header.run, started=header.started, implementation=header.implementation.name,
        version=header.implementation.version, source=header.implementation.source_digest,
        commit_name=facts.get("commit", ""), device_class=device_class(header), device=facts.get("device", ""),
        driver=facts.get("driver", ""), torch=facts.get("torch", ""), triton=facts.get("triton", ""),
        cuda=facts.get("cuda", ""), hardware=facts.get("hardware", ""), tolerances=header.tolerances_digest,
        tier=header.tier, lane=header.lane)


def past_ratios(run: Run) -> list[PastRatio]:
    """The worst ratio of every class and stage, of the cases that ran."""
    worst: dict[tuple[str, int, int, str, str], float] = {}
    cases, failures = Counter[tuple[str, int, int, str, str]](), Counter[tuple[str, int, int, str, str]]()
    for line in case_lines(run).values():
        if not is_executed(line):
            continue
        group, shown = _group(line), {stage.stage for stage in line.stages}
        for stage in line.stages:
            key = (*group, stage.stage)
            worst[key] = max(worst.get(key, 0.0), ratio_of(stage.ratio))
            cases[key] += 1
        if is_red(line):
            first = line.first_stage if line.first_stage in shown else ""
            failures[*group, first or ""] += 1
            cases[*group, ""] += not first
    return [PastRatio(run.header.run, *key, worst.get(key), cases[key], failures[key])
            for key in sorted(cases | failures)]


def _group(line: CaseLine) -> tuple[str, int, int, str]:
    case = read_case(line.case)
    if case is None:
        return "?", 0, 0, "unreadable"
    return str(case.problem.dtype), case.parallel.tp, case.parallel.ep, str(case.problem.pattern)


def add_runs(path: Path, runs: Sequence[Run]) -> list[str]:
    """Store runs, all or none; one that is there already is replaced by what its records say now.

    Returns "added", "replaced" or "unchanged" for each. Raises UsageValueError where the file is no database of ours,
    or holds another run under the same id.
    """
    with _opened(path, create=True) as database, database:
        database.execute("BEGIN IMMEDIATE")
        if _is_new(database):
            for statement in (f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {VERSION}", *_TABLES):
                database.execute(statement)
        _check(path, database)
        return [_add(path, database, run) for run in runs]


def up_to(past: Past, run: Run) -> Past:
    """The history before a run, without its own shards, and that run as its records are now; nothing is stored."""
    now, verdicts = past_run(run), Counter(str(line.verdict) for line in case_lines(run).values())
    own = {now.run, *now.run.split(SHARDS)}
    runs = [one for one in past.runs if one.run not in own and (one.started, one.run) < (now.started, now.run)]
    earlier = {one.run for one in runs}
    ratios = [one for one in past.ratios if one.run in earlier] + past_ratios(run)
    return Past((*runs, now), tuple(ratios), past.verdicts | {now.run: dict(verdicts)})


def _add(path: Path, database: sqlite3.Connection, run: Run) -> str:
    now, ratios = past_run(run), past_ratios(run)
    verdicts = Counter(str(line.verdict) for line in case_lines(run).values())
    before = _read(path, database, (now.run,))
    if before.runs and (before.runs[0].started, before.runs[0].implementation) != (now.started, now.implementation):
        known = before.runs[0]
        raise UsageValueError(f"{path}: run {now.run} of {now.implementation}, started {now.started}, but the database "
                              f"holds one of {known.implementation}, started {known.started}, under the same id")
    if before.runs and before == Past((now,), tuple(ratios), {now.run: dict(sorted(verdicts.items()))}):
        return "unchanged"
    for table in ("runs", "verdicts", "ratios"):
        database.execute(f"DELETE FROM {table} WHERE run = ?", (now.run,))
    _insert(database, "runs", [msgspec.structs.astuple(now)])
    _insert(database, "verdicts", [(now.run, verdict, count) for verdict, count in verdicts.items()])
    _insert(database, "ratios", [msgspec.structs.astuple(one) for one in ratios])
    return "replaced" if before.runs else "added"


def _insert(database: sqlite3.Connection, table: str, rows: Sequence[tuple[object, ...]]) -> None:
    if rows:
        marks = ", ".join("?" * len(rows[0]))
        database.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)


def read_past(path: Path) -> Past:
    """Everything in a database; raises UsageValueError where the file is none of ours."""
    with _opened(path, create=False) as database:
        _check(path, database)
        return _read(path, database, ())


def _read(path: Path, database: sqlite3.Connection, run: tuple[str, ...]) -> Past:
    """All runs, or the one that is named. SQLite stores what it is given, so every value's type is looked at."""
    where = " WHERE run = ?" * len(run)
    rows = {table: database.execute(f"SELECT * FROM {table}{where} ORDER BY {order}", run).fetchall()
            for table, order in (("runs", "started, run"), ("ratios", "run, dtype, tp, ep, pattern, stage"),
                                 ("verdicts", "run, verdict"))}
    verdicts: dict[str, dict[str, int]] = {}
    try:
        for name, verdict, cases in msgspec.convert(rows["verdicts"], list[tuple[str, str, int]]):
            verdicts.setdefault(name, {})[verdict] = cases
        runs, ratios = msgspec.convert((rows["runs"], rows["ratios"]),
                                       tuple[tuple[PastRun, ...], tuple[PastRatio, ...]])
    except msgspec.ValidationError as error:
        raise UsageValueError(f"{path}: not what this history holds: {error}") from error
    return Past(runs, ratios, verdicts)


@contextmanager
def _opened(path: Path, create: bool) -> Iterator[sqlite3.Connection]:
    """A connection whose errors name the file."""
    if path.is_dir() or (not path.exists() and not create):
        raise UsageValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}, but should be a history; "
                              "`moe-ref history add RUN --database FILE` begins one")
    mode = "rwc" if create else "ro"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_WAIT_SECONDS,
                                     isolation_level=None)) as database:
            yield database
    except sqlite3.Error as error:
        raise UsageValueError(f"{path}: {error}; left as it is") from error


def _is_new(database: sqlite3.Connection) -> bool:
    """Whether nobody has written anything yet."""
    return not any(database.execute(what).fetchone()[0] for what in (
        "SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version"))


def _check(path: Path, database: sqlite3.Connection) -> None:
    """Refuse what others wrote, other versions and damage."""
    application, version = (database.execute(f"PRAGMA {name}").fetchone()[0]
                            for name in ("application_id", "user_version"))
    if application != APPLICATION:
        raise UsageValueError(f"{path}: a database of something else (application_id {application}), but should be a "
                              "history; left as it is")
    if version != VERSION:
        raise UsageValueError(f"{path}: history version {version}, but this version of moe-ref reads {VERSION}; "
                              "left as it is")
    found = [row[0] for row in database.execute("PRAGMA quick_check(3)")]
    if found != ["ok"]:
        raise UsageValueError(f"{path}: damaged: {'; '.join(map(str, found))}; left as it is")
