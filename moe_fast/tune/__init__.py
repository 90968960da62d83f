"""Offline search for tiles: candidates, compiled, compared with torch, timed; the best go into an architecture's table.

    shapes      the two products of a layer on one rank, and their data
    space       the tiles that are tried
    trial       one tile of one product: what became of it; a line of an append-only record
    run         candidates compiled, checked and timed
    best        trials to entries of a table

Nothing here runs while a layer runs.
"""

from moe_fast.tiles.tables import table_path
from moe_fast.tune.best import best_entries, write_entries
from moe_fast.tune.run import Progress, Search, gpu_architecture, search
from moe_fast.tune.shapes import Shape
from moe_fast.tune.space import candidates
from moe_fast.tune.trial import Trial, read_trials

__all__ = ["Progress", "Search", "Shape", "Trial", "best_entries", "candidates", "gpu_architecture", "read_trials",
           "search", "table_path", "write_entries"]
