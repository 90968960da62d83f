"""Right layers under every form of parallelism must pass; an accusation here is a defect of the harness.

Each layer runs every fourth form, with a dtype, a load and a number of tokens that change from layer to layer, so that
the layers together try many combinations of each form.
"""

from itertools import product

import pytest

from moe_ref.contract.vocabulary import Verdict
from tests.in_process import judged
from tests.subjects.parallel_variants import RIGHT

FORMS = (
    # One all-reduce: even and uneven shares, a rank without columns, more ranks than columns.
    ("H32.I24.E8.K2", "norm", "tp2"), ("H24.I20.E5.K3", "norm-outbias-res", "tp3-split3.0.1"),
    ("H16.I3.E4.K2", "norm-mlpbias", "tp4"),
    # Experts apart: runs of neighbours, in turn, with copies; biases, identity experts and dropped tokens.
    ("H32.I24.E8.K2", "norm-mlpbias-sh20-res", "ep2"), ("H24.I20.E5.K3", "norm-outbias", "ep3-roundrobin"),
    ("H32.I24.E8.K2", "norm-sh21-shgate-shmlpbias", "tp2-ep2-copy0.0.5"),
    ("H24.I20.E6.K2", "norm-zero2-res", "tp2-ep2"), ("H24.I20.E8.K2", "norm-cap6", "tp2-ep2"),
    # Rows are reduced before the merge.
    ("H32.I24.E8.K2", "norm", "tp2-allreducerows"),
    ("H24.I20.E5.K3", "norm-mlpbias-sh9-shmean-outbias-res", "tp3-ep2-allreducerows-roundrobin"),
    ("H24.I20.E6.K2", "norm-zero2-sh12-shgate", "tp2-ep2-allreducerows-tokensep-copy1"),
    ("H32.I24.E8.K2", "norm-outbias", "ep2-allreducerows"),
    # Sums are scattered over tokens, and gathered again where tokens are replicated.
    ("H32.I24.E8.K2", "norm-sh20", "tp3-reducescatter"),
    ("H24.I20.E5.K3", "norm-mlpbias-outbias-res", "tp2-ep2-reducescatter"),
    ("H32.I24.E8.K2", "norm-res", "tp3-reducescatter-tokenstp-share3.0.1"),
    ("H24.I20.E5.K3", "norm-sh21-shgate", "tp2-ep2-reducescatter-tokenstp-roundrobin"),
    # Columns are gathered.
    ("H32.I24.E8.K2", "norm-mlpbias-outbias-res", "tp3-gather"),
    ("H24.I20.E5.K3", "norm-sh9-shmean", "tp2-split60.40-gather"),
    ("H24.I20.E6.K2", "sigmoid-norm-zero2-sh12-shrouter2", "tp3-split3.0.1-gather"),
    # Tokens on their own rank along ep, along both.
    ("H32.I24.E8.K2", "norm-mlpbias-sh20-outbias", "tp2-ep2-tokensep-share3.1"),
    ("H24.I20.E5.K3", "norm-zero2-res", "ep3-tokensep-share1.0.2-roundrobin-copy4"),
    ("H32.I24.E8.K2", "sigmoid-norm-sh12-shrouter2-res", "tp2-ep2-reducescatter-tokensboth-share3.0.1.2-copy0.3"),
    ("H24.I20.E5.K3", "norm-mlpbias-sh21-shgate-outbias", "tp2-ep2-reducescatter-tokensboth-roundrobin"),
    # The shared expert whole on every rank.
    ("H32.I24.E8.K2", "norm-sh20-shgate-outbias-res", "tp2-ep2-wholeshared"),
    ("H24.I20.E5.K3", "norm-sh9-shmlpbias-shmean-outbias", "tp2-ep2-reducescatter-tokensboth-wholeshared"),
    ("H24.I20.E5.K3", "sigmoid-norm-sh12-shrouter2", "tp2-allreducerows-wholeshared"),
    ("H24.I20.E5.K3", "norm-sh9-shmean-outbias", "tp3-gather-wholeshared"),
    # A dense layer.
    ("H24.I20", "outbias-res", "tp2-ep2"),
)
"""Sizes, words of the mathematics, words of the spread."""

LOADS = tuple(product(("bf16", "fp32", "fp16"), ("", "-empty", "-allone", "-zipf"), (33, 1, 17, 0)))


def _case_id(form: tuple[str, str, str], load: tuple[str, str, int]) -> str:
    (sizes, words, spread), (dtype, pattern, num_tokens) = form, load
    return f"v1-T{num_tokens}.{sizes}-{dtype}-{words}{pattern if '.E' in sizes else ''}-{spread}"


CASES = [(name, _case_id(form, LOADS[(5 * f + 7 * i) % len(LOADS)]))
         for (i, name), (f, form) in product(enumerate(RIGHT), enumerate(FORMS)) if (f + i) % 4 == 0]
"""5 and 7 have no factor in common with the number of loads."""


@pytest.mark.sampled(every=10, each="name")
@pytest.mark.parametrize(("name", "case_id"), CASES)
def test_a_right_layer_passes_under_every_form(name: str, case_id: str) -> None:
    line = judged(RIGHT[name](), case_id)
    assert line.verdict == Verdict.PASS, line.message
