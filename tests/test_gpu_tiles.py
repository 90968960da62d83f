"""The tiles of a GPU, run by the interpreter: on a CPU it has tiles of its own, so that no other test runs these.

One wrong bucket of a table of tiles is a known defect: it shows at some numbers of tokens alone.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import moe_fast
from moe_fast.architecture import assuming
from moe_fast.kernels.act_gradient import three_product_tile
from moe_fast.kernels.decoded_tile import decoded_gemm_tile
from moe_fast.kernels.gate_up import gate_up_tile
from moe_fast.kernels.route import Cut, route_cut
from moe_fast.kernels.row_gradient import row_gradient_tile
from moe_fast.kernels.scaled import scaled_tile
from moe_fast.operators.route import route_by
from moe_fast.operators.select import select_by
from moe_fast.tiles import Tile, choose, gemm_tile
from moe_fast.tiles.tables import table_of
from moe_ref import Router
from moe_ref.contract.vocabulary import Verdict
from tests.in_process import judged
from tests.test_operators import uniform

ARCHITECTURE = "sm_90"
LAYERS = {"aligned": "H208.I160.E4.K2", "odd": "H200.I136.E4.K2"}
"""Sizes that 16 divides, or not, which have other tiles; no multiples of a tile, and past the border of the widest."""

ROWS = {1: "one row per expert", 16: "the narrowest tile, full", 30: "the next, with a tail", 64: "the last of few",
        100: "the widest"}


def on_gpu(monkeypatch: pytest.MonkeyPatch, **table: object) -> set[Tile]:
    """Makes every kernel take the tile that it has on a GPU, by a table with those parts; the tiles that were taken."""
    monkeypatch.setattr(choose, "table_of", lambda name: replace(table_of(name), **table))
    tiles: set[Tile] = set()

    def replaced(choose: Callable[..., Tile | Cut]) -> Callable[..., Tile | Cut]:
        def chosen(device: torch.device, *arguments, **options) -> Tile | Cut:
            with assuming(ARCHITECTURE):
                found = choose(torch.device("meta"), *arguments, **options)
            if isinstance(found, Tile):
                tiles.add(found)
            return found
        return chosen

    choosers = (gemm_tile, gate_up_tile, three_product_tile, row_gradient_tile, route_cut, decoded_gemm_tile,
                scaled_tile)
    replacements = {function: replaced(function) for function in choosers}
    for name, module in list(sys.modules.items()):
        for function, replacement in replacements.items() if name.startswith("moe_fast.") else ():
            if vars(module).get(function.__name__) is function:
                monkeypatch.setattr(module, function.__name__, replacement)
    return tiles


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("layer", "dtype", "direction"), [("aligned", "bf16", ""), ("aligned", "bf16", "-bwd"),
                                                           ("odd", "bf16", "-bwd"), ("aligned", "fp32", "")])
@pytest.mark.parametrize("rows", ROWS, ids=ROWS.values())
def test_every_tile_of_a_gpu_computes_the_layer(rows: int, layer: str, dtype: str, direction: str,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged as any layer is; tp 2 leaves less columns than a tile has to a rank. On one multiprocessor no tile is cut.
    """
    used = on_gpu(monkeypatch, multiprocessors=1)
    found = judged(moe_fast, f"v1-T{2 * rows}.{LAYERS[layer]}-{dtype}-norm-tp2{direction}", runs=1)
    assert found.verdict == Verdict.PASS, found.reason
    wide = 128 if (layer, dtype) == ("aligned", "bf16") else 64
    assert next(size for size in (16, 32, 64, wide) if rows <= size or size == wide) in {tile.block_m for tile in used}
    if (layer, dtype, direction) == ("aligned", "bf16", ""):
        assert {1: 128, 16: 128, 30: 128, 64: 128, 100: 256}[rows] in {tile.block_n for tile in used}


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("rows", "words", "columns"), [
    (1, "bf16-nvfp4", 64), (30, "bf16-gptqorder", 16), (64, "bf16-awq32", 64), (100, "bf16-gptq32", 64),
    (100, "bf16-mxfp4", 64), (30, "fp32-int8", 64)])
