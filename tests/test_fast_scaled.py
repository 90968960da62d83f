"""Products of 8-bit operands in the fast path, against exact sums of the codes that were multiplied.

What is multiplied is known (test_fast_rounded_rows.py has how rows are rounded), so that a product may err by its sums
in fp32 alone, wherever a block of the weight or a rank's part ends.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, nan

import pytest
import torch

import moe_fast
from moe_fast.form import form_of, parse_form
from moe_fast.kernels import round_rows as rounding
from moe_fast.operators.encoded_arguments import EncodedDown, EncodedGateUp, EncodedMLP
from moe_fast.operators.encoded_rows import EncodedRows
from moe_fast.operators.scaled import SCHEMES, scaled_act_rows, scaled_down_rows, scaled_mlp_rows
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Scheme, Stage, Verdict
from moe_ref.oracle.decode import decode
from moe_ref.oracle.expert import activate
from moe_ref.verify.child.guard import poison
from tests.in_process import judged
from tests.test_fast_rounded_rows import BLOCK, DTYPES, E4M3, MX, ROW, SIZES, TENSOR, codes_of, expected_rows

SUM = 2.0**-24
"""What an addition in fp32 loses, relative to the sum of magnitudes."""


@dataclass(frozen=True)
class Sizes:
    """Of a layer; by default no multiple of 128, 32 or a tile."""

    tokens: int = 21
    hidden: int = 200
    intermediate: int = 168
    experts: int = 5
    top_k: int = 2


def encoded(scheme: Scheme, leading: tuple[int, ...], rows: int, columns: int, exact: bool, seed: int) -> Encoded:
    """All codes but NaN under scales that differ from block to block; exact: -2 to 2 under powers of two."""
    generator = torch.Generator().manual_seed(seed)
    blocks = (*leading, *ENCODINGS[scheme].blocks(rows, columns))
    if exact:
        codes = torch.randint(-2, 3, (*leading, rows, columns), generator=generator).float().to(E4M3)
        exponents = torch.randint(-5, -2, blocks, generator=generator)
    else:
        codes = torch.randint(0, 127, (*leading, rows, columns), generator=generator)
        codes = (codes + 128 * torch.randint(0, 2, codes.shape, generator=generator)).to(torch.uint8).view(E4M3)
        exponents = torch.randint(-12, -8, blocks, generator=generator)
    if scheme is MX:
        scales = (exponents + 127).to(torch.uint8)
    else:
        scales = exponents.float().exp2() * (1 if exact else torch.rand(blocks, generator=generator) + 1)
    return Encoded(scheme=scheme, codes=codes, scales=scales, num_columns=columns)


def layer(scheme: Scheme, sizes: Sizes = Sizes(), dtype: torch.dtype = torch.float32, mlp: MLP = MLP(),  # noqa: B008
          biases: bool = False, exact: bool = False, weight_on_input: bool = False) -> EncodedMLP:
    """Tokens whose ids name experts at hand, some that are not, and none; the last expert gets no row."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        if exact:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(*shape, generator=generator)

    form = parse_form(form_of(mlp, weight_on_input=weight_on_input))
    num, parts = sizes.experts, form.num_projections
    ids_TK = torch.randint(-1, num, (sizes.tokens, sizes.top_k), generator=generator)
    hosted_E = torch.arange(num).flip(0)
    ids_TK[ids_TK == hosted_E[-1]] = num + 3
    ids_TK[0, 0] = hosted_E[0]
    scale_E = None
    if scheme is TENSOR:
        scale_E = torch.randint(-8, -5, (num,), generator=generator).float().exp2() * (1 if exact else 1.3)
    return EncodedMLP(
        drawn(sizes.tokens, sizes.hidden).to(dtype), ids_TK,
        torch.rand(sizes.tokens, sizes.top_k, generator=generator) + 0.5, hosted_E,
        encoded(scheme, (num, parts), sizes.intermediate, sizes.hidden, exact, 1),
        encoded(scheme, (num,), sizes.hidden, sizes.intermediate, exact, 2), form,
        drawn(num, parts, sizes.intermediate).to(dtype) if biases else None,
        drawn(num, sizes.hidden).to(dtype) if biases else None, scale_E,
        None if scale_E is None else scale_E.flip(0) * 64)


def spread(scales_RB: torch.Tensor, part: Encoded) -> torch.Tensor:
    """The scale of every column of rows, in fp64, (R, K)."""
    size = SIZES[part.scheme] or part.num_columns
    return scales_RB.double().repeat_interleave(size, 1)[:, part.column_start:part.column_start + part.num_columns]


