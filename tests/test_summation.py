"""Protects the simulated sums: every order against exact fractions that are rounded one addition at a time."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
import torch

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import round_to
from moe_ref.numerics.summation import ORDERS, Order, matmul, rounded_sum, truncating_matmul

BITS = {Format.FP32: (24, -126), Format.FP16: (11, -14), Format.BF16: (8, -126)}


def rounded(value: Fraction, stored: Format, towards_zero: bool = False) -> Fraction:
    """The format's number next to a fraction; ties to even, Python's own rule for fractions."""
    bits, smallest = BITS[stored]
    if value == 0:
        return value
    exponent = math.frexp(float(abs(value)))[1] - 1
    exponent += (abs(value) >= Fraction(2)**(exponent + 1)) - (abs(value) < Fraction(2)**exponent)
    unit = Fraction(2)**(max(exponent, smallest) - bits + 1)
    return (int(value / unit) if towards_zero else round(value / unit)) * unit


def in_turn(terms: list[Fraction], stored: Format) -> Fraction:
    total = Fraction(0)
    for term in terms:
        total = rounded(total + term, stored)
    return total


def runs(terms: list[Fraction], size: int) -> list[list[Fraction]]:
    return [terms[start:start + size] for start in range(0, len(terms), size)]


def tree(terms: list[Fraction], stored: Format) -> Fraction:
    level = [rounded(term, stored) for term in terms]
    while len(level) > 1:
        level = [rounded(sum(pair, Fraction(0)), stored) for pair in runs(level, 2)]
    return level[0]


def drawn(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


DOUBLES: dict[Order, Callable[[list[Fraction], Format, Format, int], Fraction]] = {
    "sequential": lambda terms, fmt, inside, seed: in_turn(terms, inside),
    "reversed": lambda terms, fmt, inside, seed: in_turn(terms[::-1], inside),
    "shuffled": lambda terms, fmt, inside, seed: in_turn([terms[k] for k in drawn(len(terms), seed)], inside),
    "blocked": lambda terms, fmt, inside, seed: in_turn([in_turn(run, inside) for run in runs(terms, 16)], fmt),
    "split_k": lambda terms, fmt, inside, seed: in_turn(
        [in_turn(runs(terms, -(-len(terms) // 5))[part], inside)
         for part in drawn(len(runs(terms, -(-len(terms) // 5))), seed)], fmt),
    "pairwise": lambda terms, fmt, inside, seed: tree(terms, fmt),
}


def operands(dtype: torch.dtype, size: int = 67, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, K) and (K, 2) numbers of a dtype, of sizes that differ by up to 2^12, cancellation among them."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-6, 7, shape, generator=generator))
            for shape in ((3, size), (size, 2)))
    return a.to(dtype).double(), b.to(dtype).double()


def double(order: Order, a: torch.Tensor, b: torch.Tensor, fmt: Format, inside: Format, seed: int,
           fused: bool) -> torch.Tensor:
    """The product by fractions."""
    terms = [[[Fraction(float(one)) * Fraction(float(other)) for one, other in zip(row, column, strict=True)]
              for column in b.T] for row in a]
    if not fused:
        terms = [[[rounded(term, Format.FP32) for term in cell] for cell in row] for row in terms]
    return torch.tensor([[float(DOUBLES[order](cell, fmt, inside, seed)) for cell in row] for row in terms],
                        dtype=torch.float64)


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", list(BITS))
@pytest.mark.parametrize("order", ORDERS)
def test_every_addition_is_rounded_once(order: Order, fmt: Format, dtype: torch.dtype, fused: bool) -> None:
    """Products of 48 and of 16 bits, 67 terms: no order divides them evenly, and not one bit may differ."""
    for seed in range(4):
        a, b = operands(dtype, seed=seed)
        found = matmul(a, b, order, fmt=fmt, block=16, parts=5, seed=seed, fused=fused)
        assert torch.equal(found, double(order, a, b, fmt, fmt, seed, fused)), seed


@pytest.mark.parametrize("order", ["blocked", "split_k"])
def test_sums_inside_a_block_have_a_format_of_their_own(order: Order) -> None:
    """A tensor core adds a block in fp32 before its accumulator of fp16 takes it."""
    a, b = operands(torch.float16)
    found = matmul(a, b, order, fmt=Format.FP16, inside=Format.FP32, block=16, parts=5, seed=3)
    assert torch.equal(found, double(order, a, b, Format.FP16, Format.FP32, 3, False))
    assert not torch.equal(found, matmul(a, b, order, fmt=Format.FP16, block=16, parts=5, seed=3))


def test_orders_differ_from_each_other() -> None:
    """Else a test that one of them passes says nothing of the others."""
    a, b = operands(torch.float32, 300)
    found = {tuple(matmul(a, b, order).flatten().tolist()) for order in ORDERS}
    assert len(found) == len(ORDERS)


@pytest.mark.parametrize("order", ["split_k", "shuffled"])
def test_a_seed_is_one_order(order: Order) -> None:
    """Simulated atomics are drawn, never left to chance."""
    a, b = operands(torch.float32, 300)
    assert torch.equal(matmul(a, b, order, seed=5), matmul(a, b, order, seed=5))
    assert any(not torch.equal(matmul(a, b, order, seed=5), matmul(a, b, order, seed=seed)) for seed in range(6, 9))


@pytest.mark.parametrize("order", ORDERS)
def test_rows_computed_in_turns_are_the_same(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows fit in memory must not show."""
    a, b = operands(torch.float32, 100)
    whole = matmul(a, b, order)
    monkeypatch.setattr("moe_ref.numerics.summation._HELD", 1)
    assert torch.equal(matmul(a, b, order), whole)


