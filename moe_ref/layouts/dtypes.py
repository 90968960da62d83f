"""Which dtypes the stored tensors of a layer may have, alone and together."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from moe_ref.contract.dtypes import PLAIN_DTYPES
from moe_ref.contract.weights import KEPT_PRECISE


class StoredDtype(NamedTuple):
    """The dtype of one tensor, the name a message calls it by, and its stored or canonical parameter."""

    label: str
    parameter: str
    dtype: torch.dtype


def dtype_faults(held: Iterable[StoredDtype]) -> list[str]:
    """One fault for each dtype that is not PLAIN_DTYPES, and for each that is not the first expert tensor's.

    Parameters of KEPT_PRECISE may be fp32 beside it. It is the rule of MoEWeights, which a source that puts
    experts together when they are read must keep too: torch.stack would promote a mixture without a word.
    """
    held = list(held)
    faults = [f"{one.label}: dtype {one.dtype}, but should be one of {', '.join(map(str, PLAIN_DTYPES))}; "
              "open_quantised reads quantised checkpoints" for one in held if one.dtype not in PLAIN_DTYPES]
    floating = [one for one in held if one.dtype in PLAIN_DTYPES]
    reference = next((one for one in floating if one.parameter not in KEPT_PRECISE), None)
    if reference is None:
        return faults
    for one in floating:
        allowed = [reference.dtype]
        if one.parameter in KEPT_PRECISE and reference.dtype != torch.float32:
            allowed.append(torch.float32)
        if one.dtype not in allowed:
            faults.append(f"{one.label}: dtype {one.dtype}, but should be {' or '.join(map(str, allowed))} as "
                          f"{reference.label}")
    return faults