def place_of(given: EncodedMLP) -> torch.Tensor:
    """The place of each row's expert, -1 for none."""
    found = given.ids_TK.reshape(-1, 1) == given.hosted_E
    return torch.where(found.any(1), found.int().argmax(1), -1)


def act_in_row_order(rows: EncodedRows, num_rows: int) -> torch.Tensor:
    act_RI = torch.zeros(num_rows, rows.act_RI.shape[1], dtype=torch.float64)
    num_valid = int(rows.alignment.offsets[-1])
    act_RI[rows.alignment.sorted_rows_R[:num_valid].long()] = rows.act_RI[:num_valid].double()
    return act_RI


def exact_products(codes: torch.Tensor, scales: torch.Tensor, matrix: Encoded, places_R: torch.Tensor,
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of codes times scales in fp64, a row each, of L = (E, G) or (E,), and of their magnitudes."""
    rows_RK, weights = codes.double() * spread(scales, matrix), decode(matrix)
    sums = [torch.einsum("k,...nk->...n", row, weights[e]) for row, e in zip(rows_RK, places_R.tolist(), strict=True)]
    sizes = [torch.einsum("k,...nk->...n", row.abs(), weights[e].abs())
             for row, e in zip(rows_RK, places_R.tolist(), strict=True)]
    return torch.stack(sums), torch.stack(sizes)


def check_rounding(given: EncodedMLP, rows: EncodedRows, held_R: torch.Tensor) -> None:
    """Codes and scales of tokens, weighted in fp32 where the weight is on them, and of act as it was stored."""
    tokens_RH = given.x_TH.repeat_interleave(given.ids_TK.shape[1], 0)
    if given.form.weight_on_input:
        tokens_RH = tokens_RH.float() * given.weights_TK.reshape(-1, 1)
    act_RI = act_in_row_order(rows, given.ids_TK.numel()).to(given.x_TH.dtype)
    places_R = place_of(given)[held_R]
    for taken, matrix, input_scale, codes, scales in (
            (tokens_RH, given.w13, given.w13_input_scale_E, rows.permute_codes_RH, rows.permute_scales_RQ),
            (act_RI, given.w2, given.w2_input_scale_E, rows.act_codes_RI, rows.act_scales_RQ)):
        expected = expected_rows(taken[held_R], matrix.scheme, matrix.column_start)
        if input_scale is not None:
            scale_R1 = input_scale[places_R][:, None]
            expected = codes_of(taken[held_R].float(), scale_R1), scale_R1
        assert codes is not None
        assert scales is not None
        assert codes.dtype == E4M3
        assert torch.equal(codes[held_R].float(), expected[0])
        assert torch.equal(scales[held_R], expected[1])


def check(given: EncodedMLP, rows: EncodedRows) -> None:
    """Rounding to the bit, and both products within what sums in fp32 lose."""
    held_R = place_of(given) >= 0
    places_R, act_RI = place_of(given)[held_R], act_in_row_order(rows, given.ids_TK.numel())[held_R]
    check_rounding(given, rows, held_R)
    stored = torch.finfo(given.x_TH.dtype)
    products_RGI, sizes_RGI = exact_products(rows.permute_codes_RH[held_R], rows.permute_scales_RQ[held_R], given.w13,
                                             places_R)
    additions = given.w13.num_columns + 16
    if given.form.words == "relu gated=False":
        expected = products_RGI[:, 0].clamp(min=0)
        allowed = additions * SUM * sizes_RGI[:, 0] + stored.eps * expected + stored.tiny
        assert bool(((act_RI - expected).abs() <= allowed).all())
    weights_R1 = given.weights_TK.reshape(-1, 1)[held_R].double()
    sums_RH, sizes_RH = exact_products(rows.act_codes_RI[held_R], rows.act_scales_RQ[held_R], given.w2, places_R)
    if given.w2_bias_EH is not None:
        bias_RH = given.w2_bias_EH.double()[places_R]
        sums_RH, sizes_RH = sums_RH + bias_RH, sizes_RH + bias_RH.abs()
    if not given.form.weight_on_input:
        sums_RH, sizes_RH = sums_RH * weights_R1, sizes_RH * weights_R1
    allowed = (given.w2.num_columns + 16) * SUM * sizes_RH + stored.eps * sums_RH.abs() + stored.tiny
    assert bool(((rows.down_RH[held_R].double() - sums_RH).abs() <= allowed).all())
    assert bool((sums_RH != 0).any(1).all())


PRODUCT = MLP(activation="relu", gated=False)
"""What is between the products adds nothing to an error."""


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_those_of_the_codes(scheme: Scheme, dtype: torch.dtype) -> None:
    """All codes, scales of many sizes, rows of no expert, an expert without rows, sizes that nothing divides."""
    given = layer(scheme, dtype=dtype, mlp=PRODUCT)
    check(given, scaled_mlp_rows(given, traced=True))


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("sizes", [Sizes(tokens=1, top_k=1, experts=2), Sizes(hidden=16, intermediate=24),
                                   Sizes(hidden=128, intermediate=256), Sizes(9, 300, 1200, 2)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_sizes(scheme: Scheme, sizes: Sizes) -> None:
    """One token; less than a block; blocks that end with the matrix; tiles of more than one block of rows."""
    given = layer(scheme, sizes, mlp=PRODUCT)
    check(given, scaled_mlp_rows(given, traced=True))


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_architectures_without_e4m3_multiply_the_same_numbers(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """On sm_80 and gfx942 kernels decode bytes to fp16; products of those in fp32 are the same to the bit here."""
    given = layer(scheme, dtype=torch.bfloat16)
    native = scaled_mlp_rows(given, traced=True)
    monkeypatch.setattr(rounding, "multiplies_codes", lambda device: False)
    found = scaled_mlp_rows(given, traced=True)
    held_R = place_of(given) >= 0
    assert torch.equal(found.down_RH[held_R], native.down_RH[held_R])
    assert torch.equal(found.act_codes_RI[held_R].float(), native.act_codes_RI[held_R].float())


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("cuts", [(0, 72, 168), (0, 8, 24, 168), (0, 130, 168)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_that_begin_inside_a_block(scheme: Scheme, cuts: tuple[int, ...]) -> None:
    """Tensor parallel ranks: rows of w13 and columns of w2, and so the blocks of act, begin where the cut is."""
    for start, stop in pairwise(cuts):
        given = rank_part(scheme, start, stop)
        check(given, scaled_mlp_rows(given, traced=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_part_without_columns_gives_zeros(scheme: Scheme) -> None:
    """Its products are empty, but are multiplied with scales of rows, which 0 times NaN shows to be unwritten."""
    given = rank_part(scheme, 168, 168)
    with poison(0):
        rows = scaled_mlp_rows(given, traced=True)
    assert not rows.down_RH[place_of(given) >= 0].any()


def rank_part(scheme: Scheme, start: int, stop: int) -> EncodedMLP:
    """Of a rank."""
    whole = layer(scheme, mlp=PRODUCT)
    return replace(whole, w13=whole.w13.rows((start, stop)), w2=whole.w2.columns((start, stop)))


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_by_output_of_the_gather_schedule(scheme: Scheme) -> None:
    """Halves by themselves: act of all ranks in (token, slot) order, and rows of w2 that begin inside a block."""
    whole = layer(scheme, mlp=PRODUCT)
    rows, num_rows = scaled_mlp_rows(whole, traced=True), whole.ids_TK.numel()
    first = scaled_act_rows(EncodedGateUp(whole.x_TH, whole.ids_TK, whole.hosted_E, whole.w13, whole.form, None, None,
                                          whole.w13_input_scale_E))
    act_RI, held_R = act_in_row_order(rows, num_rows), place_of(whole) >= 0
    assert torch.equal(act_in_row_order(first, num_rows), act_RI)
    for start, stop in ((0, 72), (72, 200)):
        w2 = whole.w2.rows((start, stop))
        found = scaled_down_rows(EncodedDown(act_RI.float(), whole.ids_TK, whole.weights_TK, whole.hosted_E, w2, None,
                                             whole.w2_input_scale_E), traced=True)
        assert torch.equal(found.act_codes_RI[held_R].float(), rows.act_codes_RI[held_R].float())
        part = replace(rows, down_RH=found.down_RH)
        check(replace(whole, w2=w2), part)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens_and_no_expert_at_hand(scheme: Scheme) -> None:
    """Nothing starts, or no row is written; shapes are what they are."""
    given = layer(scheme)
    for tokens, ids_TK in ((0, given.ids_TK[:0]), (21, torch.full_like(given.ids_TK, -1))):
        rows = scaled_mlp_rows(replace(given, x_TH=given.x_TH[:tokens], ids_TK=ids_TK,
                                       weights_TK=given.weights_TK[:tokens]))
        assert rows.down_RH.shape == (2 * tokens, 200)
        assert int(rows.alignment.offsets[-1]) == 0


MLPS = {
    "gpt-oss": MLP(limit=7.0, sigmoid_scale=1.702, up_offset=1.0), "gelu": MLP(activation="gelu"),
    "gelu_tanh": MLP(activation="gelu_tanh"), "limit after": MLP(limit=1.5, limit_at="after"),
    "one projection": MLP(activation="relu_squared", gated=False),
    "softcaps": MLP(gate_softcap=1.25, up_softcap=2.5, sigmoid_scale=1.5, up_offset=0.5),
}


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("weight_on_input", [False, True], ids=["weight on output", "weight on input"])
@pytest.mark.parametrize("name", MLPS)
def test_forms(name: str, weight_on_input: bool) -> None:
    """Products are exact here, of integers under powers of two: what act differs by is the formula's own rounding."""
    given = layer(MX, mlp=MLPS[name], biases=True, exact=True, weight_on_input=weight_on_input)
    rows, held_R = scaled_mlp_rows(given, traced=True), place_of(given) >= 0
    places_R = place_of(given)[held_R]
    check(given, rows)
    products_RGI, _ = exact_products(rows.permute_codes_RH[held_R], rows.permute_scales_RQ[held_R], given.w13, places_R)
    assert given.w13_bias_EGI is not None
    truth_RI = activate(products_RGI + given.w13_bias_EGI.double()[places_R], MLPS[name])
    largest = 1 + products_RGI.abs().prod(1).amax()
    found_RI = act_in_row_order(rows, given.ids_TK.numel())[held_R]
    assert float((found_RI - truth_RI).abs().max()) <= 64 * SUM * float(largest)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("scheme", "bad"), [
    (TENSOR, nan), (ROW, nan), (BLOCK, nan), (MX, nan), (ROW, inf), (BLOCK, -inf), (MX, inf)])
