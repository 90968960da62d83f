"""How often is the growth class right? Every simulated accumulator, many seeds, small products.

    python ci/growth_study.py [--seeds 200] [--record FILE]

The class of every curve is told from its errors alone, on symmetric and on positive data, and compared with what the
accumulator is. Printed per accumulator: how many seeds are right, the range of exponents and of effective bits.
200 seeds take about 16 minutes on one core; a record can be gone on with.
"""

from collections import Counter
from pathlib import Path

import click
import msgspec
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_ref.contract.vocabulary import Format
from moe_ref.diverge.growth import Growth, GrowthClass, growth
from moe_ref.diverge.measure import Point, measure
from moe_ref.diverge.problem import GroupedProblem, GrowthData
from moe_ref.diverge.subjects import Place, Subject, find_subject
from moe_ref.diverge.truth import Bench

LENGTHS = (64, 256, 1024, 4096)

ACCUMULATORS = {
    GrowthClass.NEAREST: (
        ("model:sequential:ieee", Format.FP32), ("model:sequential:bf16", Format.BF16),
        ("model:reversed:fp16", Format.FP16), ("model:blocked:ieee", Format.FP32), ("model:pairwise:bf16", Format.BF16),
        ("model:split_k:bf16", Format.BF16), ("model:shuffled:fp16", Format.FP16)),
    GrowthClass.TRUNCATING: (
        ("model:sm80:bf16", Format.BF16), ("model:sm90:bf16", Format.BF16), ("model:sm90:fp16", Format.FP16),
        ("model:sm90:tf32", Format.BF16), ("model:sm90:fp8", Format.E4M3)),
    GrowthClass.INPUT_LIMITED: (
        ("model:blocked:tf32-rounded", Format.FP32), ("model:blocked:tf32-cut", Format.FP32),
        ("model:sm90:tf32", Format.FP32), ("model:sm90:tf32-rounded", Format.FP32), ("model:blocked:bf16", Format.FP32),
        ("model:sm90:fp8", Format.BF16), ("model:sm90-promoted:fp8", Format.E4M3)),
    GrowthClass.LOW_PRECISION: (
        ("model:sequential-fp16:bf16", Format.BF16), ("model:sequential-bf16:bf16", Format.BF16),
        ("model:pairwise-fp16:fp16", Format.FP16), ("model:split_k-bf16:bf16", Format.BF16),
        ("model:sm90-fp16:fp16", Format.FP16)),
}
"""Subjects with the format of their data, by what they are."""


def curve(subject: Subject, dtype: Format, data: GrowthData, seed: int) -> list[Point]:
    """Errors of one subject over all lengths."""
    points = []
    for terms in LENGTHS:
        bench = Bench(GroupedProblem(terms=terms, rows=16, columns=16, experts=1, dtype=dtype, data=data, seed=seed))
        y_RN, stored = subject.run(bench.problem, bench.operands)
        points.append(measure(y_RN, bench.truth(), bench.truth(subject.conversion), subject.declared, stored))
    return points


def law(name: str, dtype: Format, seed: int) -> Growth:
    """The growth of one simulated accumulator with the inputs of one seed."""
    subject = find_subject(name, dtype, Place())
    return growth(curve(subject, dtype, GrowthData.UNIT, seed), curve(subject, dtype, GrowthData.POSITIVE, seed))


class Outcome(msgspec.Struct, frozen=True):
    """One accumulator with one seed, as it is recorded."""

    name: str
    dtype: Format
    seed: int
    growth_class: GrowthClass
    exponent: float
    positive_exponent: float
    bits: tuple[float, float]


def outcomes(seeds: range, record: Path | None) -> list[Outcome]:
    """All accumulators with every seed; what the record holds already is not computed again."""
    done = [] if record is None or not record.exists() else [
        msgspec.json.decode(line, type=Outcome) for line in record.read_bytes().splitlines()]
    known, found = {(one.name, one.dtype, one.seed) for one in done}, [one for one in done if one.seed in seeds]
    for seed in track(seeds, "seeds", console=Console(stderr=True), transient=True):
        for name, dtype in (pair for pairs in ACCUMULATORS.values() for pair in pairs):
            if (name, dtype, seed) in known:
                continue
            one = law(name, dtype, seed)
            found.append(Outcome(name, dtype, seed, one.growth_class, one.exponent, one.positive_exponent, one.bits))
            if record:
                with record.open("ab") as file:
                    file.write(msgspec.json.encode(found[-1]) + b"\n")
    return found


@click.command()
@click.option("--seeds", default=200, show_default=True)
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--record", type=click.Path(path_type=Path, dir_okay=False), help="File to append to, and to go on from.")
def main(seeds: int, first: int, record: Path | None) -> None:
    """Print how often each accumulator's class is right."""
    torch.set_num_threads(1)
    table = Table("accumulator", "data", "is", "right", "taken for", "exponent", "positive", "bits")
    found, wrong = outcomes(range(first, first + seeds), record), []
    for expected, accumulators in ACCUMULATORS.items():
        for name, dtype in accumulators:
            mine = [one for one in found if (one.name, one.dtype) == (name, dtype)]
            counts = Counter(one.growth_class for one in mine)
            if counts[expected] < 0.99 * len(mine):
                wrong.append(name)
            others = ", ".join(f"{kind} {count}" for kind, count in counts.items() if kind is not expected)
            columns = ([one.exponent for one in mine], [one.positive_exponent for one in mine])
            levels = [bits for one in mine for bits in one.bits]
            table.add_row(name, dtype, expected, f"{counts[expected]} of {len(mine)}", others or "-",
                          *(f"{min(values):.2f} .. {max(values):.2f}" for values in columns),
                          f"{min(levels):.1f} .. {max(levels):.1f}")
    console = Console(width=150)
    console.print(table)
    console.print(f"wrong in more than 1 % of {seeds} seeds: {', '.join(wrong) or 'none'}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
