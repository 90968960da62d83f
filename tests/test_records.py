"""Protects the record file, the only bridge between a run and its reports: stable names, strict reading, resuming."""

import math
from pathlib import Path

import msgspec
import pytest

from moe_ref.contract.errors import UsageValueError
from moe_ref.records.error_map import ErrorMap
from moe_ref.records.schema import (
    SCHEMA,
    CaseLine,
    CollectiveCount,
    DiagnosisLine,
    EndLine,
    Implementation,
    MutantLine,
    RunLine,
    SemanticLine,
    StageResult,
    Statistic,
    Worst,
    from_number,
    to_number,
)
from moe_ref.records.store import FILE_NAME, RecordWriter, read_run

WHO = Implementation(name="moe_fast", version="0.1.0", source_digest="0123456789abcdef")
RUN = RunLine(run="r1", started="2026-01-02T03:04:05Z", implementation=WHO, tier="smoke", cases=["v1-a", "v1-b"],
              minimum_executed=2, axis_pairs=(3, 4), environment={"python": "3.11"}, tolerances_digest="d",
              oracle_version="0.1.0")
END = EndLine(run="r1", finished="2026-01-02T03:05:05Z", seconds=60.0, verdicts={"pass": 2}, executed=2, exit_code=0)


def case_line(case: str, verdict: str = "pass", **fields: object) -> CaseLine:
    """A case line of run r1."""
    return CaseLine(run="r1", case=case, purpose="why", implementation=WHO, ranks="local", device="cpu",
                    verdict=verdict, **fields)


FULL = case_line(
    "v1-a", "mismatch", reason="act: 2x", first_stage="act", guard={"poison": "nan"}, runs=2, same_bits=True,
    numerics={"act": "bf16"}, power=12.5, mutants={"k_tile": MutantLine(factor=3.0, where="act")}, signal=26.0,
    semantic=[SemanticLine(stage="act", subject_share=0.5, sibling_share=0.25, ratio=4.0)],
    diagnosis=DiagnosisLine(fault="f", share=0.75, next_share=0.125), inputs_digest="e", subject_seconds=0.5,
    oracle_seconds=0.25, message="m", replay="moe-ref replay v1-a",
    collectives=[CollectiveCount(operation="all_reduce", calls=1, num_elements=4, num_bytes=8)],
    stages=[StageResult(stage="act", ratio="inf", num_checked=4, num_bad=1, bias=0.5, scale=1.0, num_bad_tokens=1,
                        bad_tokens=[3], bad_experts=[1], bad_ranks=[0], bad_tiles=[2], num_tiles=3, note="n",
                        bound_ratio=0.5, sigmas=40.0, error_map=ErrorMap(
                            rows="r", num_rows=3, num_columns=2, row_step=1, column_step=1, cells="x",
                            experts=[(0, 1)], ranks=[(1, 1)], row_ranks=[(2, 0)], profile="y", tails=[16]),
                        statistics=[Statistic(
                            name="slots", value=9.0, allowed=7.0, number=4, token=3, expert=1)],
                        worst=Worst(rank=0, token=3, slot=1, expert=1, column=130, got="nan", want=1.0,
                                    allowed=0.25))])

GOLDEN = (
    b'{"type":"case","schema":2,"run":"r1","case":"v1-a","purpose":"why","implementation":{"name":"moe_fast","vers'
    b'ion":"0.1.0","source_digest":"0123456789abcdef"},"ranks":"local","device":"cpu","verdict":"mismatch","reason'
    b'":"act: 2x","first_stage":"act","stages":[{"stage":"act","ratio":"inf","bound_ratio":0.5,"exact":false,"num_'
    b'checked":4,"num_bad":1,"worst":{"rank":0,"token":3,"row":null,"slot":1,"expert":1,"column":130,"got":"nan","'
    b'want":1.0,"allowed":0.25},"num_bad_tokens":1,"bad_tokens":[3],"bad_experts":[1],"bad_ranks":[0],"bad_tiles":'
    b'[2],"num_tiles":3,"sigmas":40.0,"statistics":[{"name":"slots","value":9.0,"allowed":7.0,"number":4,"token":3'
    b',"expert":1,"rank":null}],"bias":0.5,"scale":1.0,"bits":0.0,"note":"n","error_map":{"rows":"r","num_rows":3,"num_colum'
    b'ns":2,"row_step":1,"column_step":1,"cells":"x","experts":[[0,1]],"ranks":[[1,1]],"row_ranks":[[2,0]],"profil'
    b'e":"y","tails":[16]}}],"collectives":[{"operation":"all_reduce","calls":1,"num_elements":4,"num_bytes":8}],"guard":{"poison":"nan"},"runs":2,"same_bits":true,"batches":{},"numer'
    b'ics":{"act":"bf16"},"power":12.5,"mutants":{"k_tile":{"factor":3.0,"where":"act"}},"signal":26.0,"semantic":'
    b'[{"stage":"act","subject_share":0.5,"sibling_share":0.25,"ratio":4.0}],"diagnosis":{"fault":"f","share":0.75'
    b',"next_share":0.125},"inputs_digest":"e","subject_seconds":0.5,"oracle_seconds":0.25,"message":"m","replay":'
    b'"moe-ref replay v1-a"}')
"""A case line of schema 2, byte by byte. A change of a name or meaning here needs a new schema number."""


