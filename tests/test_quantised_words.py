"""Protects the packing of quantised formats by hand: words written out in hexadecimal beside the numbers they hold, so
that a reader and a writer with the same mistake do not agree."""

import torch

from moe_ref.checkpoints.quantisation_config import read_format
from moe_ref.checkpoints.words import pack_words, unpack_words
from moe_ref.contract.encoded import Encoded, unpacked
from moe_ref.oracle.decode import decode
from tests.quantised_configs import CONFIGS


def word(*hexadecimal: int) -> torch.Tensor:
    """int32 words, (1, count)."""
    return torch.tensor([hexadecimal], dtype=torch.int64).to(torch.int32)


def read(name: str, num_columns: int, **tensors: torch.Tensor) -> Encoded:
    """The matrix that these tensors are in a format; storing it gives them back."""
    stored_format = read_format("config", CONFIGS[name][1])
    encoded = stored_format.encode(tensors, num_columns)
    stored = stored_format.store(encoded)
    for key, tensor in stored.items():
        assert torch.equal(tensor.float(), tensors[key].float()), key
    return encoded


def test_words_hold_the_first_number_in_the_lowest_bits() -> None:
    """Also where the highest bit, the sign, is set; the rest of a last word is 0."""
    assert unpack_words(word(0x76543210, 0xFEDCBA98), -1).tolist() == [list(range(16))]
    assert torch.equal(pack_words(torch.arange(16)[None], -1), word(0x76543210, 0xFEDCBA98))
    assert torch.equal(pack_words(torch.tensor([[0x80, 0x7F, 0xFF]]), -1, bits=8), word(0x00FF7F80))
    assert unpack_words(word(0x00FF7F80), -1, bits=8).tolist() == [[0x80, 0x7F, 0xFF, 0]]
    assert torch.equal(pack_words(torch.arange(9)[:, None], -2), word(0x76543210, 0x8).T)


def test_gptq() -> None:
    """Eight columns in a word of qweight, for each of eight rows; the zero point 8 is stored as 7, in gptq_v2 as 8."""
    qweight = torch.full((1, 8), 0x76543210, dtype=torch.int32)
    qweight[0, 1] = 0x01234567
    scales = torch.arange(1, 9).half()[None]
    for name, qzeros in (("gptq", 0x77777777), ("gptq_v2", 0x88888888)):
        encoded = read(name, 8, qweight=qweight, qzeros=word(qzeros), scales=scales,
                       g_idx=torch.zeros(8, dtype=torch.int32))
        assert unpacked(encoded.codes, 8)[:2].tolist() == [list(range(8)), list(range(7, -1, -1))]
        assert decode(encoded)[2].tolist() == [3 * (code - 8) for code in range(8)]


def test_gptq_zero_points() -> None:
    """Eight rows in a word of qzeros: 0 to 7 stored are 1 to 8 meant."""
    encoded = read("gptq_zeros", 8, qweight=torch.zeros(1, 8, dtype=torch.int32), qzeros=word(0x76543210),
                   scales=torch.ones(1, 8).half(), g_idx=torch.zeros(8, dtype=torch.int32))
    assert decode(encoded)[:, 0].tolist() == [-zero for zero in range(1, 9)]


def test_awq() -> None:
    """Eight rows in a word, bits 0 to 3 row 0, then rows 2, 4, 6, 1, 3, 5, 7; of zero points too, as they are."""
    qweight = torch.zeros(8, 1, dtype=torch.int32)
    qweight[3, 0] = 0x75316420
    encoded = read("awq", 8, qweight=qweight, qzeros=word(0x11110000), scales=torch.ones(1, 8).half())
    assert unpacked(encoded.codes, 8)[:, 3].tolist() == list(range(8))
    assert decode(encoded)[:, 0].tolist() == [0, -1, 0, -1, 0, -1, 0, -1]


def test_packed_int4_of_compressed_tensors() -> None:
    """Eight columns in a word, moved up by 8: 0 stored is -8; zero points eight rows in a word, moved up too."""
    rows = word(0x76543210, 0xFEDCBA98).T
    encoded = read("int4", 8, weight_packed=rows, weight_scale=torch.ones(2, 1).half())
    assert decode(encoded).tolist() == [list(range(-8, 0)), list(range(8))]
    encoded = read("int4_zeros", 8, weight_packed=rows, weight_scale=torch.ones(2, 1).half(),
                   weight_zero_point=word(0xF8))
    assert decode(encoded).tolist() == [list(range(-8, 0)), list(range(-7, 1))]


def test_packed_int8_of_compressed_tensors() -> None:
    """Four columns in a word, moved up by 128."""
    encoded = read("int8_packed", 4, weight_packed=word(0xFF818000), weight_scale=torch.ones(1, 1))
    assert decode(encoded).tolist() == [[-128, 0, 1, 127]]


def test_nvfp4_of_compressed_tensors() -> None:
    """The even column in the low half of a byte; the global scale divides."""
    packed = torch.zeros(1, 8, dtype=torch.uint8)
    packed[0, 0], packed[0, 1] = 0x21, 0xF7
    encoded = read("nvfp4", 16, weight_packed=packed, weight_scale=torch.tensor([[3.0]]).to(torch.float8_e4m3fn),
                   weight_global_scale=torch.tensor([4.0]))
    assert decode(encoded)[0, :5].tolist() == [0.375, 0.75, 4.5, -4.5, 0.0]


def test_mxfp4_of_gpt_oss() -> None:
    """Sixteen bytes a block, the even column in the low half; the scale is an exponent plus 127."""
    blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0], blocks[0, 1, 15] = 0x52, 0xE0
    encoded = read("gpt_oss_mxfp4", 64, blocks=blocks, scales=torch.tensor([[128, 126]], dtype=torch.uint8))
    decoded = decode(encoded)[0]
    assert decoded[:2].tolist() == [2.0, 6.0]
    assert decoded[-1] == -2.0
    assert int((decoded != 0).sum()) == 3


def test_block_scales_multiply() -> None:
    """weight_scale_inv, for all its name; a part of a block has its scale."""
    weight = torch.ones(129, 130).to(torch.float8_e4m3fn)
    encoded = read("deepseek_fp8", 130, weight=weight, weight_scale_inv=torch.tensor([[2.0, 3.0], [5.0, 7.0]]))
    decoded = decode(encoded)
    assert (decoded[127, 127], decoded[127, 128], decoded[128, 127], decoded[128, 129]) == (2, 3, 5, 7)
