"""The differential matrix: every case of the tier, judged against the oracle. `--nightly --moe-tier quick` for more."""

import pytest


@pytest.mark.sampled(every=8)
def test_matrix(moe_case, moe_verify):
    moe_verify(moe_case)
