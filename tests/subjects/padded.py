"""A right layer whose ranks pad their tokens, so that all messages between them are of one size."""

import torch
import torch.nn.functional as F

from tests.subjects.parallel import ParallelMoE
from tests.subjects.parallel_call import ParallelCall, Routed
from tests.subjects.parallel_variants import UNCOUNTED


class PaddedTokens(ParallelMoE):
    """Pads to the most tokens that a rank of the tp group has; a mask takes the padding out of the routing map."""

    promises = UNCOUNTED

    def gathered(self, call: ParallelCall, own: Routed) -> Routed:
        tp = call.groups.tp
        counts = tuple(int(count) for count in tp.all_gather(torch.tensor([len(own.x_TH)])))
        room = max(counts)
        is_token_T = torch.cat([torch.arange(room) < count for count in counts])
        ids_TK = self.unpadded_ids(call, padded(own.ids_TK, room), self.own_mask(call, is_token_T, room))

        def group(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat(tp.all_gather(padded(tensor, room)))[is_token_T]

        shared_TS = None if own.shared_TS is None or not call.cuts_shared else group(own.shared_TS)
        return Routed(group(own.x_TH), group(ids_TK), group(own.weights_TK),
                      own.shared_TS if shared_TS is None else shared_TS, counts)

    def own_mask(self, call: ParallelCall, is_token_T: torch.Tensor, room: int) -> torch.Tensor:
        """The part of the group's mask that belongs to this rank's tokens."""
        return is_token_T[call.rank * room:(call.rank + 1) * room]

    def unpadded_ids(self, call: ParallelCall, ids_TK: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
        """-1 where the routing map (T, E) has nothing, which is so for all slots of a padded token."""
        choices = call.spec.num_choices
        column_TK = ids_TK.long().where(ids_TK >= 0, choices)
        is_chosen_TE = torch.zeros(len(ids_TK), choices + 1, dtype=torch.bool).scatter(1, column_TK, True)[:, :choices]
        is_chosen_TE = self.masked(is_chosen_TE, mask_T)
        return torch.where(F.pad(is_chosen_TE, (0, 1)).gather(1, column_TK), ids_TK, -1)

    def masked(self, is_chosen_TE: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
        return is_chosen_TE & mask_T[:, None]


def padded(tensor: torch.Tensor, room: int) -> torch.Tensor:
    """With rows of zeros up to `room`."""
    return F.pad(tensor, (0, 0, 0, room - len(tensor)))


padded_tokens = PaddedTokens()