@pytest.mark.parametrize("order", ORDERS)
def test_sums_of_integers_are_exact(order: Order) -> None:
    """Below 2^24 nothing is rounded in any order, so all agree with fp64."""
    a = torch.arange(-30, 30, dtype=torch.float64).reshape(2, 30)
    assert torch.equal(matmul(a, a.T.contiguous(), order, block=8, parts=4), a @ a.T)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("rows", "terms", "columns"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (2, 1, 3)])
def test_empty_sums_are_zero(order: Order, rows: int, terms: int, columns: int) -> None:
    """Experts without tokens and ranks without columns have them."""
    a, b = torch.ones(rows, terms, dtype=torch.float64), torch.ones(terms, columns, dtype=torch.float64)
    assert torch.equal(matmul(a, b, order), a @ b)


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_not_finite_stays_in_its_row(order: Order) -> None:
    """As fp64 has it: a NaN or an infinity reaches its own row and no other."""
    a, b = operands(torch.float32)
    a[0, 3], a[1, 5] = torch.nan, torch.inf
    found, want = matmul(a, b, order), a @ b
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.isinf(), want.isinf())


@pytest.mark.parametrize("products_per_step", [1, 8, 16])
def test_truncation_cuts_off_once_per_step(products_per_step: int) -> None:
    """The exact sum of a step and the total so far, towards zero; products of 16 bits, so that fp64 holds the sum."""
    a, b = operands(torch.bfloat16)
    want = torch.zeros(3, 2, dtype=torch.float64)
    for m in range(3):
        for n in range(2):
            terms = [Fraction(float(one)) * Fraction(float(other)) for one, other in zip(a[m], b[:, n], strict=True)]
            total = Fraction(0)
            for step in runs(terms, products_per_step):
                total = rounded(total + sum(step), Format.FP32, towards_zero=True)
            want[m, n] = float(total)
    assert torch.equal(truncating_matmul(a, b, products_per_step=products_per_step), want)


def test_truncation_of_positive_sums_errs_downwards_with_every_step() -> None:
    """The reason that it grows with K, where rounding to nearest grows with its root."""
    a, b = (one.abs() for one in operands(torch.bfloat16, 4096))
    truth = a @ b
    cut, nearest = truncating_matmul(a, b, products_per_step=1), matmul(a, b, "sequential")
    assert ((truth - cut) > 4 * (truth - nearest).abs()).all()


@pytest.mark.parametrize("fmt", list(BITS))
def test_a_sum_is_rounded_once_not_twice(fmt: Format) -> None:
    """Just above the middle of two numbers by less than fp64 sees: rounded twice it would fall on the middle."""
    bits, _ = BITS[fmt]
    middle, little = 1 + 2.0**-bits, 2.0**-60
    left = torch.tensor([middle, middle, middle, -middle], dtype=torch.float64)
    right = torch.tensor([little, -little, 0.0, -little], dtype=torch.float64)
    above = 1 + 2 * 2.0**-bits
    assert rounded_sum(left, right, fmt).tolist() == [above, 1.0, 1.0, -above]
    assert round_to(left + right, fmt)[0] == 1.0


@pytest.mark.parametrize(("call", "words"), [
    (partial(matmul, order="backwards"),  # pyrefly: ignore
     "order='backwards', but should be one of sequential"),
    (partial(matmul, order="blocked", block=0), "block=0, but should be an integer of at least 1"),
    (partial(matmul, order="split_k", parts=0), "parts=0, but should be an integer of at least 1"),
    (partial(matmul, order="blocked", fmt=Format.TF32), "fmt=<Format.TF32: 'tf32'>, but should be one of fp32"),
    (partial(truncating_matmul, products_per_step=0), "products_per_step=0, but should be an integer"),
])
def test_wrong_use_is_named(call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], words: str) -> None:
    """With what was given and what it should be."""
    with pytest.raises(UsageValueError, match=words):
        call(*operands(torch.float32))


@pytest.mark.parametrize(("a", "b", "words"), [
    (torch.ones(2, 3).double(), torch.ones(2, 3).double(), r"shapes \(2, 3\) and \(2, 3\), but should be"),
    (torch.ones(2, 3), torch.ones(3, 2).double(), "dtypes torch.float32 and torch.float64, but should be"),
    (torch.full((2, 3), 0.1).double() + 1e-12, torch.ones(3, 2).double(), "a_MK holds numbers that fp32 does not"),
])
def test_wrong_operands_are_named(a: torch.Tensor, b: torch.Tensor, words: str) -> None:
    """An operand that fp32 cannot hold would be rounded without notice."""
    with pytest.raises(UsageValueError, match=words):
        matmul(a, b, "sequential")
