"""Layers over encoded experts that read codes or scales as what they are not, after defects that shipped elsewhere."""

from dataclasses import replace

import torch

from moe_ref.contract.encoded import Encoded, packed, unpacked
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from tests.subjects.quantised import QuantisedMoE, floating


class NibblesSwapped(QuantisedMoE):
    """The odd column in the low half of a byte."""

    def numbers(self, w: Encoded) -> torch.Tensor:
        if ENCODINGS[w.scheme].codes.per_byte == 1:
            return super().numbers(w)
        return super().numbers(replace(w, codes=w.codes << 4 | w.codes >> 4))


class AWQOrderForPlain(QuantisedMoE):
    """Eight columns in the order in which AWQ packs them into a word, 0 2 4 6 1 3 5 7."""

    def numbers(self, w: Encoded) -> torch.Tensor:
        codes = unpacked(w.codes, w.num_columns)
        columns = torch.arange(w.num_columns // 8 * 8).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
        codes[:, :len(columns)] = codes[:, columns]
        return super().numbers(replace(w, codes=packed(codes)))


class ZerosOffByOne(QuantisedMoE):
    """Zero points are stored less one, as of GPTQ's first format, but these are not."""

    def numbers(self, w: Encoded) -> torch.Tensor:
        return super().numbers(w) - float(ENCODINGS[w.scheme].codes is Codes.INT4)


class UnsignedBytes(QuantisedMoE):
    """int8 codes from 0 to 255."""

    def numbers(self, w: Encoded) -> torch.Tensor:
        return super().numbers(w) % 256


class WrongTableEntry(QuantisedMoE):
    """5 for 6 among the numbers of e2m1."""

    def numbers(self, w: Encoded) -> torch.Tensor:
        numbers = super().numbers(w)
        return torch.where(numbers.abs() == 6, 5 * numbers.sign(), numbers)


class E5M2ForE4M3(QuantisedMoE):
    """Bytes of e4m3 read as e5m2."""

    def numbers(self, w: Encoded) -> torch.Tensor:
        return floating(w.codes.view(torch.uint8), 5, 2, 15)


class BiasOfFNUZ(QuantisedMoE):
    """Bytes of e4m3 read as those of hardware whose exponents have a bias one larger."""

    def numbers(self, w: Encoded) -> torch.Tensor:
        return floating(w.codes.view(torch.uint8), 4, 3, 8)


class Bias126(QuantisedMoE):
    """Exponents of e8m0 with the bias that fp32 has after its hidden bit is dropped."""

    def scales(self, w: Encoded) -> torch.Tensor:
        return super().scales(w) * (2.0 if ENCODINGS[w.scheme].scales is Scales.E8M0 else 1.0)


class SecondScaleInverted(QuantisedMoE):
    """A second scale that is stored as its reciprocal elsewhere."""

    def decoded(self, w: Encoded) -> torch.Tensor:
        return super().decoded(w) if w.second_scale is None else super().decoded(w) / w.second_scale.square()


class TinyScalesFlushed(QuantisedMoE):
    """Scales below 1e-6 become zero."""

    def scales(self, w: Encoded) -> torch.Tensor:
        scales = super().scales(w)
        return torch.where(scales < 1e-6, 0.0, scales)


class ScalesThroughHalf(QuantisedMoE):
    """Scales are stored in fp16, whatever their dtype is."""

    def scales(self, w: Encoded) -> torch.Tensor:
        return super().scales(w).half().float()
