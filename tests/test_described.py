"""The ways a grouped kernel may run on a GPU: by addresses or tensor descriptors, a program per tile or for many.

They are one computation in every kernel over rows grouped by expert, forward and backward. Numbers are small integers
and activations are relu, so that sums are exact in whatever order the interpreter's BLAS adds up a transposed tile.
"""

import sys
from dataclasses import replace

import pytest
import torch

from moe_fast.kernels import grouped
from moe_fast.kernels.act_gradient import three_product_tile
from moe_fast.kernels.described import describable
from moe_fast.tiles import Tile, gemm_tile

ops = torch.ops.moe_fast
TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, SHARED = 20, 3, 72, 96, 40
"""Several tiles and a tail in every direction; rows in bf16 are multiples of 16 bytes."""

PLAIN = Tile(16, 64, 64, group=2)
WAYS = {"persistent": replace(PLAIN, persistent=True), "both": replace(PLAIN, descriptors=True, persistent=True)}
KERNELS = {"gate_up_kernel", "down_kernel", "act_gradient_kernel", "row_gradient_kernel", "down_gradient_kernel",
           "projection_gradient_kernel"}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    """-1, 0 and 1."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def stored(tensor: torch.Tensor, columns: bool) -> torch.Tensor:
    """The same matrix, in memory by its last axis or by the one before."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if columns else tensor


def results(columns: bool, misplaced: int = 0) -> list[torch.Tensor]:
    """What every operator over grouped rows returns; misplaced: by so many elements the weights are off 16 bytes."""
    x_TH = drawn(TOKENS, HIDDEN, seed=1)
    ids_TK = (torch.arange(TOKENS * 2).view(TOKENS, 2) * 5 % 4).to(torch.int32)  # some of no expert at hand
    weights_TK, hosted_E = drawn(TOKENS, 2, seed=2).exp2().float(), torch.arange(EXPERTS)
    w13_EGIH = stored(drawn(EXPERTS, 2, INTERMEDIATE, HIDDEN, seed=3), columns)
    w2_EHI = stored(drawn(EXPERTS, HIDDEN, INTERMEDIATE, seed=4), columns)
    if misplaced:
        room = torch.zeros(w2_EHI.numel() + misplaced, dtype=torch.bfloat16)
        w2_EHI = room[misplaced:].view(w2_EHI.shape).copy_(w2_EHI)
    shared = (stored(drawn(2, SHARED, HIDDEN, seed=5), columns), stored(drawn(HIDDEN, SHARED, seed=6), columns), None)
    layer = (x_TH, ids_TK, weights_TK, hosted_E, w13_EGIH, w2_EHI, *shared, "relu", "relu_squared")
    act_RI, grad_TH = drawn(TOKENS * 2, INTERMEDIATE, seed=7), drawn(TOKENS, HIDDEN, seed=8)
    down = (act_RI, ids_TK, weights_TK, hosted_E, w2_EHI, None, None, None)
    rows = (x_TH, ids_TK, hosted_E, w13_EGIH, "relu")
    return [ops.experts(*layer), *ops.experts_backward(grad_TH, *layer), ops.act_rows(*rows),
            *ops.act_rows_backward(act_RI, *rows), ops.merged_down(*down), *ops.merged_down_backward(grad_TH, *down)]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[tuple[int, ...], dict[str, object]]]]:
    """Grid and arguments of the grouped kernels that were started, by name."""
    seen: dict[str, list[tuple[tuple[int, ...], dict[str, object]]]] = {}
    launch = grouped.launch

    def watched(kernel, grid: tuple[int, ...], device: torch.device, **arguments: object) -> None:
        seen.setdefault(kernel.fn.__name__, []).append((grid, arguments))
        launch(kernel, grid, device, **arguments)

    monkeypatch.setattr(grouped, "launch", watched)
    return seen


def use(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel takes this tile."""
    for name, module in list(sys.modules.items()):
        for function in (gemm_tile, three_product_tile) if name.startswith("moe_fast.") else ():
            if vars(module).get(function.__name__) is function:
                monkeypatch.setattr(module, function.__name__, lambda *arguments, **options: tile)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("way", "columns"), [("persistent", False), ("both", False), ("both", True)],
                         ids=["persistent", "with descriptors", "with descriptors of transposed weights"])
def test_every_way_computes_the_same(way: str, columns: bool, monkeypatch: pytest.MonkeyPatch, launched) -> None:
    """Weights are described as they lie in memory, whichever axis a kernel sums over."""
    with monkeypatch.context() as patch:
        use(PLAIN, patch)
        expected = results(columns)
    assert all(bool(one.any()) and bool(one.isfinite().all()) for one in expected if one.numel())
    assert launched.keys() == KERNELS
    assert all(max(grid for grid, _ in starts) > (3,) for starts in launched.values())  # more tiles than programs below
    launched.clear()
    with monkeypatch.context() as patch:
        use(WAYS[way], patch)
        found = results(columns)
    assert launched.keys() == KERNELS
    for name, starts in launched.items():
        for grid, arguments in starts:
            loads = {value for key, value in arguments.items() if key.endswith("_LOADS")}
            assert ("addresses" not in loads) == WAYS[way].descriptors, name
            assert grid <= (3,), name
    assert all(map(torch.equal, found, expected))


def test_what_no_descriptor_can_describe_is_read_by_addresses(monkeypatch: pytest.MonkeyPatch, launched) -> None:
    """A driver refuses strides and first addresses that 16 bytes do not divide; a shard of a view may have them."""
    use(replace(PLAIN, descriptors=True), monkeypatch)
    found = results(columns=False, misplaced=3)
    loads = [arguments["W2_LOADS"] for _, arguments in launched["down_kernel"]]
    assert sorted(loads) == ["addresses", "addresses", "rows"]  # but for the shared expert's
    monkeypatch.undo()
    use(PLAIN, monkeypatch)
    assert all(map(torch.equal, found, results(columns=False)))


@pytest.mark.parametrize(("tensor", "expected"), [
    (torch.empty(4, 2, 16, 24, dtype=torch.bfloat16), True),
    (torch.empty(4, 2, 16, 20, dtype=torch.bfloat16), False),
    (torch.empty(4, 2, 16, 20), True),
    (torch.empty(4, 2, 24, 16, dtype=torch.bfloat16).transpose(2, 3), False),
    (torch.empty(4, 2, 16, 48, dtype=torch.bfloat16)[..., 8:32], True),
    (torch.empty(4, 2, 16, 48, dtype=torch.bfloat16)[..., 4:28], False),
    (torch.empty(1, 1, 16, 24, dtype=torch.bfloat16).expand(4, 2, 16, 24), False),
    (torch.empty(0, 2, 16, 24, dtype=torch.bfloat16), False),
    (torch.empty(4, 2, 16, 48, dtype=torch.bfloat16, device="meta")[..., 4:28], False),
], ids=["rows of 48 bytes", "of 40 bytes", "of 80 bytes", "last axis not dense", "a slice at 16 bytes", "at 8 bytes",
        "expanded", "no experts", "at 8 bytes, on meta"])
def test_what_can_be_described(tensor: torch.Tensor, expected: bool) -> None:
    """The rules of cuTensorMapEncodeTiled, which are known before a kernel starts."""
    assert describable(tensor) == expected
