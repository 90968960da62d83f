"""The grouped products that are measured: torch's, and moe_fast's own kernel."""

import importlib

import torch


class NotRun(Exception):
    """What stands in the way here; the record's reason."""


def torch_loop(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """One matmul per expert, in the operands' dtype."""
    y_RN = x_RK.new_zeros(len(x_RK), w_ENK.shape[1])
    start = 0
    for e, stop in enumerate(ends_E.tolist()):
        y_RN[start:stop] = x_RK[start:stop] @ w_ENK[e].T
        start = stop
    return y_RN


def torch_grouped(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.grouped_mm; NotRun where this torch or device has none for the dtype or sizes."""
    call = getattr(torch.nn.functional, "grouped_mm", None)
    if call is None:
        raise NotRun(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    try:
        return call(x_RK, w_ENK.transpose(1, 2), offs=ends_E)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise NotRun(f"grouped_mm: {str(error).splitlines()[0]}") from error


def fast_grouped(x_RK: torch.Tensor, w_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """moe_fast's down product with every row's weight 1; it is looked up by name, since moe_ref knows nothing of it."""
    try:
        align, down, tiles = (importlib.import_module(f"moe_fast.{name}") for name in ("kernels.align", "kernels.down",
                                                                                       "tiles"))
    except ImportError as error:
        raise NotRun(f"moe_fast cannot be imported: {error}") from error
    experts, columns, terms = w_ENK.shape
    tile = tiles.gemm_tile(x_RK.device, x_RK.dtype, tiles.Load(len(x_RK), experts), columns, terms, kernel="down")
    loads = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    # Rows are sorted by expert, so that the place in that order is the row itself.
    hosted_E = torch.arange(experts, device=x_RK.device)
    alignment = align.align(hosted_E.repeat_interleave(loads.long())[:, None], hosted_E, tile.block_m)
    weights_R = torch.ones(len(x_RK), dtype=torch.float32, device=x_RK.device)
    return down.down(x_RK, w_ENK, None, weights_R, alignment, tile)
