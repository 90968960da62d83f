"""Act-order of encoded experts under tensor parallelism: columns in the order of their groups, so that a rank needs the
scales of its own groups alone.

A matrix in act-order names the group of every column, and any run of its columns may have columns of all groups. The
rank of a row split either keeps every scale, which Encoded.columns does, or the columns of w2 are sorted by group
before they are cut, and the rows of w1 and w3 with them (act_order.py says why this is the same layer). Then groups are
runs of columns, and their scales are cut along K like those of any group. Every expert has an order of its own.
"""

from dataclasses import replace

import torch

from moe_ref.contract.encoded import Encoded, packed, unpacked
from moe_ref.contract.errors import UsageTypeError, raise_faults
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Scheme
from moe_ref.layouts.act_order import group_order

_RUNS = {Scheme.GPTQ_ORDER: Scheme.GPTQ, Scheme.GPTQ_ORDER_32: Scheme.GPTQ_32}


def absorb_order(weights: QuantisedWeights, *, shared: bool = True) -> QuantisedWeights:
    """The same layer with the columns of w2 sorted by group, in their old order inside one, and the rows and biases of
    w13 in that order; no number of either changes, nor the order of w13's own columns.

    weights: whole in I, of all experts or of those that a rank hosts. shared: the shared expert too; False where the
    router weighs several shared experts, each in columns of its own. Raises UsageTypeError for schemes without an
    order, UsageValueError where w13 has not as many rows as w2 has columns.
    """
    if weights.w2.groups is None:
        raise UsageTypeError(f"weights: scheme {weights.scheme}, but should be one of "
                             f"{', '.join(_RUNS)}: others have no order")
    w13, w2, bias = _absorb("w2", weights.w13, weights.w2, weights.w13_bias_EGI)
    weights = replace(weights, w13=w13, w2=w2, w13_bias_EGI=bias)
    if not shared or weights.shared_w13 is None or weights.shared_w2 is None:
        return weights
    w13, w2, bias = _absorb("shared_w2", weights.shared_w13, weights.shared_w2, weights.shared_w13_bias_GI)
    return replace(weights, shared_w13=w13, shared_w2=w2, shared_w13_bias_GI=bias)


def as_runs(encoded: Encoded) -> Encoded:
    """Matrices whose groups are runs of columns already, as the scheme without an order, whose parts have their own
    scales alone.

    Raises UsageValueError with the first column that lies in another group: cut as runs it would get another's scale.
    """
    groups, size = encoded.groups, ENCODINGS[encoded.scheme].columns
    if groups is None or size is None:
        raise UsageTypeError(f"scheme {encoded.scheme}, but should be one of {', '.join(_RUNS)}: others have no order")
    runs = (torch.arange(encoded.num_columns, device=groups.device) // size).expand_as(groups)
    faults = []
    for place in (groups != runs).nonzero()[:1].tolist():
        *matrix, column = place
        faults.append(f"matrix {tuple(matrix)}: column {column} is in group {int(groups[tuple(place)])}, but should be "
                      f"in {column // size} as runs of {size} have it; absorb_order sorts them")
    raise_faults("groups", faults)
    return replace(encoded, scheme=_RUNS[encoded.scheme], groups=None)


def drop_unused_groups(encoded: Encoded) -> Encoded:
    """The same matrices without scales before the first and behind the last group that any of their columns is in: of
    a rank's part of sorted columns its own groups, of columns in no order as good as all."""
    groups = encoded.groups
    if groups is None:
        raise UsageTypeError(f"scheme {encoded.scheme}, but should be one of {', '.join(_RUNS)}: others have no order")
    first, last = (int(groups.min()), int(groups.max()) + 1) if groups.numel() else (0, 0)
    return replace(encoded, scales=encoded.scales[..., first:last].contiguous(), groups=groups - first)


def _absorb(name: str, w13: Encoded, w2: Encoded, bias: torch.Tensor | None) -> tuple[Encoded, Encoded,
                                                                                      torch.Tensor | None]:
    assert w2.groups is not None
    num_rows, num_columns = w13.shape[-2], w2.shape[-1]
    if num_rows != num_columns:
        raise_faults(name, [f"{num_columns} columns, but w13 has {num_rows} rows: the order is that of all columns, so "
                            "absorb it before the weights are cut"])
    perm = group_order(w2.groups)
    columns = perm[..., None, :].expand(*w2.shape)
    sorted_w2 = replace(w2, codes=packed(unpacked(w2.codes, num_columns).gather(-1, columns)),
                        groups=w2.groups.gather(-1, perm))
    # w13 has an axis G, of which both have the same rows.
    rows = perm[..., None, :, None]
    sorted_w13 = replace(w13, codes=_rows(w13.codes, rows), scales=_rows(w13.scales, rows))
    return sorted_w13, sorted_w2, None if bias is None else _rows(bias[..., None], rows)[..., 0]


def _rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return tensor.gather(-2, rows.expand(tensor.shape))
