"""Protects the orders in which kernels read scales: back is exact, and a wrong order shows, but for scales that are all
equal, which hide every one."""

from collections.abc import Callable

import pytest
import torch

from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.schemes import ENCODINGS, Scales
from moe_ref.contract.vocabulary import Scheme
from moe_ref.layouts.scale_layouts import (
    from_blackwell,
    from_column_major,
    from_interleaved,
    from_marlin,
    from_packed_exponents,
    marlin_single,
    to_blackwell,
    to_column_major,
    to_interleaved,
    to_marlin,
    to_packed_exponents,
)
from moe_ref.oracle.decode import decode
from tests.distinct_encoded import make_encoded, make_scales

SIZES = [(1, 1), (32, 4), (128, 4), (129, 5), (256, 8), (300, 3), (384, 13)]
"""Rows and blocks: less than a tile, one tile, and more with partial ones along either axis."""


def distinct(num_rows: int, num_blocks: int, *leading: int) -> torch.Tensor:
    """Scales of which all of 251 neighbours in memory differ, and no two in a row or a column of a tile are equal."""
    row, block = torch.arange(num_rows)[:, None], torch.arange(num_blocks)
    expert = torch.arange(max(1, int(torch.tensor(leading).prod()))).reshape(*leading, 1, 1)
    return ((row * num_blocks + block + 17 * expert) % 251 + 1).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu])
