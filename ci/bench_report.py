"""What a report of many records costs: seconds of each step and peak memory of `moe-ref report`, in its own process.

Records are made from fixed seeds: every id is another combination of axis values, most cases pass, some fail, drift, or
did not run. The limits are of processor seconds, which other work on the machine leaves alone, and of memory; one that
is missed makes the exit code 1. Needs no torch.
"""

import itertools
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from moe_ref.contract.vocabulary import EXECUTED_VERDICTS, Verdict
from moe_ref.records.schema import (
    CaseLine,
    CollectiveCount,
    EndLine,
    Implementation,
    MutantLine,
    RunLine,
    StageResult,
    Statistic,
    Worst,
)
from moe_ref.records.store import FILE_NAME
from moe_ref.report.baseline import Baseline, BaselineCase, numerics_digest, round_ratio
from moe_ref.report.baseline_file import format_baseline

SECONDS_LIMIT, GIB_LIMIT, LIMITED_CASES = 60.0, 2.0, 100_000
WHO = Implementation(name="moe_fast", version="0.1.0", source_digest="55033945342c2dbe")
NUMERICS = {"logits": "fp32", "weights": "fp32", "act": "bf16", "down": "bf16", "shared": "bf16", "merged": "bf16",
            "reduced": "bf16", "accumulate": "fp32", "between_ranks": "bf16", "weight_at": "down", "products": "exact"}
STAGES = ("logits", "ids", "weights", "act", "down", "merged", "reduced", "output")
_AXES = (
    [f"T{tokens}" for tokens in (1, 3, 4, 7, 8, 12, 16, 17, 19, 21, 32, 33, 40, 57, 64, 65, 96, 127, 128, 256)],
    [f".H{hidden}.I{hidden * 3 // 2}" for hidden in (32, 48, 64, 72, 80, 96, 128, 160, 256, 288)],
    [".E4.K2", ".E8.K2", ".E16.K4"], ["-fp32", "-fp16", "-bf16"], ["-norm", "-sigmoid-norm"], ["", "-sh64"],
    ["", "-zipf", "-onehot", "-empty", "-allone", "-ties"], ["", "-outlier"], ["", "-tp2", "-tp4", "-tp8"])


def case_ids(number: int) -> list[str]:
    """So many distinct ids, of all axis values from the first hundred on."""
    every = ["v1-" + "".join(words) for words in itertools.product(*_AXES)]
    random.Random(1).shuffle(every)
    if number > len(every):
        raise click.BadParameter(f"{number} cases, but there are {len(every)} combinations")
    return every[:number]


def case_line(case: str, run: str) -> CaseLine:
    """A line as a verification run leaves it, about 5 KB; one in 200 fails, one in 50 did not run."""
    chance = random.Random(case)
    fate = chance.random()
    verdict = (Verdict.MISMATCH if fate < 0.005 else Verdict.UNSUPPORTED if fate < 0.015 else
               Verdict.NOT_RUN if fate < 0.02 else Verdict.PASS)
    fails = verdict == Verdict.MISMATCH
    ran = verdict in EXECUTED_VERDICTS
    return CaseLine(
        run=run, case=case, purpose="made up", implementation=WHO, ranks="local", device="cpu", verdict=str(verdict),
        reason="" if ran else "not declared: of many cases", first_stage="down" if fails else None,
        stages=[_stage(name, chance, fails and name == "down") for name in STAGES] if ran else [],
        collectives=[CollectiveCount(operation="tp.all_reduce", calls=1, num_elements=8192, num_bytes=16384)],
        guard={"poison": "nan, large", "inputs": "fingerprinted before and after", "process": "child"}, runs=2,
        same_bits=True, numerics=NUMERICS, power=chance.uniform(20, 99), signal=chance.uniform(9, 30),
        mutants={name: MutantLine(factor=chance.uniform(10, 1e5), where="merged")
                 for name in ("k_tile", "store_rz", "w_1ulp", "tp_partial")},
        inputs_digest=f"{chance.getrandbits(64):016x}", subject_seconds=round(chance.random(), 4),
        oracle_seconds=round(chance.random(), 4), message="down is over its bound\n" * 8 if fails else "pass",
        replay=f"moe-ref replay {case} --impl moe_fast --ranks local --device cpu")


def _stage(name: str, chance: random.Random, fails: bool) -> StageResult:
    if name == "ids":
        return StageResult(stage=name, ratio=0.0, exact=True, num_checked=256, num_bad=0)
    ratio = chance.uniform(2, 99) if fails else chance.betavariate(4, 4)
    worst = Worst(rank=chance.randrange(8), token=chance.randrange(64), expert=3, column=chance.randrange(288),
                  got=chance.gauss(0, 1), want=chance.gauss(0, 1), allowed=0.01 * chance.random())
    statistics = [Statistic(name=kind, value=chance.random(), allowed=7.8, number=128)
                  for kind in ("rms", "sign", "slots", "ranks")] if name == "output" else []
    return StageResult(stage=name, ratio=ratio, bound_ratio=ratio, num_checked=8192, num_bad=9 * fails, worst=worst,
                       num_tiles=4, sigmas=chance.uniform(0, 5), statistics=statistics, bad_experts=[3] * fails,
                       bad_tiles=[1, 2] * fails, bias=chance.gauss(0, 1e-3), scale=chance.gauss(1, 1e-4))


