"""The table of docs/third_party.md: python -m tests.third_party.table [family ...] [--markdown]."""

import sys
from importlib.metadata import version

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.third_party.compare import Choice
from tests.third_party.evaluate import Result, evaluate
from tests.third_party.families import FAMILIES

COLUMNS = ("family", "injected", "fp32 error", "weights", "experts", "flips", "bf16 experts", "bf16 flips",
           "equal weights", "equal output", "difference", "gradients", "allowed", "grouped experts",
           "grouped equal")
INJECTED = {"whole": "", "logits": "logits", "routing": "routing", "router": "router only"}
WIDTH = 190


def cells(result: Result) -> tuple[str, ...]:
    """One row; a dash where something is not compared."""
    forward, rounded, gradients = result.forward, result.rounded, result.gradients
    grouped = evaluate(result.family.title, "grouped_mm")
    return (result.family.title, INJECTED[result.family.fit], number(forward.error), number(forward.weights),
            number(forward.experts), flips(forward.choice), number(rounded.experts), flips(rounded.choice),
            share(rounded.weights_equal), share(rounded.equal), number(rounded.difference),
            number(gradients.worst), number(gradients.allowed),
            number(grouped.rounded.experts), share(grouped.rounded.equal))


def number(value: float | None) -> str:
    """Two digits."""
    return "-" if value is None else f"{value:.2g}"


def share(value: float | None) -> str:
    """Per cent, never rounded up to all."""
    return "-" if value is None else "all" if value == 1 else f"{min(value, 0.9999):.2%}"


def flips(choice: Choice | None) -> str:
    """Tokens with other experts; those that nothing explains are named."""
    if choice is None:
        return "-"
    refused = f" ({len(choice.unexplained)} unexplained)" if choice.unexplained else ""
    return str(int(choice.flipped_T.sum())) + refused


def summary(results: list[Result]) -> list[str]:
    """How many, how many within bounds, and what was injected."""
    refusals = {result.family.title: refusals_of(result) for result in results}
    within = sum(not found for found in refusals.values())
    modules = {result.family.module for result in results}
    kinds = {(result.family.spec, result.family.released) for result in results}
    lines = [f"{len(results)} blocks of {len(modules)} architectures of transformers {version('transformers')}, "
             f"{within} within every bound; {len(kinds)} different pairs of mathematics and rounding points."]
    lines += [f"{result.family.title}: {result.family.because}." for result in results if result.family.because]
    return lines + [f"{title}: {refusal}" for title, found in refusals.items() for refusal in found]


def refusals_of(result: Result) -> list[str]:
    """What is outside its bound with eager or with default experts."""
    grouped = evaluate(result.family.title, "grouped_mm").refusals()
    return result.refusals() + [f"grouped_mm: {refusal}" for refusal in grouped]


def markdown(results: list[Result]) -> str:
    """The table for a document."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + "\n".join(
        f"- {line}" for line in summary(results))


@click.command()
@click.argument("titles", nargs=-1, type=click.Choice(list(FAMILIES)))
@click.option("--markdown", "as_markdown", is_flag=True, help="Print markdown for docs/third_party.md.")
def main(titles: tuple[str, ...], as_markdown: bool) -> None:
    """Compare the oracle with blocks of transformers; exit code 1 if anything is outside its bound."""
    torch.set_num_threads(1)
    results, errors = [], Console(stderr=True)
    with Progress(console=errors, transient=True) as progress:
        for title in progress.track(titles or tuple(FAMILIES), description="comparing"):
            results.append(evaluate(title))
            evaluate(title, "grouped_mm")
    if as_markdown:
        click.echo(markdown(results))
    else:
        table = Table(*COLUMNS)
        for result in results:
            table.add_row(*cells(result))
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        console.print(table)
        console.print("\n".join(summary(results)), highlight=False)
    sys.exit(any(refusals_of(result) for result in results))


if __name__ == "__main__":
    main()
