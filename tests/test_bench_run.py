"""Protects a run of `moe-ref bench`: who is timed and who is not, what is recorded, and that a CPU is no evidence."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from moe_ref.bench import run as bench_run
from moe_ref.bench import torch_layers
from moe_ref.bench.problem import Operation
from moe_ref.bench.run import BenchPlan, run_bench
from moe_ref.bench.subjects import find_subject
from moe_ref.cli.bench_commands import bench_command
from moe_ref.contract.errors import UsageValueError
from moe_ref.records.bench import BenchLine, BenchRecordLine, BenchRun, TimingLine, add_line, read_bench
from moe_ref.report.bench import NO_EVIDENCE, bench_document, bench_words, of_limit, timing_tables
from moe_ref.report.bench_plot import plot_bench

PLAN = BenchPlan(subjects=("torch:grouped",), models=("olmoe.1b.7b.E4",), tp=(32,), tokens=(3,),
                 operations=(Operation.EXPERTS,))
ENVIRONMENT = {"device": "cpu"}


def variant(name: str, change: Any, **declared: Any) -> SimpleNamespace:
    """An implementation that spoils what a right one returns."""
    def moe(*arguments: Any, **keywords: Any) -> Any:
        return change(torch_layers.loop.moe(*arguments, **keywords))
    return SimpleNamespace(moe=moe, CAPABILITIES=replace(torch_layers.loop.CAPABILITIES, name=name, **declared))


def explode(y_TH: torch.Tensor) -> torch.Tensor:
    """Breaks."""
    raise ArithmeticError("no good\nat all")


wrong = variant("wrong", lambda y_TH: y_TH / 2)
broken = variant("broken", explode)
silent = variant("silent", lambda y_TH: None)
forward_only = variant("forward_only", lambda y_TH: y_TH, directions=("fwd",))
nothing_given = variant("nothing_given", lambda y_TH: y_TH, injected_routing=False)


def recorded(plan: BenchPlan) -> tuple[int, BenchRun]:
    """The exit code, and the run as its lines tell it."""
    lines: list[BenchRecordLine] = []
    code = run_bench(plan, ENVIRONMENT, lines.append)
    assert isinstance(lines[0], BenchLine)
    run = BenchRun(lines[0])
    for line in lines[1:]:
        add_line(run, line)
    return code, run


def shown(run: BenchRun) -> str:
    """What a terminal gets."""
    console = Console(width=200, record=True, file=io.StringIO())
    for table in timing_tables(run):
        console.print(table.on_screen())
    return console.export_text() + "\n".join(bench_words(run))


def test_who_is_wrong_is_not_ranked() -> None:
    """It has no time, no rate and no place beside the others, the exit code is 1, and the others are timed."""
    code, run = recorded(replace(PLAN, subjects=(f"{__name__}:wrong", "torch:grouped")))
    bad, good = run.timings
    assert (code, bad.status, good.status) == (1, "WRONG", "TIMED")
    assert float(bad.ratio) > 1 > float(good.ratio) > 0
    assert (bad.repetitions, bad.kernels, math.isnan(float(bad.seconds[0]))) == (0, [], True)
    row = next(line for line in shown(run).splitlines() if f"{__name__}:wrong" in line and "WRONG" in line)
    assert " us" not in row
    assert " ms" not in row
    document: Any = bench_document(run)
    assert "of_limit" not in document["timings"][0]
    assert document["timings"][1]["times_the_first"] is None


@pytest.mark.parametrize(("name", "operation", "status", "words"), [
    ("broken", Operation.EXPERTS, "CRASHED", "ArithmeticError: no good"),
    ("silent", Operation.EXPERTS, "CRASHED", "returned NoneType, but should return a tensor"),
    ("forward_only", Operation.BACKWARD, "NOT RUN", "not declared: direction bwd"),
    ("nothing_given", Operation.EXPERTS, "NOT RUN", "not declared: an injected routing")])
def test_who_is_not_timed_says_why(name: str, operation: Operation, status: str, words: str) -> None:
    """A crash is a failure; what is not declared is not."""
    code, run = recorded(replace(PLAN, subjects=(f"{__name__}:{name}", "torch:loop"), operations=(operation,)))
    assert code == (1 if status == "CRASHED" else 0)
    assert (run.timings[0].status, run.timings[0].reason) == (status, words)
    assert run.timings[1].status == "TIMED"
    assert f"{status} {__name__}:{name}: {words}" in bench_words(run)


@pytest.mark.parametrize("peer", ["vllm", "triton_kernels"])
def test_a_peer_that_is_not_installed_is_counted_once(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shapes there are; nothing of it is imported unless it is named."""
    for module in (peer, "vllm", "triton_kernels"):
        monkeypatch.setitem(sys.modules, module, None)
    code, run = recorded(replace(PLAN, subjects=("torch:grouped", peer), tokens=(1, 3)))
    assert code == 0
    assert run.end is not None
    assert run.end.verdicts == {"NOT INSTALLED": 1, "TIMED": 2}
    assert bench_words(run)[0].startswith(f"NOT INSTALLED {peer}: not installed: ")


