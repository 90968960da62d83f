"""A call that nobody judges, with other tokens and another choice of experts: what a subject keeps of it shows later.

Runs of one input cannot tell a replay from a memory. Before the first run the call has the shape of the case, so that
buffers, tables and flags that belong to the shape are those of other data by then. Between the two it has another
shape, so that what all shapes share is no longer that of the first run, which is the first call of its shape then.
"""

from collections.abc import Mapping

import torch

from moe_ref.inputs.philox import random_words

_NEGATED = ("x_TH", "logits_TE", "residual_TH")


def precedes(case_id: str, runs: int) -> int | None:
    """The run that such a call precedes: the first in a quarter of all cases, the second in another, none in the rest.

    None for cases of one run, too. A call costs as much as a run, and what is kept is kept in many cases.
    """
    place = int(random_words(case_id, "changed call", 0, 1)[0]) % 4
    return place if runs > 1 and place < 2 else None


def changed(handed: Mapping[str, torch.Tensor | None], run: int) -> dict[str, torch.Tensor | None]:
    """Negated tokens from the last to the first before run 0, half of them before run 1; of one token two."""
    num_tokens = next(len(tensor) for tensor in handed.values() if tensor is not None)
    token_T = torch.arange(num_tokens).flip(0)
    if run:
        token_T = token_T[:num_tokens // 2] if num_tokens > 1 else token_T.repeat(2)
    return {name: None if tensor is None else -tensor[token_T] if name in _NEGATED else tensor[token_T]
            for name, tensor in handed.items()}


def asks_untraced(case_id: str) -> bool:
    """Whether a case is run once more without a trace, as users run it: a quarter of them, since paths are few."""
    return int(random_words(case_id, "untraced call", 0, 1)[0]) % 4 == 0
