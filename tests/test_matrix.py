"""The differential matrix: every case of the tier, judged against the oracle. `--moe-tier quick` for more."""


def test_matrix(moe_case, moe_verify):
    moe_verify(moe_case)
