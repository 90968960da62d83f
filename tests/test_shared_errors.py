"""What a mean square of errors may be where columns share them: measured on drawn errors of known covariance."""

import math

import pytest
import torch

from moe_ref.contract.vocabulary import Format
from moe_ref.numerics.formats import unit_in_last_place
from moe_ref.verify.bounds.rows import Rows
from moe_ref.verify.measure.shared_errors import SharedErrors

TOKENS, HIDDEN, INTERMEDIATE, DRAWS = 2, 96, 24, 4000
BASE, ALPHA = 1.0, 1e-3
LAYERS = {
    "as many errors as activations": (lambda w2_HI: w2_HI, torch.ones(INTERMEDIATE), 0.0),
    "two activations make them all": (lambda w2_HI: w2_HI, torch.tensor([1.0, 1.0] + [1e-6] * (INTERMEDIATE - 2)), 0.0),
    "weights of one sign": (lambda w2_HI: w2_HI.abs(), torch.ones(INTERMEDIATE), 0.0),
    "columns of their own sizes": (lambda w2_HI: w2_HI * 2.0 ** (torch.arange(HIDDEN)[:, None] % 7),
                                   torch.ones(INTERMEDIATE), 0.0),
    "a weight": (lambda w2_HI: 0 * w2_HI, torch.ones(INTERMEDIATE), 1.0),
    "a weight beside stores": (lambda w2_HI: w2_HI, torch.ones(INTERMEDIATE), 0.3),
    "stores alone": (lambda w2_HI: 0 * w2_HI, torch.ones(INTERMEDIATE), 0.0),
}
"""By what columns share: w2, the variance of activations, and that of the routing weight."""


@pytest.mark.parametrize("name", LAYERS)
def test_the_threshold_holds_whatever_is_shared(name: str) -> None:
    """Root mean squares of drawn errors: fewer than alpha are above it, and it is not far from the largest."""
    change, variance_I, of_weight = LAYERS[name]
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w2_HI, variance_I, added_TH = change(normal(HIDDEN, INTERMEDIATE)), variance_I.double(), normal(TOKENS, HIDDEN)
    own_H = 0.1 * (w2_HI.square() @ variance_I) + 0.01
    variance_TH = (w2_HI.square() @ variance_I + own_H) + of_weight * added_TH.square()
    alike = SharedErrors(TOKENS, HIDDEN, None)
    token_T, one = torch.arange(TOKENS), torch.ones(TOKENS, 1, dtype=torch.float64)
    value_TI = torch.zeros(TOKENS, INTERMEDIATE, dtype=torch.float64)
    alike.of_activations(token_T, w2_HI, Rows(value_TI, value_TI, variance_I.expand_as(value_TI)), one)
    alike.along(token_T, added_TH, of_weight * one)
    allowed = alike.rms_allowed(variance_TH, variance_TH > 0, TOKENS * HIDDEN, BASE, ALPHA)

    error_DTH = (normal(DRAWS, TOKENS, INTERMEDIATE) * variance_I.sqrt()) @ w2_HI.T
    error_DTH += own_H.sqrt() * normal(DRAWS, TOKENS, HIDDEN)
    error_DTH += of_weight**0.5 * normal(DRAWS, TOKENS, 1) * added_TH
    rms_D = (error_DTH.square() / variance_TH).mean((1, 2)).sqrt()
    assert float((rms_D > allowed).double().mean()) <= ALPHA
    assert allowed < 1.6 * float(rms_D.max())


@pytest.mark.parametrize("others", [0.0, 1.0], ids=["alone", "among others"])
def test_stores_of_multiples_of_one_number_are_one_error(others: float) -> None:
    """1.003 times whole numbers of 8 bits lie about half way between such numbers; beside other terms anywhere."""
    w2_HI = torch.randint(128, 256, (512, INTERMEDIATE), generator=torch.Generator().manual_seed(3)).double()
    value_1I = torch.full((1, INTERMEDIATE), others, dtype=torch.float64).cumsum(1) * 0.3173
    value_1I[0, 5] = 1.003
    row_H = (w2_HI @ value_1I.T)[:, 0]
    cell_H = unit_in_last_place(row_H, Format.BF16)
    error_H = row_H - row_H.bfloat16().double()
    rms = float((12 * (error_H / cell_H).square()).mean().sqrt())
    assert (rms > 1.15) is (others == 0)
    alike = SharedErrors(1, 512, Format.BF16)
    alike.of_activations(torch.zeros(1, dtype=torch.int64), w2_HI, Rows(value_1I, 0 * value_1I, 0 * value_1I),
                         torch.ones(1, 1))
    variance_1H = (cell_H.square() / 12)[None]
    allowed = alike.rms_allowed(variance_1H, variance_1H > 0, 512, 1.0, 1e-9)
    assert (allowed > 3) is (others == 0)
    assert rms < allowed < (10 if others == 0 else 1.4)


def test_what_nobody_predicts_may_all_be_one_error() -> None:
    """Activations without a variance: the threshold of a single normal error per token."""
    alike = SharedErrors(1, HIDDEN, None)
    value_1I = torch.zeros(1, INTERMEDIATE, dtype=torch.float64)
    alike.of_activations(torch.zeros(1, dtype=torch.int64), torch.ones(HIDDEN, INTERMEDIATE),
                         Rows(value_1I, value_1I, None), torch.ones(1, 1))
    known_1H = torch.ones(1, HIDDEN, dtype=torch.bool)
    t = -math.log(ALPHA)
    allowed = alike.rms_allowed(torch.ones(1, HIDDEN, dtype=torch.float64), known_1H, HIDDEN, BASE, ALPHA)
    assert allowed == pytest.approx(math.sqrt(1 + 2 * math.sqrt((1 + 1 / HIDDEN) * t) + 2 * t))
