"""Rows sorted by expert and padded to tiles, in plain torch: the CUDA operator moe_align_block_size of vLLM and
SGLang.
"""

import torch


def aligned_rows(ids_TK: torch.Tensor, block: int, num_experts: int,
                 keep_none: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Slots by expert, those of an expert padded with T * K to a multiple of `block`; the expert of each block; rows.

    ids_TK integer. Slots with id -1 get blocks of their own, whose expert is -1, where `keep_none`, and are left out
    else. Both tensors are int32; their length is what the blocks need.
    """
    flat_S = ids_TK.flatten().long()
    slots, experts = [], []
    for expert in range(-1 if keep_none else 0, num_experts):
        slot_R = (flat_S == expert).nonzero().squeeze(1)
        blocks = -(-len(slot_R) // block)
        slots.append(torch.nn.functional.pad(slot_R, (0, blocks * block - len(slot_R)), value=flat_S.numel()))
        experts += [expert] * blocks
    rows = torch.cat(slots).to(torch.int32)
    return rows, torch.tensor(experts, dtype=torch.int32, device=rows.device), rows.numel()
