"""Data under which a mistake in the mathematics shows: all biases, scores below zero, gates beyond the clamp.

What plain random data with zero biases misses exactly: a dropped or leaking selection bias, the fill of groups
that are out, every clamp at its released limit of 7 or 10, and every epsilon.
"""

import math

import torch
from torch import nn

from tests.third_party.family import BATCH, SEQUENCE, TOKENS, Family, H

SELECTION_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
ROUTERS = ("gate.weight", "router.weight", "router.gate.weight", "router.layer.weight", "classifier.weight",
           "gate.wg.weight", "router.proj.weight")

QUIET_CHANNEL, LOUD_CHANNELS = 0, slice(1, 5)
QUIET, LOUD = slice(0, 6), slice(6, 14)


def tokens(seed: int = 1) -> torch.Tensor:
    """(B, S, H) in fp32, standard normal but for two kinds of tokens in the first sequence.

    Quiet ones have one large channel that the routers weight with about -3: their sigmoid scores are 1e-6 to
    1e-20, of the size of the epsilons. Loud ones have four large channels of random signs: their logits are up to
    60 apart, so that a selection bias may leave out the expert that holds all of the softmax.
    """
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(TOKENS, H, generator=generator)
    x_TH[:, QUIET_CHANNEL] = 0.0
    x_TH[QUIET, QUIET_CHANNEL] = torch.linspace(4.0, 15.0, QUIET.stop - QUIET.start)
    signs = torch.randint(0, 2, x_TH[LOUD, LOUD_CHANNELS].shape, generator=generator) * 2.0 - 1.0
    x_TH[LOUD, LOUD_CHANNELS] = 6.0 * signs
    return x_TH.view(BATCH, SEQUENCE, H)


@torch.no_grad()
def fill(block: nn.Module, family: Family, seed: int) -> None:
    """Draw every parameter and floating-point buffer; deterministic."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if name.endswith(SELECTION_BIASES):
            # Mostly negative, so that selection scores lie on both sides of zero.
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 - 1.5)
        elif tensor.ndim >= 2:
            fan_in = tensor.shape[family.fan_in] if tensor.ndim == 3 else tensor.shape[-1]
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(fan_in))
            if name.endswith(ROUTERS):
                tensor.mul_(2.0)
                tensor[:, QUIET_CHANNEL] = -3.0 + 0.1 * torch.randn(len(tensor), generator=generator)
                tensor[:, LOUD_CHANNELS] = 1.5 * torch.randn(tensor[:, LOUD_CHANNELS].shape, generator=generator)
        elif "scale" in name:
            tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
        elif "norm" in name:
            tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