def test_no_peer_is_imported_unasked() -> None:
    """Importing vLLM alone takes seconds and may take the device's memory."""
    script = ("import sys, moe_ref.bench.run, moe_ref.bench.peers\n"
              "print([one for one in ('vllm', 'triton_kernels', 'triton') if one in sys.modules])")
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_record_is_shown_without_torch() -> None:
    """On a machine that has nothing but the record."""
    script = "import sys, moe_ref.cli.bench_commands; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"


def test_an_installed_peer_is_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a peer's own code gets and returns: w13 as (E, 2I, H), ids, fp32 weights; then it is judged as everybody."""
    def fused_experts(x_TH: Any, w13: Any, w2: Any, weights_TK: Any, ids_TK: Any) -> torch.Tensor:
        assert (w13.shape, w2.shape) == ((4, 64, 2048), (4, 2048, 32))
        assert (weights_TK.dtype, ids_TK.dtype) == (torch.float32, torch.int32)
        weights = torch_layers.MoEWeights(w13_EGIH=w13.unflatten(1, (2, 32)), w2_EHI=w2)
        return torch_layers.loop_experts(x_TH, torch_layers.Routing(ids_TK, weights_TK), weights, spec)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0"))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.fused_moe",
                        SimpleNamespace(fused_experts=fused_experts))  # type: ignore[arg-type]
    from moe_ref.bench.problem import draw_batch, draw_probes, draw_weights, rank_layer
    layer = rank_layer(PLAN.models[0], 32, PLAN.dtype)
    spec, weights = layer.spec, draw_weights(layer, "cpu")
    batch = draw_batch(layer, weights, draw_probes(layer, weights, "cpu"), 3, "cpu")
    peer = find_subject("vllm")
    assert peer.refusal(layer, Operation.EXPERTS, "cuda") == ""
    assert peer.refusal(layer, Operation.EXPERTS, "cpu") == "not declared: device cpu"
    assert "its own router" in peer.refusal(layer, Operation.LAYER, "cuda")
    got = peer.call(Operation.EXPERTS, layer, weights, batch)()
    assert torch.equal(got, torch_layers.loop.moe(batch.x_TH, weights, spec, routing=batch.routing))