@pytest.mark.parametrize(("num_rows", "num_blocks"), SIZES)
def test_blackwell_tiles_there_and_back(num_rows: int, num_blocks: int, dtype: torch.dtype) -> None:
    """The bytes of mxfp4, mxfp8 (e8m0) and nvfp4 (e4m3), with and without experts; the layout's size is that of whole
    tiles, and what is padded is 0."""
    for leading in ((), (3,), (2, 2)):
        scales = distinct(num_rows, num_blocks, *leading).view(dtype)
        stored = to_blackwell(scales)
        assert stored.dtype == dtype
        assert stored.shape == (*leading, -(-num_rows // 128) * 128 * -(-num_blocks // 4) * 4)
        assert int((stored.view(torch.uint8) != 0).sum()) == scales.numel()
        back = from_blackwell(stored, num_rows, num_blocks)
        assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize(("num_rows", "num_blocks"), SIZES)
def test_blackwell_tiles_by_their_definition(num_rows: int, num_blocks: int) -> None:
    """The place of every scale, from the documented formula, one by one."""
    scales = distinct(num_rows, num_blocks)
    stored, block_tiles = to_blackwell(scales), -(-num_blocks // 4)
    for row in range(num_rows):
        for block in range(num_blocks):
            tile = row // 128 * block_tiles + block // 4
            place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
            assert stored[place] == scales[row, block]


@pytest.mark.parametrize(("num_rows", "num_blocks"), SIZES)
def test_blackwell_tiles_are_torchs(num_rows: int, num_blocks: int) -> None:
    """torch's own tests of block-scaled products use the same; they import where expecttest is installed."""
    pytest.importorskip("expecttest", reason="expecttest is not installed, which torch's test helpers import")
    helpers = pytest.importorskip("torch.testing._internal.common_quantized")
    scales = distinct(num_rows, num_blocks)
    assert torch.equal(to_blackwell(scales), helpers.to_blocked(scales).flatten())


@pytest.mark.parametrize(("num_rows", "num_blocks"), SIZES)
def test_blackwell_tiles_are_torchaos(num_rows: int, num_blocks: int) -> None:
    """And torchao's, there and back, where it is installed."""
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils", reason="torchao is not installed")
    scales = distinct(num_rows, num_blocks)
    stored = to_blackwell(scales)
    assert torch.equal(stored, utils.to_blocked(scales))
    assert torch.equal(utils.from_blocked(stored, num_rows, num_blocks), scales)


def test_blackwell_tiles_are_triton_kernels() -> None:
    """OpenAI's triton_kernels, which have columns before rows and pad the blocks to tiles of 4 x 2 as well: the same
    bytes for one matrix of whole tiles, where the package is installed."""
    layout = pytest.importorskip("triton_kernels.tensor_details.layout_details.blackwell_scale",
                                 reason="triton_kernels is not installed")
    scales = distinct(256, 8)
    theirs = layout.BlackwellMXScaleLayout((8, 256)).swizzle_data(scales.mT)
    assert torch.equal(theirs.contiguous().flatten(), to_blackwell(scales))


@pytest.mark.parametrize("num_rows", [1, 3, 4, 100, 128])
def test_column_major_there_and_back(num_rows: int) -> None:
    """Equal as tensors, rows side by side in memory, and every block at a multiple of 16 bytes."""
    scales = make_scales(Scales.FP32, (2, num_rows, 5), torch.Generator().manual_seed(0))
    stored = to_column_major(scales)
    assert torch.equal(stored, scales)
    assert stored.stride()[-2:] == (1, -(-num_rows // 4) * 4)
    assert all(stored[0, :, block].data_ptr() % 16 == stored.data_ptr() % 16 for block in range(5))
    back = from_column_major(stored)
    assert back.is_contiguous()
    assert torch.equal(back, scales)


@pytest.mark.parametrize(("num_rows", "num_blocks"), [(1, 1), (5, 4), (128, 7), (64, 9)])
def test_packed_exponents_there_and_back(num_rows: int, num_blocks: int) -> None:
    """Powers of two; the first block of four lies in the lowest byte, as plain integers say it."""
    exponents = distinct(num_rows, num_blocks, 2).long() % 250 + 1
    scales = torch.exp2(exponents.double() - 127).float()
    stored = to_packed_exponents(scales)
    assert stored.shape == (2, num_rows, -(-num_blocks // 4))
    assert stored.stride()[-2:] == (1, -(-num_rows // 4) * 4)
    first = sum(int(exponents[1, 0, block]) << 8 * block for block in range(min(4, num_blocks)))
    assert int(stored[1, 0, 0]) % 2**32 == first
    assert torch.equal(from_packed_exponents(stored, num_blocks), scales)


@pytest.mark.parametrize(("groups", "single"), [(1, True), (2, False), (9, False)])
def test_marlin_there_and_back(groups: int, single: bool) -> None:
    """One group has another order than several; each is a permutation inside runs of 32 or 64 rows."""
    scales = make_scales(Scales.HALF, (3, 192, groups), torch.Generator().manual_seed(1))
    stored = to_marlin(scales, single=single)
    assert stored.shape == (3, groups, 192)
    assert torch.equal(from_marlin(stored, single=single), scales)
    width = 32 if single else 64
    runs, plain = (one.unflatten(-1, (-1, width)).sort(-1).values for one in (stored, scales.mT))
    assert torch.equal(runs, plain)
    assert not torch.equal(stored, scales.mT)


@pytest.mark.parametrize(("num_columns", "size"), [(256, 128), (128, 128), (96, 128), (256, None), (64, 32)])
def test_marlin_is_gptqmodels(num_columns: int, size: int | None) -> None:
    """The function that vLLM and GPTQModel have in common, which takes (groups, N) and decides by K, where it is
    installed."""
    marlin = pytest.importorskip("gptqmodel.utils.marlin", reason="gptqmodel is not installed")
    groups = 1 if size is None else -(-num_columns // size)
    scales = make_scales(Scales.HALF, (128, groups), torch.Generator().manual_seed(2))
    theirs = marlin.marlin_permute_scales(scales.mT, num_columns, 128, -1 if size is None else size)
    assert torch.equal(to_marlin(scales, single=marlin_single(num_columns, size)), theirs)


def test_marlin_told_another_axis() -> None:
    """Catalogue G01: w13 of a rank has K = H, two groups of 128, but its order was chosen by the rank's I = 86, which
    is no more than a group. Most scales then belong to other rows; at tp 1, with I = 256, nothing showed."""
    hidden, intermediate = 256, 256
    scales = make_scales(Scales.HALF, (192, 2), torch.Generator().manual_seed(3))
    right = marlin_single(hidden, 128)
    for tp, same in ((1, True), (3, False)):
        chosen = marlin_single(-(-intermediate // tp), 128)
        assert (chosen == right) == same
        read = from_marlin(to_marlin(scales, single=chosen), single=right)
        assert torch.equal(read, scales) == same
        assert same or (read != scales).double().mean() > 0.7


def test_interleaved_there_and_back() -> None:
    """Codes and scales of mxfp4 as gpt-oss has them: row 2i is gate's row i, 2i + 1 up's; the decoded rows follow."""
    encoded = make_encoded(Scheme.MXFP4, (3, 2, 40, 96), torch.Generator().manual_seed(4))
    stored = encoded.mapped(to_interleaved)
    assert stored.shape == (3, 80, 96)
    assert torch.equal(decode(stored)[:, 0::2], decode(encoded)[:, 0])
    assert torch.equal(decode(stored)[:, 1::2], decode(encoded)[:, 1])
    back = stored.mapped(from_interleaved)
    assert all(torch.equal(back.tensors[name], one) for name, one in encoded.tensors.items())
    assert torch.equal(to_interleaved(torch.tensor([[[1], [2]], [[3], [4]]])).flatten(), torch.tensor([1, 3, 2, 4]))


def row_tiles_first(scales: torch.Tensor) -> torch.Tensor:
    """A mistake: tiles one below the other before those beside."""
    tiles = scales.unflatten(-1, (-1, 4)).unflatten(0, (-1, 128)).permute(2, 0, 1, 3)
    return torch.cat([to_blackwell(tile) for column in tiles for tile in column])


def rows_as_they_are(scales: torch.Tensor) -> torch.Tensor:
    """A mistake: rows 0 to 3 of a tile side by side, not 0, 32, 64 and 96."""
    return scales.unflatten(-1, (-1, 4)).unflatten(0, (-1, 32, 4)).movedim(-2, 1).flatten()


WRONG: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "not swizzled": (torch.Tensor.flatten, lambda stored: from_blackwell(stored, 256, 8)),
    "swizzled twice": (lambda scales: to_blackwell(to_blackwell(scales).reshape(256, 8)),
                       lambda stored: from_blackwell(stored, 256, 8)),
    "tiles in the other order": (row_tiles_first, lambda stored: from_blackwell(stored, 256, 8)),
    "rows as they are": (rows_as_they_are, lambda stored: from_blackwell(stored, 256, 8)),
    "the order of a single group": (lambda scales: to_marlin(scales, single=True),
                                    lambda stored: from_marlin(stored, single=False)),
    "groups in no order": (lambda scales: scales.mT, lambda stored: from_marlin(stored, single=False)),
    "gate rows before up rows": (lambda scales: scales, lambda stored: from_interleaved(stored).flatten(0, 1)),
}
"""How scales (256, 8) are written by mistake, and read as they should be."""


@pytest.mark.parametrize("name", WRONG)
def test_equal_scales_hide_every_mistake(name: str) -> None:
    """The trap: with one scale for all blocks, as ones or as a badly drawn test has it, a kernel that is handed the
    wrong order is right to the bit. With scales that differ between neighbours more than a third of the decoded
    numbers are others; two tiles of four keep their place in either order."""
    write, read = WRONG[name]
    encoded = make_encoded(Scheme.MXFP8, (256, 256), torch.Generator().manual_seed(6))
    assert ENCODINGS[encoded.scheme].columns == 256 // 8
    for scales, hidden in ((torch.full_like(encoded.scales, 120), True), (encoded.scales, False)):
        right = encoded.mapped(lambda one, scales=scales: scales if one.dtype == torch.uint8 else one)
        wrong = right.mapped(lambda one: read(write(one)) if one.dtype == torch.uint8 else one)
        differing = (decode(wrong) != decode(right)).double().mean()
        assert differing == 0 if hidden else differing > 0.3


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "tiles of another size": (lambda: from_blackwell(torch.zeros(512, dtype=torch.uint8), 129, 4), UsageValueError,
                              "512 elements, but should be 1024 of 129 x 4 scales"),
    "no fp32": (lambda: to_column_major(torch.zeros(4, 4).half()), UsageTypeError, "float16, but should be torch.f"),
    "no power of two": (lambda: to_packed_exponents(torch.tensor([[3.0]])), UsageValueError, "3.0, but should be p"),
    "a negative one": (lambda: to_packed_exponents(torch.tensor([[-2.0]])), UsageValueError, "-2.0, but should be"),
    "nought": (lambda: to_packed_exponents(torch.tensor([[0.0]])), UsageValueError, "0.0, but should be powers of two"),
    "rows that are not side by side": (lambda: from_column_major(torch.ones(8, 4)), UsageValueError,
                                       r"strides \(4, 1\) of rows and blocks, but should be \(1, 8\)"),
    "rows that are not aligned": (lambda: from_column_major(torch.ones(4, 6).mT), UsageValueError,
                                  r"strides \(1, 6\) of rows and blocks, but should be \(1, 8\)"),
    "words for other blocks": (lambda: from_packed_exponents(to_packed_exponents(torch.ones(4, 8)), 9), UsageValueError,
                               "2 elements, but should be 3 of 9 blocks, four to a word"),
    "rows in no runs of 64": (lambda: to_marlin(torch.ones(96, 2), single=False), UsageValueError,
                              "96 rows, but should be a multiple of 64 with several groups"),
    "an odd row": (lambda: from_interleaved(torch.ones(5, 2)), UsageValueError, "5 rows, but should be even"),
    "gate alone": (lambda: to_interleaved(torch.ones(1, 4, 2)), UsageValueError, "1 elements, but should be 2 of gate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    """A layout carries no shape of its own: what does not fill it is told with both numbers."""
    call, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        call()
