"""One grouped product with a given tile, as a layer would launch it: recorded on meta tensors."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from moe_fast.architecture import assuming
from moe_fast.compile.combinations import Combination, combination_of
from moe_fast.compile.recorder import META, Launch
from moe_fast.form import Form
from moe_fast.kernels.align import align
from moe_fast.kernels.down import down
from moe_fast.kernels.gate_up import gate_up
from moe_fast.launch import recording
from moe_fast.tiles.tables import Entry, Product, table_of
from moe_fast.tiles.tile import Tile

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def record_product(product: Product, rows: int, top_k: int, tile: Tile, architecture: str) -> Launch:
    """The launch of `product` for `rows` routed rows of rows / top_k tokens."""
    launches: list[Launch] = []
    dtype, experts, tokens = TORCH_DTYPES[product.dtype], product.experts, rows // top_k

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    ids_TK, hosted_E = meta(tokens, top_k, dtype=torch.int64), meta(experts, dtype=torch.int64)
    weights_R = meta(rows, dtype=torch.float32)
    with assuming(architecture), recording(lambda kernel, given: launches.append(Launch(kernel, given))):
        alignment = align(ids_TK, hosted_E, tile.block_m)
        if product.kernel == "gate_up":
            w13_EGIH = meta(experts, product.accumulators, product.out_features, product.in_features)
            gate_up(meta(tokens, product.in_features), w13_EGIH, None, weights_R, alignment, top_k,
                    Form(gated=product.accumulators == 2), tile)
        else:
            w2_EHI = meta(experts, product.out_features, product.in_features)
            down(meta(rows, product.in_features), w2_EHI, None, weights_R, alignment, tile)
    return launches[-1]


def tile_combinations(architectures: Iterable[str]) -> list[Combination]:
    """Every tile of the tables: all widths of the heuristic's, of a rank of Mixtral 8x7B at tp 8, and tuned ones."""
    found = {}
    for architecture in architectures:
        for entry in table_of(architecture).heuristic:
            for product, tile in _widths(entry):
                rows = _EXPERTS * entry.tile.block_m
                one = combination_of(record_product(product, rows, _TOP_K, tile, architecture), architecture)
                found.setdefault(one.key, one)
    tuned = {one.key: one for one in tuned_combinations(architectures)}
    return list((found | tuned).values())


def tuned_combinations(architectures: Iterable[str]) -> list[Combination]:
    """Of every tuned entry on its own shape; another number of experts per token is no other kernel."""
    found = {}
    for architecture in architectures:
        for one in table_of(architecture).tuned:
            top_k = _TOP_K if one.rows % _TOP_K == 0 else 1
            combination = combination_of(record_product(one.product, one.rows, top_k, one.tile, architecture),
                                         architecture)
            found.setdefault(combination.key, combination)
    return list(found.values())


_TOP_K, _EXPERTS, _HIDDEN, _INTERMEDIATE = 2, 8, 4096, 1792


def _widths(entry: Entry) -> Iterator[tuple[Product, Tile]]:
    gate_up = Product("gate_up", "bf16", _INTERMEDIATE, _HIDDEN, 2, _EXPERTS)
    down = Product("down", "bf16", _HIDDEN, _INTERMEDIATE, 1, _EXPERTS)
    for product in (gate_up, down):
        for block_n in entry.widths(product.accumulators):
            yield product, replace(entry.tile, block_n=block_n)
