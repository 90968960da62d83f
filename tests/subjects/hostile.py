"""All hostile implementations in one: which of them a call meets is said by its number of tokens."""

from moe_ref.contract.comm import Groups
from tests.subjects.base import TorchMoE
from tests.subjects.hostile_processes import PROCESSES
from tests.subjects.hostile_tensors import TENSORS, Given, seen

RIGHT_TOKENS = 4
TOKENS = {name: 256 + 2 * number for number, name in enumerate((*TENSORS, *PROCESSES))}
"""Any other number is served as it should be, also half of these, as a call with other inputs may have it."""

ON_RANK_ONE = frozenset({"locks_the_interpreter", "stops_itself", "aborts", "raises_what_cannot_be_said"})
"""Before any collective, so that the others wait for it; the rest when all is done."""

AT_THE_END = frozenset({"replaces_functions", "changes_defaults"})
"""In the last call of the last rank: nobody but the harness and the next case is left to suffer."""


class Hostile(TorchMoE):
    """The right layer, with a behaviour before it is left."""

    def moe(self, x_TH, weights, spec, parallel=None, groups=None, *, routing=None, logits_TE=None, residual_TH=None,
            trace=None):
        name = next((name for name, tokens in TOKENS.items() if tokens == len(x_TH)), "")
        rank = (groups or Groups()).tp.rank
        if name in ON_RANK_ONE and rank == 1:
            PROCESSES[name]()
        output = super().moe(x_TH, weights, spec, parallel, groups, routing=routing, logits_TE=logits_TE,
                             residual_TH=residual_TH, trace=trace)
        if name in TENSORS:
            given = Given(x_TH=x_TH, weights=weights, residual_TH=residual_TH, logits_TE=logits_TE, routing=routing,
                          trace=trace, rank=rank, name=name)
            output = TENSORS[name](given, output)
        elif name in PROCESSES and name not in ON_RANK_ONE:
            seen[name, rank] += 1
            if name not in AT_THE_END or (rank == 2 and seen[name, rank] == 2):
                PROCESSES[name]()
        return output


hostile = Hostile()