def test_what_does_not_fit_is_said_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtral at tp 1 has 2.6 GiB of weights; where 1 GiB is free nothing is allocated."""
    monkeypatch.setattr(bench_run, "free_bytes", lambda device: 2**30)
    monkeypatch.setattr(bench_run, "draw_weights", None)
    code, run = recorded(replace(PLAN, models=("mixtral.8x7b",), tp=(1,), tokens=(1, 8)))
    assert code == 4
    assert [line.status for line in run.timings] == ["NOT RUN"] * 2
    assert run.timings[0].reason == "does not fit: needs about 2.6 GiB, and 1.0 GiB are free"


def test_nothing_is_started_after_the_deadline() -> None:
    """Shapes that are left are recorded, not forgotten."""
    code, run = recorded(replace(PLAN, tokens=(1, 3), deadline=-1.0))
    assert (code, [line.status for line in run.timings]) == (4, ["NOT RUN"] * 2)
    assert "deadline" in run.timings[0].reason


def test_names_are_looked_at_before_anything_runs() -> None:
    """A wrong name or size leaves no record."""
    with pytest.raises(UsageValueError, match="unknown implementation 'nobody'"):
        run_bench(replace(PLAN, subjects=("nobody",)), ENVIRONMENT, lambda line: pytest.fail("a line"))
    with pytest.raises(UsageValueError, match="tokens=0"):
        replace(PLAN, tokens=(0,))
    with pytest.raises(UsageValueError, match="unknown model"):
        replace(PLAN, models=("nothing",))


def test_shares_of_the_limit_and_ratios_by_hand() -> None:
    """At 1000 operations and 100 bytes a second, 500 operations and 20 bytes take half a second at least."""
    _, run = recorded(PLAN)
    limits = {name: type(line)(run="", name=name, per_s=rate, words="", seconds=(1, 1, 1), repetitions=5)
              for (name, line), rate in zip(run.limits.items(), (100.0, 1000.0), strict=True)}
    assert list(limits) == ["copy", "product"]
    run.limits = limits
    assert of_limit(run, 500, 20, 2.0) == pytest.approx(0.25)
    assert of_limit(run, 500, 80, 2.0) == pytest.approx(0.4)
    base = {"run": "", "model": "m", "tp": 1, "tokens": 1, "operation": "experts", "status": "TIMED", "flop": 500.0,
            "num_bytes": 20.0}
    run.timings = [TimingLine(subject="torch:grouped", seconds=(2, 2, 2), **base),
                   TimingLine(subject="other", seconds=(3, 3, 3), **base)]
    document: Any = bench_document(run)
    assert [one["times_the_first"] for one in document["timings"]] == [1.0, 1.5]
    assert document["timings"][0]["tflop_per_s"] == pytest.approx(250e-12)
    assert document["timings"][0]["of_limit"] == pytest.approx(0.25)
    # A run cut short before its limits: a document that every JSON reader takes, NaN as records write it.
    run.limits = {}
    document = json.loads(json.dumps(bench_document(run), allow_nan=False))
    assert [one["of_limit"] for one in document["timings"]] == ["nan", "nan"]


def test_a_cpu_run_end_to_end(tmp_path: Path) -> None:
    """The command times kernels and torch, forward and backward, and every output says that a CPU is no evidence."""
    folder, plot = tmp_path / "run", tmp_path / "times.svg"
    ran = CliRunner().invoke(bench_command, [
        "moe_fast", "--tokens", "2", "--device", "cpu", "--record", str(folder), "--plot",
        str(plot)], standalone_mode=False)
    assert ran.return_value == 0, ran.output
    assert ran.stdout.count(NO_EVIDENCE) >= 6
    assert NO_EVIDENCE in ran.stderr
    assert NO_EVIDENCE in plot.read_text()
    run = read_bench(folder)
    assert not run.header.evidence
    assert [(line.operation, line.subject, line.status) for line in run.timings] == [
        (operation, subject, "TIMED") for operation in ("layer", "experts", "backward")
        for subject in ("moe_fast", "torch:loop", "torch:grouped")]
    assert all(line.kernels and line.repetitions == 2 and line.rows == 8 for line in run.timings)
    assert {part.name for part in run.timings[1].parts} == {"router", "align", "gate_up", "down", "combine"}
    again = CliRunner().invoke(bench_command, ["--read", str(folder), "--plot", str(plot)], standalone_mode=False)
    assert (again.return_value, again.stdout) == (0, ran.stdout)
    document = json.loads(CliRunner().invoke(bench_command, ["--read", str(folder), "--json"],
                                             standalone_mode=False).stdout)
    assert (document["evidence"], len(document["timings"]), len(document["limits"])) == (False, 9, 2)


def test_the_founding_table_has_its_labels(tmp_path: Path) -> None:
    """A number of tokens that is a decode step and a prompt says both."""
    code, run = recorded(replace(PLAN, labels=((3, "decode 3"), (3, "prefill 3 x 1"))))
    assert code == 0
    assert "decode 3; prefill 3 x 1" in shown(run)


def test_equal_records_draw_equal_plots(tmp_path: Path) -> None:
    """So that a plot in git changes when times do; a record without times has none."""
    _, run = recorded(PLAN)
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        plot_bench(run, path)
    assert paths[0].read_text() == paths[1].read_text()
    assert "least at the limits" in paths[0].read_text()
    with pytest.raises(UsageValueError, match=r"should end in \.svg or \.png"):
        plot_bench(run, tmp_path / "a.pdf")
    run.timings.clear()
    with pytest.raises(UsageValueError, match="0 shapes were timed"):
        plot_bench(run, paths[0])


@pytest.mark.parametrize(("text", "words"), [
    ("", "holds no bench line"), ('{"type":"case"}\n', "is it a record of `moe-ref bench`"),
    ('{"type":"end","schema":2,"run":"a","finished":"","seconds":1,"verdicts":{},"executed":0,"exit_code":0}\n',
     "a line of run a, but the file holds nothing before it")])
def test_records_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    """Each is refused with file and line."""
    path = tmp_path / "records.jsonl"
    path.write_text(text)
    with pytest.raises(UsageValueError, match=words):
        read_bench(path)


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "no implementation"), (["moe_fast", "--tp", "1;8"], "--tp '1;8'"),
    (["moe_fast", "--operations", "layer,sideways"], "sideways"), (["moe_fast", "--tokens", "8:1"], "rise")])
def test_wrong_use_of_the_command(arguments: list[str], words: str) -> None:
    """What is wrong is named, and what should be there."""
    ran = CliRunner().invoke(bench_command, arguments, standalone_mode=False)
    assert isinstance(ran.exception, UsageValueError)
    assert words in str(ran.exception)
