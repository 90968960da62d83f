"""From tokens to selected experts: one kernel where tiles of tokens fill a device, else the product in parts before it.

A decode step has few tokens, and its product is a stream of the router's weights: parts of H share it among programs.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from moe_fast.invariance import rows_for_tiles
from moe_fast.kernels.product import inner_products, product_parts
from moe_fast.kernels.select import Four, select, select_arguments, select_rows
from moe_fast.launch import launch
from moe_fast.tiles import ALIGNED, Load, Tile, gemm_tile
from moe_ref.contract.spec import Router

PROGRAMS, PROGRAMS_INTERPRETED = 256, 2
"""How many programs a product is cut into: about two for each multiprocessor; the interpreter takes them in turn."""
ENOUGH_TILES, ENOUGH_TILES_INTERPRETED = 256, 2
"""From how many tiles of tokens on each of them is computed with all experts by one program: fewer would wait for their
loads, as `moe-ref bench --roofline` predicts."""
FEW_EXPERTS, MOST_EXPERTS = 64, 256
"""For which one program has the registers; more than few where it multiplies 16-bit numbers from aligned rows."""
MOST_PARTS, PARTS_FOR_WIDTH = 16, 8
"""Parts of H, and how many are counted on when a tile's width is chosen: wide tiles read the tokens less often."""


