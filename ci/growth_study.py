"""How often is the growth class right? Every simulated accumulator, many seeds, small products.

    python ci/growth_study.py [--seeds 200] [--only NAME]

The class of every curve is told from its errors alone, on symmetric and on positive data, and compared with what the
accumulator is. Printed per accumulator: how many seeds are right, the range of exponents and of effective bits.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

import click
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


@dataclass
class Tally:
    """What the seeds of one accumulator were taken for, and the ranges of its curves."""

    classes: Counter[GrowthClass] = field(default_factory=Counter)
    exponents: list[float] = field(default_factory=list)
    positive_exponents: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)


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


@click.command()
@click.option("--seeds", default=200, show_default=True)
@click.option("--first", default=0, show_default=True, help="The first seed.")
@click.option("--only", default="", help="Accumulators whose name contains this.")
def main(seeds: int, first: int, only: str) -> None:
    """Print how often each accumulator's class is right."""
    torch.set_num_threads(1)
    table = Table("accumulator", "data", "is", "right", "taken for", "exponent", "positive", "bits", "seconds")
    wrong = 0
    for expected, accumulators in ACCUMULATORS.items():
        for name, dtype in accumulators:
            if only not in name:
                continue
            tally, began = Tally(), time.monotonic()
            for seed in track(range(first, first + seeds), name, console=Console(stderr=True), transient=True):
                found = law(name, dtype, seed)
                tally.classes[found.growth_class] += 1
                tally.exponents.append(found.exponent)
                tally.positive_exponents.append(found.positive_exponent)
                tally.bits += found.bits
            wrong += tally.classes[expected] < 0.99 * seeds
            others = ", ".join(f"{kind} {count}" for kind, count in tally.classes.items() if kind is not expected)
            ranges = (f"{min(values):.2f} .. {max(values):.2f}"
                      for values in (tally.exponents, tally.positive_exponents))
            table.add_row(name, dtype, expected, f"{tally.classes[expected]} of {seeds}", others or "-", *ranges,
                          f"{min(tally.bits):.1f} .. {max(tally.bits):.1f}", f"{time.monotonic() - began:.0f}")
    Console(width=170).print(table)
    Console().print(f"right in at least 99 % of seeds: all but {wrong}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
