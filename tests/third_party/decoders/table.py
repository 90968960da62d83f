"""The table of decoders that docs/quantised.md shows: `python -m tests.third_party.decoders.table`."""

import logging
import sys

import click
import torch

from tests.third_party.decoders import DECODERS
from tests.third_party.decoders.compare import agreement

COLUMNS = ("library", "function", "scheme", "values", "scales", "differs at scale")


@click.command()
def main() -> None:
    """Compare all decoders whose libraries are installed with the oracle; exit code 1 where one differs otherwise than
    declared. A library that is not installed is named."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows, as_declared, lacking = [], True, []
    for decoder in DECODERS:
        if reason := decoder.library.lacking():
            lacking.append(reason)
            continue
        for scheme in decoder.schemes:
            found = agreement(decoder, scheme)
            as_declared &= found.differs == decoder.differs
            differs = ", ".join(map(str, sorted(found.differs))) or "none"
            rows.append((f"{decoder.library.distribution} {decoder.library.found()}", decoder.function, str(scheme),
                         f"{found.values}", f"{found.scales or 'random'}", differs))
    for row in (COLUMNS, ("---",) * len(COLUMNS), *rows):
        click.echo("| " + " | ".join(row) + " |")
    for reason in dict.fromkeys(lacking):
        click.echo(f"not compared: {reason}", err=True)
    sys.exit(not as_declared)


if __name__ == "__main__":
    main()
