"""The cross-compile gate: every launch of the layer compiled for GPUs that need not be there, and what it takes there.

    targets       the architectures and what a block may take on them
    cases         layers whose launches are compiled
    recorder      one case on meta tensors: every kernel with its arguments
    combinations  a launch as the compiler sees it, by Triton's own rules; equal ones are one
    own           all that the gate compiles
    products      one grouped product with a given tile; every tile of the tables
    resources     one combination compiled: registers, spills, shared memory, matrix instructions
    lanes         many of them, in processes of their own
    table         the accepted resources, and what got worse
"""

from moe_fast.compile.combinations import Combination, combinations_of
from moe_fast.compile.lanes import compile_all
from moe_fast.compile.own import own_combinations
from moe_fast.compile.products import tile_combinations
from moe_fast.compile.resources import Resources, faults
from moe_fast.compile.table import BASELINES, Comparison, compare, read_table, triton_series, write_table
from moe_fast.compile.targets import ARCHITECTURES

__all__ = ["ARCHITECTURES", "BASELINES", "Combination", "Comparison", "Resources", "combinations_of", "compare",
           "compile_all", "faults", "own_combinations", "read_table", "tile_combinations", "triton_series",
           "write_table"]
