"""Somebody else's decoder of a scheme, as a function of our encoded matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_ref.adapters.library import Library
from moe_ref.contract.encoded import Encoded, unpacked
from moe_ref.contract.vocabulary import Scheme

Decode = Callable[[Encoded], torch.Tensor]


@dataclass(frozen=True)
class Decoder:
    """One function of a library.

    function: its name. decode: a matrix without leading axes, brought into the layout that the function reads and
    handed to it, (N, K) in the dtype in which it computes. multiplies: it is a product with the identity, through which
    a NaN or an infinity would spread. exact_second: a second scale need not be a power of two. differs: scales, as the
    integers of their bits, that it reads otherwise than the format says; how stands in docs/quantised.md.
    """

    library: Library
    function: str
    schemes: tuple[Scheme, ...]
    decode: Decode
    multiplies: bool = False
    exact_second: bool = True
    differs: frozenset[int] = frozenset()


NAN = frozenset({255})
"""The e8m0 scale that is NaN (OCP Microscaling 1.0, section 5.4.1), read as 2^128, which is infinity in fp32."""


def codes_of(encoded: Encoded) -> torch.Tensor:
    """(N, K), uint8, of two codes to a byte."""
    return unpacked(encoded.codes, encoded.num_columns)


def words(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes from 0 to 15 to an int32, the first in the lowest bits, along the last axis."""
    shifts = torch.arange(0, 32, 4)
    whole = (codes.long().unflatten(-1, (-1, 8)) << shifts).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()