@triton.jit
def route_kernel(x, router, router_bias, logits, shared_logits, selection_bias, weight_scale, ids, weights,
                 shared_weights, num_tokens, num_experts, num_shared, hidden_size, group_size, stride_x_T, stride_x_H,
                 stride_router_E, stride_router_H, stride_router_bias_E, stride_logits_T, stride_logits_E,
                 stride_shared_T, stride_shared_S, stride_scale_E, logit_scale, logit_softcap, epsilon,
                 scaling_factor, HAS_ROUTER_BIAS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
                 EXPERTS: tl.constexpr, SHARED: tl.constexpr, SCORE: tl.constexpr, SOFTCAP: tl.constexpr,
                 BIAS_ON: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr,
                 TOP2_SUM: tl.constexpr, FILL_ZERO: tl.constexpr, RENORMALIZE: tl.constexpr, CLAMP: tl.constexpr,
                 HAS_SCALE: tl.constexpr, PER_EXPERT: tl.constexpr, HAS_SHARED: tl.constexpr, BLOCK_T: tl.constexpr,
                 BLOCK_H: tl.constexpr):
    """Logits of a tile of tokens for all experts, kept for the gradient, and the selection by them."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, EXPERTS)
    logit = inner_products(x, router, router_bias, t, expert, num_tokens, num_experts, hidden_size, 0, hidden_size,
                           stride_x_T, stride_x_H, stride_router_E, stride_router_H, stride_router_bias_E,
                           HAS_ROUTER_BIAS, BLOCK_T, EXPERTS, BLOCK_H)
    logits_at = logits + t.to(tl.int64)[:, None] * stride_logits_T + expert[None, :] * stride_logits_E
    tl.store(logits_at, logit, mask=(t < num_tokens)[:, None] & (expert < num_experts)[None, :])
    select_rows(logit, t, shared_logits, selection_bias, weight_scale, ids, weights, shared_weights, num_tokens,
                num_experts, num_shared, group_size, stride_shared_T, stride_shared_S, stride_scale_E, logit_scale,
                logit_softcap, epsilon, scaling_factor, TOP_K, SLOTS, EXPERTS, SHARED, SCORE, SOFTCAP, BIAS_ON,
                NUM_GROUPS, GROUPS, GROUPS_KEPT, TOP2_SUM, FILL_ZERO, RENORMALIZE, CLAMP, HAS_SCALE, PER_EXPERT,
                HAS_SHARED, BLOCK_T)


@dataclass(frozen=True)
class Cut:
    """How logits are made: a tile (tokens, experts, H), parts of H, and whether the same program selects by them."""

    tile: Tile
    num_parts: int
    part_size: int
    fused: bool


def route_cut(device: torch.device, dtype: torch.dtype, num_tokens: int, num_experts: int, hidden: int) -> Cut:
    """For operands of `dtype`; it follows shapes alone, and for a batch-invariant result not the number of tokens."""
    interpreted = device.type == "cpu"
    num_tokens, experts = max(1, rows_for_tiles(num_tokens, 1)), max(16, triton.next_power_of_2(num_experts))
    tile = gemm_tile(device, dtype, Load(num_tokens), min(experts, 64), hidden, kernel="route",
                     block_m=16 if (experts <= FEW_EXPERTS and not interpreted) or num_tokens <= 16 else 32)
    token_tiles = triton.cdiv(num_tokens, tile.block_m)
    most_experts = FEW_EXPERTS if dtype == torch.float32 or hidden % ALIGNED else MOST_EXPERTS
    if token_tiles >= (ENOUGH_TILES_INTERPRETED if interpreted else ENOUGH_TILES) and experts <= most_experts:
        # ptxas spills on sm_100, far from the limit of registers: with steps of 128 and up to 32 experts, with steps of
        # 64 and 64 experts.
        short = experts <= 32 and not interpreted
        tile = replace(tile, block_n=experts, block_k=min(tile.block_k, 64) if short else tile.block_k,
                       num_warps=tile.num_warps if experts <= FEW_EXPERTS else 8)
        return Cut(tile, 1, hidden, fused=True)
    programs = PROGRAMS_INTERPRETED if interpreted else PROGRAMS
    block_n = next((width for width in (128, 64) if token_tiles * triton.cdiv(num_experts, width) * PARTS_FOR_WIDTH
                    >= programs), 32)
    tile = replace(tile, block_n=min(block_n, experts))
    num_steps = triton.cdiv(hidden, tile.block_k)
    num_parts = min(num_steps, MOST_PARTS, programs // (token_tiles * triton.cdiv(num_experts, tile.block_n)))
    # Powers of two, since the selection is compiled for each number of parts.
    part_size = triton.cdiv(num_steps, 2 ** max(0, num_parts.bit_length() - 1)) * tile.block_k
    return Cut(tile, triton.cdiv(hidden, part_size), part_size, fused=False)


def route(x_TH: torch.Tensor, router_EH: torch.Tensor, router_bias_E: torch.Tensor | None,
          shared_logits_TS: torch.Tensor | None, selection_bias_E: torch.Tensor | None,
          weight_scale_E: torch.Tensor | None, router: Router) -> Four:
    """ids_TK (int32), weights_TK, shared_TS and logits_TE (fp32), without any capacity; logits accumulate in fp32."""
    (num_tokens, hidden), num_experts, device = x_TH.shape, router_EH.shape[0], x_TH.device
    cut = route_cut(device, torch.promote_types(x_TH.dtype, router_EH.dtype), num_tokens, num_experts, hidden)
    if not cut.fused:
        logits_PTE = product_parts(x_TH, router_EH, router_bias_E, cut.tile, cut.num_parts, cut.part_size)
        return select(logits_PTE, shared_logits_TS, selection_bias_E, weight_scale_E, router)
    logits_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device)
    chosen, arguments = select_arguments(logits_TE, shared_logits_TS, selection_bias_E, weight_scale_E, router)
    launch(route_kernel, (triton.cdiv(num_tokens, cut.tile.block_m),), device,
           **arguments | {"EXPERTS": cut.tile.block_n}, x=x_TH, router=router_EH,
           router_bias=x_TH if router_bias_E is None else router_bias_E, hidden_size=hidden, stride_x_T=x_TH.stride(0),
           stride_x_H=x_TH.stride(1), stride_router_E=router_EH.stride(0), stride_router_H=router_EH.stride(1),
           stride_router_bias_E=0 if router_bias_E is None else router_bias_E.stride(0),
           HAS_ROUTER_BIAS=router_bias_E is not None, BLOCK_T=cut.tile.block_m, BLOCK_H=cut.tile.block_k,
           num_warps=cut.tile.num_warps, num_stages=cut.tile.num_stages)
    return *chosen, logits_TE