def make_records(folder: Path, cases: list[str], num_shards: int) -> tuple[int, Path]:
    """Shards and a baseline below a folder; (bytes of records, the baseline's file)."""
    encoder, num_bytes, accepted = msgspec.json.Encoder(), 0, {}
    for shard in range(num_shards):
        mine, run = cases[shard::num_shards], f"shard{shard}"
        path = folder / "records" / run / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(encoder.encode(_run_line(run, mine)) + b"\n")
            verdicts: dict[str, int] = {}
            for case in mine:
                line = case_line(case, run)
                verdicts[line.verdict] = verdicts.get(line.verdict, 0) + 1
                accepted[case] = _accepted(line)
                file.write(encoder.encode(line) + b"\n")
            executed = sum(number for verdict, number in verdicts.items() if verdict in EXECUTED_VERDICTS)
            file.write(encoder.encode(EndLine(run=run, finished="", seconds=60.0, verdicts=verdicts, executed=executed,
                                              exit_code=1)) + b"\n")
        num_bytes += path.stat().st_size
    baseline = folder / "baseline.json"
    baseline.write_text(format_baseline(Baseline(
        implementation=WHO.name, device="cpu",
        accepted={"version": WHO.version, "started": "2026-11-20", "tier": "full"},
        numerics={numerics_digest(NUMERICS): NUMERICS}, cases=accepted)))
    return num_bytes, baseline


def _run_line(run: str, cases: list[str]) -> RunLine:
    return RunLine(run=run, started="2026-11-22T04:23:20+00:00", implementation=WHO, tier="full", cases=cases,
                   minimum_executed=1, axis_pairs=(900, 1000), environment={"device": "cpu", "torch": "2.13.0"},
                   tolerances_digest="77aa", oracle_version="0.1.0")


def _accepted(line: CaseLine) -> BaselineCase:
    """As it was before: half of what fails now passed, and one in a hundred stood far lower."""
    chance = random.Random(line.case + " before")
    factor = 0.1 if chance.random() < 0.01 else 1.0
    stages = {stage.stage: round_ratio(factor * float(stage.ratio)) for stage in line.stages}
    verdict = Verdict.PASS if line.verdict == Verdict.MISMATCH and chance.random() < 0.5 else Verdict(line.verdict)
    return BaselineCase(numerics=numerics_digest(NUMERICS) if stages else "", stages=stages, verdict=verdict)


def processor_seconds(process: int) -> float:
    """User and system time of a running process, as Linux tells it."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def steps(command: list[str]) -> Iterator[tuple[str, float, float]]:
    """(words, seconds, processor seconds) of each step that a command tells on standard error."""
    began, used, words = time.monotonic(), 0.0, "starting"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            now, by_now = time.monotonic(), processor_seconds(child.pid)
            yield words, now - began, by_now - used
            began, used, words = now, by_now, line.strip()
    if child.returncode not in (0, 1):
        raise click.ClickException(f"{' '.join(command)}: exit code {child.returncode}: {words}")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--cases", "num_cases", default=LIMITED_CASES, show_default=True, help="How many records.")
@click.option("--shards", default=4, show_default=True, help="In how many files.")
def main(folder: Path, num_cases: int, shards: int) -> None:
    """Make records in FOLDER, report them, and print what each step takes."""
    num_bytes, baseline = make_records(folder, case_ids(num_cases), shards)
    out = folder / "report"
    table = Table("step", "seconds", "processor seconds",
                  title=f"{num_cases} records in {shards} files, {num_bytes / 1e6:.0f} MB")
    total = processor = 0.0
    for words, seconds, used in steps([sys.executable, "-m", "moe_ref", "report", str(folder / "records"), "--baseline",
                                       str(baseline), "--out", str(out)]):
        table.add_row(words, f"{seconds:.1f}", f"{used:.1f}")
        total, processor = total + seconds, processor + used
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20
    table.add_row("all", f"{total:.1f}", f"{processor:.1f}", end_section=True)
    table.add_row("peak memory, GiB", f"{gib:.2f}")
    for path in sorted(out.iterdir()):
        table.add_row(f"{path.name}, MB", f"{path.stat().st_size / 1e6:.1f}")
    Console().print(table)
    if num_cases <= LIMITED_CASES and (processor > SECONDS_LIMIT or gib > GIB_LIMIT):
        raise click.ClickException(f"{processor:.1f} processor seconds and {gib:.2f} GiB, but should be at most "
                                   f"{SECONDS_LIMIT:g} and {GIB_LIMIT:g}")


if __name__ == "__main__":
    main()