def test_names_of_fields_are_stable() -> None:
    """Dashboards read these names."""
    assert msgspec.json.encode(FULL) == GOLDEN
    assert msgspec.json.decode(GOLDEN, type=CaseLine) == FULL
    run, end = (msgspec.json.decode(msgspec.json.encode(line)) for line in (RUN, END))
    assert list(run) == ["type", "schema", "run", "started", "implementation", "tier", "cases", "minimum_executed",
                         "axis_pairs", "environment", "tolerances_digest", "oracle_version", "lane", "tolerances",
                         "expectations"]
    assert list(end) == ["type", "schema", "run", "finished", "seconds", "verdicts", "executed", "exit_code",
                         "stale"]
    assert (run["type"], end["type"], SCHEMA) == ("run", "end", 2)


def test_a_record_from_before_diagnoses_is_read() -> None:
    """The field is new in schema 2 and has a default."""
    old = GOLDEN.replace(b'"diagnosis":{"fault":"f","share":0.75,"next_share":0.125},', b"")
    assert len(old) < len(GOLDEN)
    assert msgspec.json.decode(old, type=CaseLine) == msgspec.structs.replace(FULL, diagnosis=None)


def written(folder: Path, *lines: RunLine | CaseLine | EndLine) -> Path:
    """A record of these lines."""
    with RecordWriter(folder) as writer:
        for line in lines:
            writer.append(line)
    return folder / FILE_NAME


def test_a_run_survives_the_file(tmp_path: Path) -> None:
    """Header, cases by id, end; read from the file or from its folder."""
    path = written(tmp_path, RUN, FULL, case_line("v1-b"), END)
    for where in (path, tmp_path):
        run = read_run(where)
        assert (run.header, run.end) == (RUN, END)
        assert run.cases == {"v1-a": FULL, "v1-b": case_line("v1-b")}


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0**-10, math.inf, -math.inf, math.nan])
def test_numbers_survive_json(value: float) -> None:
    """JSON has no NaN and no infinity; the record has words for them."""
    written_value = msgspec.json.decode(msgspec.json.encode(to_number(value)), type=float | str)
    back = from_number(written_value)
    assert (math.isnan(back) and math.isnan(value)) or back == value


def test_numbers_keep_nine_digits() -> None:
    """Enough to name any fp32 number exactly."""
    assert to_number(1 / 3) == 0.333333333


def test_a_torn_last_line_is_dropped_and_the_run_resumes(tmp_path: Path) -> None:
    """A kill in the middle of a write costs one case: it is judged again, and nothing after it is lost."""
    path = written(tmp_path, RUN, case_line("v1-a"))
    whole = path.read_bytes()
    path.write_bytes(whole + GOLDEN[:100])
    assert set(read_run(path).cases) == {"v1-a"}
    written(tmp_path, case_line("v1-b"), END)
    assert path.read_bytes().startswith(whole + b'{"type":"case"')
    run = read_run(path)
    assert set(run.cases) == {"v1-a", "v1-b"}
    assert run.end == END


def test_the_last_line_of_a_case_counts(tmp_path: Path) -> None:
    """Judged again after a kill; an end line before that is no longer the end."""
    path = written(tmp_path, RUN, case_line("v1-a", "hang"), END, case_line("v1-a", "pass"))
    run = read_run(path)
    assert run.cases["v1-a"].verdict == "pass"
    assert run.end is None


def test_each_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    """Read while the writer is still open."""
    with RecordWriter(tmp_path) as writer:
        writer.append(RUN)
        assert read_run(tmp_path).header == RUN
        writer.append(FULL)
        assert read_run(tmp_path).cases == {"v1-a": FULL}


@pytest.mark.parametrize(("content", "words"), [
    (b'{"type":"case","schema":2}\n', ":1: "),
    (msgspec.json.encode(RUN) + b"\n" + GOLDEN.replace(b'"schema":2', b'"schema":1') + b"\n", ":2: schema 1"),
    (msgspec.json.encode(RUN) + b"\nnot json\n", ":2: "),
    (msgspec.json.encode(RUN) + b"\n" + GOLDEN.replace(b'"type":"case"', b'"type":"note"') + b"\n", ":2: "),
    (msgspec.json.encode(RUN) + b"\n" + GOLDEN.replace(b'"runs":2', b'"runs":"two"') + b"\n", ":2: "),
    (GOLDEN + b"\n", ":1: a CaseLine before the run line"),
    (msgspec.json.encode(RUN) + b"\n" + msgspec.json.encode(RUN).replace(b'"r1"', b'"r2"') + b"\n",
     ":2: run r2, but the file holds run r1"),
    (b"", "holds no run line"),
])
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    """A reader that guesses would report numbers nobody measured."""
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(UsageValueError) as caught:
        read_run(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def test_a_line_of_another_run_is_refused(tmp_path: Path) -> None:
    """Two runs appended to one file must not be reported as one."""
    stranger = msgspec.structs.replace(case_line("v1-b"), run="r2")
    with pytest.raises(UsageValueError, match="r2"):
        read_run(written(tmp_path, RUN, stranger))


def test_no_file_is_wrong_use(tmp_path: Path) -> None:
    """Named by its path."""
    with pytest.raises(UsageValueError, match="no such record file"):
        read_run(tmp_path / "elsewhere.jsonl")
