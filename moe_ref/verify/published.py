"""Would another project call these two results equal: for comparison only, no verdict depends on it."""

import torch

from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.tolerances.published import Cosine, Criterion, Elementwise, RelativeRms


def accepts(criterion: Criterion, got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether `got` passes beside `want`, the reference that the project would take, in that dtype.

    Elementwise: torch.testing.assert_close; RelativeRms: triton_kernels' assert_close, in fp32; Cosine: DeepGEMM's
    calc_diff, in fp64. What is NaN in either fails. UsageValueError on other shapes, UsageTypeError on other dtypes.
    """
    if got.shape != want.shape:
        raise UsageValueError(f"got has shape {tuple(got.shape)}, but should have that of want, {tuple(want.shape)}")
    if got.dtype != want.dtype:
        raise UsageTypeError(f"got is {got.dtype}, but should be as want, {want.dtype}")
    if isinstance(criterion, Elementwise):
        return bool(torch.isclose(got, want, rtol=criterion.relative, atol=criterion.absolute).all())
    if isinstance(criterion, RelativeRms):
        return _relative_rms(criterion, got.float(), want.float())
    return _cosine(criterion, got.double(), want.double())


def _relative_rms(criterion: RelativeRms, got: torch.Tensor, want: torch.Tensor) -> bool:
    if want.numel() == 0:
        return True
    if not torch.equal(got.isinf(), want.isinf()):
        return False
    got, want = (torch.where(one.isinf(), 0, one) for one in (got, want))
    scale = 1.0 / (want.abs().max() + 1e-30)
    got, want = got * scale, want * scale
    rms = want.square().mean().sqrt() + 1e-30
    error = (want - got).abs() / torch.maximum(rms, want.abs())
    return bool(error.max() <= criterion.max) and bool(error.square().mean().sqrt() <= criterion.rms)


def _cosine(criterion: Cosine, got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool(1 - 2 * (got * want).sum() / (got.square() + want.square()).sum() < criterion.max)
