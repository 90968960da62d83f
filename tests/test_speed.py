"""Speed beside the accepted one: a ratio to torch in the same run, told where it is slower, never failing a report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_ref.cli.report_commands import accept_command
from moe_ref.contract.errors import UsageValueError
from moe_ref.records.bench import BenchRun
from moe_ref.records.store import RecordWriter
from moe_ref.report.accept import accept_bench, accept_run
from moe_ref.report.baseline import baseline_of
from moe_ref.report.compare import compare
from moe_ref.report.evidence import Evidence
from moe_ref.report.head import exit_code, head_lines
from moe_ref.report.render import Report, render_evidence
from moe_ref.report.speed import SLOWER_FACTOR, Speed, compare_speed, compare_speeds
from moe_ref.report.speed_baseline import read_speed, speed_baseline_of, speed_path
from tests.made_benches import H100, make_bench, timing
from tests.made_records import PLAIN, make_run, passing

BEFORE = make_bench(timing("moe_fast", 50), timing("torch:loop", 400), timing("torch:grouped", 100))


def beside(now: BenchRun, before: BenchRun = BEFORE) -> Speed:
    return compare_speed(now, speed_baseline_of(before))


def slower_by(factor: float, spread: float = 0.02) -> tuple[int, int]:
    """How many are slower and faster where moe_fast takes `factor` times as long."""
    found = beside(make_bench(timing("moe_fast", 50 * factor, spread=spread), timing("torch:grouped", 100)))
    return len(found.slower), len(found.faster)


def reported(tmp_path: Path, bench: BenchRun, accepted: BenchRun) -> Report:
    """A report of one passing case and a benchmark against the accepted ones."""
    run = make_run(passing(PLAIN), device=H100["device"])
    accept_run(run, tmp_path / "baselines/moe_fast-nvidia-h100-80gb-hbm3.json").write()
    accept_bench(accepted, speed_path(accepted, tmp_path / "baselines")).write()
    return render_evidence(Evidence(run, bench=(bench,)), tmp_path / "out", tmp_path / "baselines")


def test_an_accepted_speed_is_a_ratio_to_the_fastest_of_torch() -> None:
    [entry] = speed_baseline_of(BEFORE).entries
    assert (entry.subject, entry.peer, entry.mode) == ("moe_fast", "torch:grouped", "graph")
    assert entry.ratio == (0.5, 0.48, 0.52)
    assert entry.of_limit == 0.5
    assert entry.place == "experts of mixtral.8x7b tp 8 at 256 tokens"


def test_slower_needs_the_factor_and_quartiles_that_lie_apart() -> None:
    assert slower_by(SLOWER_FACTOR - 0.01) == (0, 0)
    assert slower_by(SLOWER_FACTOR + 0.01) == (1, 0)
    assert slower_by(SLOWER_FACTOR + 0.01, spread=0.3) == (0, 0)
    assert slower_by(1 / (SLOWER_FACTOR + 0.01)) == (0, 1)


def test_a_slower_machine_is_no_slower_kernel() -> None:
    """Clocks move both, so that their ratio stays."""
    assert not beside(make_bench(timing("moe_fast", 150), timing("torch:grouped", 300))).slower


def test_what_was_not_taken_again_is_said_with_its_reason() -> None:
    peer = timing("torch:grouped", 100)
    for now, why in (
            (make_bench(peer), "not in this run"),
            (make_bench(timing("moe_fast", 1, status="WRONG", reason="ratio 40"), peer), "WRONG: ratio 40"),
            (make_bench(timing("moe_fast", 1, mode="eager", mode_reason="synchronises"), peer),
             "timed as eager, not as graph: synchronises"),
            (make_bench(timing("moe_fast", 50), timing("torch:loop", 400)), "torch:grouped was not timed beside it"),
            (make_bench(timing("moe_fast", 50), peer, dtype="fp16"), "timed in fp16")):
        if now.header.subjects[0] != "moe_fast":
            now.header.subjects.insert(0, "moe_fast")
        assert beside(now).missing == (("moe_fast: experts of mixtral.8x7b tp 8 at 256 tokens, bf16", why),)


def test_other_devices_and_hardware_classes_are_refused() -> None:
    for environment, said in (({"device": "NVIDIA B200"}, "device class 'nvidia-b200' .* 'nvidia-h100-80gb-hbm3'"),
                              ({"hardware": "cuda"}, "hardware class 'cuda' .* 'sm90'")):
        with pytest.raises(UsageValueError, match=said):
            beside(make_bench(timing("moe_fast", 50), timing("torch:grouped", 100), **environment))


def test_a_kernel_that_is_twice_as_slow_is_named_and_fails_nothing(tmp_path: Path) -> None:
    now = make_bench(timing("moe_fast", 100), timing("torch:grouped", 100))
    report = reported(tmp_path, now, BEFORE)
    words = "2.0x slower beside torch:grouped: experts of mixtral.8x7b tp 8 at 256 tokens, 0.50 -> 1.00 of its time"
    assert report.exit_code == 0
    assert "drift +0, 1 slower; vs" in report.head[0]
    assert report.head[3] == f"first nothing failed; {words}"
    markdown = (tmp_path / "out/summary.md").read_text()
    assert "## Slower: 1\n" in markdown
    assert " experts of mixtral.8x7b tp 8 at 256 tokens, bf16, graph | torch:grouped | 0.50 | 1.00 | 2.00 |" in markdown
    page = (tmp_path / "out/index.html").read_text()
    assert "Speed of moe_fast: 1 slower, 0 faster of 1" in page
    [speed] = json.loads((tmp_path / "out/report.json").read_text())["comparison"]["speed"]
    assert [change["now"] for change in speed["slower"]] == [1.0]


def test_times_of_a_cpu_are_shown_with_their_mark() -> None:
    before = make_bench(timing("moe_fast", 50), timing("torch:grouped", 100), evidence=False)
    now = make_bench(timing("moe_fast", 100), timing("torch:grouped", 100), evidence=False)
    run = make_run(passing(PLAIN))
    comparison = replace(compare(run, baseline_of(run)), speed=(beside(now, before),))
    head = head_lines(run, comparison)
    assert exit_code(run, comparison) == 0
    assert "1 slower (NO EVIDENCE: times of a CPU); vs" in head[0]
    assert head[3].endswith("0.50 -> 1.00 of its time (NO EVIDENCE: times of a CPU)")


def test_a_benchmark_is_accepted_as_a_run_is(tmp_path: Path) -> None:
    folder, path = tmp_path / "bench", tmp_path / "bench.json"
    with RecordWriter(folder) as writer:
        for line in (BEFORE.header, *BEFORE.limits.values(), *BEFORE.timings, *([BEFORE.end] if BEFORE.end else [])):
            writer.append(line)
    accepted = CliRunner().invoke(accept_command, [str(folder), "--baseline", str(path)])
    assert accepted.stdout.startswith("1 accepted speed\n")
    assert read_speed(path) == speed_baseline_of(BEFORE)
    again = accept_bench(make_bench(timing("moe_fast", 100), timing("torch:grouped", 100), torch="2.13.0"), path)
    assert again.words == (
        "1 accepted speed", "0 new, 0 gone",
        "2.0x slower beside torch:grouped: experts of mixtral.8x7b tp 8 at 256 tokens, 0.50 -> 1.00 of its time",
        "torch: 2.11.0 -> 2.13.0")
    both = CliRunner().invoke(accept_command, [str(folder), str(folder)])
    assert "is a benchmark, given with 1 other records" in str(both.exception)


def test_a_benchmark_that_says_nothing_is_not_accepted(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    with pytest.raises(UsageValueError, match="benchmark b1 was cut short"):
        accept_bench(make_bench(timing("moe_fast", 50), ended=False), path)
    with pytest.raises(UsageValueError, match=r"benchmark b1: 0 right times beside torch's"):
        accept_bench(make_bench(timing("moe_fast", 50)), path)
    path.write_text('{"schema": 1}')
    with pytest.raises(UsageValueError, match=r"bench\.json: Object missing required field"):
        read_speed(path)


def test_nothing_accepted_is_a_note(tmp_path: Path) -> None:
    found, [note] = compare_speeds((BEFORE,), tmp_path)
    assert found == ()
    assert note == ("no accepted speeds of moe_fast in bench-moe_fast-nvidia-h100-80gb-hbm3.json: nothing says whether "
                    "it is slower; `moe-ref accept BENCH` makes them")