def test_a_row_that_is_not_finite_is_nan_alone(scheme: Scheme, bad: float) -> None:
    """e4m3 has no infinity, so the rows of a token with one are NaN; no other row changes by a bit."""
    given = layer(scheme)
    clean = scaled_mlp_rows(given, traced=True)
    x_TH = given.x_TH.clone()
    x_TH[3, 150] = bad
    found = scaled_mlp_rows(replace(given, x_TH=x_TH))
    held_R = place_of(given) >= 0
    of_token_R = torch.arange(given.ids_TK.numel()) // given.ids_TK.shape[1] == 3
    assert bool((held_R & of_token_R).any())
    assert bool(found.down_RH[held_R & of_token_R].isnan().all())
    assert torch.equal(found.down_RH[held_R & ~of_token_R], clean.down_RH[held_R & ~of_token_R])


CASES = [
    "v1-T33.H128.I256.E8.K2-bf16-fp8block-norm", "v1-T33.H200.I192.E4.K2-fp16-fp8block-norm-sh72-tp2",
    "v1-T33.H144.I192.E4.K2-fp16-fp8row-norm-tp2-gather", "v1-T33.H160.I72.E4.K2-bf16-mxfp8-norm-tp2",
    "v1-T33.H160.I96.E4.K2-bf16-mxfp8-norm-zipf-extreme-ep2",
    "v1-T33.H128.I96.E4.K2-bf16-fp8tensor-norm-sh48-tp2-gather",
    "v1-T21.H96.I80.E4.K2-bf16-fp8tensor-norm-zipf-nonfinite",
    "v1-T21.H160.I80.E4.K2-bf16-fp8block-norm-zipf-nonfinite",
]


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("case_id", CASES)
def test_layers_are_right(case_id: str) -> None:
    """By the harness: codes, scales and both products as stages of their own, and the layer as a whole."""
    found = judged(moe_fast, case_id)
    assert found.verdict == Verdict.PASS, found.reason
    assert {Stage.PERMUTE_SCALES, Stage.PERMUTE_CODES, Stage.ACT_SCALES, Stage.ACT_CODES} <= {
        one.stage for one in found.stages}


def test_a_wrong_scale_is_seen() -> None:
    """The comparison fails for a scale of the next block, along either axis."""
    given = layer(BLOCK, mlp=PRODUCT)
    rows = scaled_mlp_rows(given, traced=True)
    for axis in (-1, -2):
        for name in ("w13", "w2"):
            wrong = replace(getattr(given, name), scales=getattr(given, name).scales.flip(axis))
            with pytest.raises(AssertionError):
                check(replace(given, **{name: wrong}), rows)
    check(given, rows)
