"""Small integers packed into 32-bit words, along any axis."""

import torch


def unpack_words(words: torch.Tensor, dim: int, bits: int = 4, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """uint8 in place of int32, 32 / bits times as many along `dim`, a negative one; the first in the lowest bits.

    order[i]: which of a word's numbers lies in its i-th bits, where that is not the i-th.
    """
    count = 32 // bits
    shifts = torch.arange(count, dtype=torch.int32, device=words.device) * bits
    numbers = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    if order:
        numbers = numbers[..., torch.tensor(order, device=words.device).argsort()]
    return numbers.to(torch.uint8).movedim(-1, dim).flatten(dim - 1, dim)


def pack_words(numbers: torch.Tensor, dim: int, bits: int = 4, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The way back; where the last word is not full its rest is 0."""
    count = 32 // bits
    last = numbers.movedim(dim, -1).long()
    last = torch.nn.functional.pad(last, (0, -last.shape[-1] % count)).unflatten(-1, (-1, count))
    if order:
        last = last[..., torch.tensor(order, device=numbers.device)]
    words = (last << (torch.arange(count, device=numbers.device) * bits)).sum(-1)
    # The highest bit is the sign.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()