def test_every_tile_of_encoded_experts(rows: int, words: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded weights pass through registers, so that tiles are narrower; a rank begins at column 80."""
    used = on_gpu(monkeypatch, multiprocessors=1)
    found = judged(moe_fast, f"v1-T{2 * rows}.{LAYERS['aligned']}-{words}-norm-tp2", runs=1)
    assert found.verdict == Verdict.PASS, found.reason
    block_m = 32 if words.startswith("fp32") else next(size for size in (16, 32, 64, 128) if rows <= size)
    assert (block_m, columns) in {(tile.block_m, tile.block_n) for tile in used}


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("rows", "words", "columns"), [
    (1, "bf16-fp8block", 128), (30, "fp16-mxfp8", 32), (64, "bf16-fp8row", 64), (100, "bf16-fp8block", 64),
    (100, "fp32-fp8tensor", 64)])
def test_every_tile_of_8_bit_operands(rows: int, words: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside each accumulator is the sum of a block, in tiles whose rows of the weight may have two scales."""
    used = on_gpu(monkeypatch, multiprocessors=1)
    found = judged(moe_fast, f"v1-T{2 * rows}.{LAYERS['aligned']}-{words}-norm-tp2", runs=1)
    assert found.verdict == Verdict.PASS, found.reason
    block_m = next(size for size in (16, 32, 64, 128) if rows <= size)
    assert (block_m, columns) in {(tile.block_m, tile.block_n) for tile in used}


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("words", "columns"), [("limit1", 32), ("weightinput", 32), ("gatecap2-upcap2.5", 16)])
def test_forms_that_take_registers_have_narrower_tiles(words: str, columns: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler would spill on some architecture at 128 rows; the layer is the same, forward and backward."""
    used = on_gpu(monkeypatch, multiprocessors=1)
    found = judged(moe_fast, f"v1-T200.{LAYERS['aligned']}-bf16-norm-{words}-bwd", runs=1)
    assert found.verdict == Verdict.PASS, found.reason
    assert (128, columns) in {(tile.block_m, tile.block_n) for tile in used}


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("rows", "direction"), [(1, ""), (100, ""), (30, "-bwd")])
def test_the_narrow_tiles_of_a_layer_that_fills_no_gpu(rows: int, direction: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """With 132 multiprocessors these layers have too few programs: columns are halved, and blocks have fewer rows."""
    used = on_gpu(monkeypatch)
    found = judged(moe_fast, f"v1-T{2 * rows}.{LAYERS['aligned']}-bf16-norm-tp2{direction}", runs=1)
    assert found.verdict == Verdict.PASS, found.reason
    assert (16, 16) in {(tile.block_m, tile.block_n) for tile in used}


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("tokens", "experts", "hidden", "dtype", "parts"), [
    (1, 100, 4400, torch.bfloat16, 12), (70, 40, 200, torch.bfloat16, 4), (33, 300, 160, torch.float32, 5),
    (600, 20, 2064, torch.float16, 4), (1025, 20, 200, torch.bfloat16, None), (2049, 100, 208, torch.float16, None),
    (1025, 3, 144, torch.float32, None)])
def test_every_cut_of_the_router(tokens: int, experts: int, hidden: int, dtype: torch.dtype, parts: int | None,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of H, or all of it in one kernel with the selection: the logits within (n + 1) roundings of the sum of
    absolute values, and the choice that those very logits ask for."""
    on_gpu(monkeypatch)
    monkeypatch.setattr("moe_fast.kernels.route.ENOUGH_TILES", 64)  # more would take the interpreter longer
    cut = sys.modules["moe_fast.kernels.route"].route_cut(torch.device("cpu"), dtype, tokens, experts, hidden)
    assert (None if cut.fused else cut.num_parts) == parts
    router = Router(num_experts=experts, top_k=3, renormalize=True)
    x_TH, router_EH, bias_E = (uniform(*shape, seed=seed, dtype=dtype) for seed, shape in
                               enumerate(((tokens, hidden), (experts, hidden), (experts,))))
    *chosen, logits_TE = route_by(router, x_TH, router_EH, bias_E, None, None, None)
    exact_TE = x_TH.double() @ router_EH.double().T + bias_E.double()
    bound_TE = (hidden + 2) * 2**-24 * (x_TH.double().abs() @ router_EH.double().abs().T + bias_E.double().abs())
    assert ((logits_TE.double() - exact_TE).abs() <= bound_TE).all()
    assert all(map(torch.equal, chosen, select_by(router, logits_TE, None, None, None)))
