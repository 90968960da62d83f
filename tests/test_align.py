"""The grouping of routed rows by expert, which every grouped product trusts, against a plain loop over rows."""

import pytest
import torch

from moe_fast.kernels import align as kernels
from moe_fast.kernels.align import FEW_ROWS_INTERPRETED, align

HOSTED = {"all": [0, 1, 2, 3, 4], "one": [3], "some, out of order": [6, 2, 0], "twice": [1, 4, 1], "many": range(40),
          "none": []}


def ids_of(num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Most experts more than once, some never, and ids that are no expert, one of which wraps to 0 in 32 bits."""
    ids_R = (torch.arange(num_rows) * 5 + torch.arange(num_rows) // 3) % 9 - 1
    if num_rows > 2 and dtype is torch.int64:
        ids_R[2] = 2**32
    return ids_R.to(dtype)


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("block_m", [1, 16])
@pytest.mark.parametrize("hosted", HOSTED.values(), ids=HOSTED)
@pytest.mark.parametrize("num_rows", [0, 1, 2, FEW_ROWS_INTERPRETED, FEW_ROWS_INTERPRETED + 1, 130, 300])
def test_rows_are_grouped_as_a_loop_groups_them(num_rows: int, hosted: list[int], block_m: int,
                                                dtype: torch.dtype) -> None:
    """One program up to the limit, three kernels above it: the same tables."""
    ids_R, places = ids_of(num_rows, dtype), {expert: place for place, expert in reversed(list(enumerate(hosted)))}
    found = align(ids_R.view(-1, 1), torch.tensor(list(hosted), dtype=torch.int64), block_m)
    local = [places.get(one, -1) for one in ids_R.tolist()]
    rows = [[row for row, place in enumerate(local) if place == expert] for expert in range(len(hosted))]
    assert found.local_ids_R.tolist() == local
    order = [row for group in rows for row in group]
    assert found.sorted_rows_R[:len(order)].tolist() == order
    starts = [sum(map(len, rows[:expert])) for expert in range(len(hosted) + 1)]
    assert found.offsets[:len(hosted) + 1].tolist() == starts
    assert int(found.offsets[-1]) == len(order)
    blocks = [(expert, start, starts[expert + 1]) for expert in range(len(hosted))
              for start in range(starts[expert], starts[expert + 1], block_m)]
    tables = (found.block_expert, found.block_row, found.block_row_end)
    assert list(zip(*(table[:len(blocks)].tolist() for table in tables), strict=True)) == blocks
    assert found.block_count.tolist() == [len(blocks)]
    assert len(blocks) <= found.num_blocks


def test_few_rows_start_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decoding step of a GPU pays for is starts."""
    started: list[str] = []
    launch = kernels.launch

    def counted(kernel, grid: tuple[int, ...], device: torch.device, **arguments: object) -> None:
        started.append(kernel.fn.__name__)
        launch(kernel, grid, device, **arguments)

    monkeypatch.setattr(kernels, "launch", counted)
    hosted_E = torch.arange(5)
    align(ids_of(FEW_ROWS_INTERPRETED, torch.int32).view(-1, 1), hosted_E, 16)
    assert started == ["few_rows_kernel"]
    align(ids_of(FEW_ROWS_INTERPRETED + 1, torch.int32).view(-1, 1), hosted_E, 16)
    assert started[1:] == ["count_kernel", "layout_kernel", "scatter_kernel"]
