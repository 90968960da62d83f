"""Pinned cases that carry the trigger of a class of defects which no other case of the default tiers carries."""

_TRIGGERS = (
    ("v1-T33.H96.I160.E8.K2-bf16-norm-padded", "every tensor a part of a larger one, NaN around it"),
    ("v1-T17.H80.I72.E5.K3-fp32-norm-sh39-shgate-res-tp3-padded", "padded: shared expert, residual, uneven shares"),
    ("v1-T33.H96.I160.E8.K2-bf16-norm-exact-ep2-tokensep-padded", "padded: injected routing, rows that travel"),
    ("v1-T12.H40.I36.E6.K3-fp32-norm-sh19-shgate-res-tp2-padded-bwd", "padded: gradients"),
    ("v1-T33.H96.I160.E8.K2-bf16-norm-holes-exact", "slots that name no expert"),
    ("v1-T33.H96.I160.E8.K2-fp16-norm-sh83-res-holes-exact-ep2", "slots that name no expert, of no rank"),
    ("v1-T33.H96.I160.E8.K2-fp32-norm-holes-exact-ep3-roundrobin-copy0.7", "slots that name no expert, copies"),
    ("v1-T33.H96.I160.E8.K2-fp16-norm-holes-exact-ep2-tokensep", "slots that name no expert stay at home"),
    ("v1-T21.H48.I40.E8.K3-fp32-norm-near", "logits that 16 bits cannot tell apart"),
    ("v1-T21.H48.I40.E8.K3-bf16-norm-near-tp2", "logits that 16 bits cannot tell apart, bf16 tokens"),
    ("v1-T21.H48.I40.E8.K3-fp32-sigmoid-norm-bias-near", "selection biases that 16 bits cannot tell apart"),
    ("v1-T21.H48.I40.E8.K3-bf16-sigmoid-norm-bias-g4.2-top2sum-near", "the same beside groups"),
    ("v1-T3.H64.I14336.E2.K1-bf16-norm", "sums of 14336 back from the activation"),
    ("v1-T3.H14336.I64.E2.K1-fp32-norm", "sums of 14336 over the hidden axis"),
    ("v1-T3.H1.I5.E2.K1-bf16-norm", "one hidden column"),
    ("v1-T3.H1.I1.E1.K1-fp32-norm", "every size 1"),
    ("v1-T4.H64.I96.E4.K2-bf16-norm", "the bucket of four tokens"),
    ("v1-T13.H64.I96.E4.K2-fp16-norm-tp2", "a number of tokens between buckets"),
    ("v1-T15.H64.I64.E8.K2-fp32-norm-tp2-reducescatter-tokenstp", "as many tokens of a rank as experts, with padding"),
    ("v1-T7.H64.I64.E8.K4-fp32-norm-tp2-reducescatter-tokenstp", "as many tokens as experts but for one"),
    ("v1-T120.H64.I65.E3.K2-fp32-norm", "240 rows: 17 tokens more pass a threshold of 256"),
    ("v1-T9.H48.I24.E384.K8-fp32-norm", "more experts than a block of 256 or a scan of 128 holds"),
    ("v1-T21.H48.I40.E8.K2-fp32-norm-cap3-allone-ep2", "dropped slots where experts are apart"),
)

REPEATED = {"v1-T5.H48.I40.E4.K2-fp32-norm": 12, "v1-T5.H48.I40.E4.K2-bf16-norm-tp2": 12}
"""Runs of cases that are repeated, so that what happens once in ten calls has a chance to happen."""


def trigger_ids() -> list[tuple[str, str]]:
    """(case id, purpose), for tier quick and what holds it."""
    repeated = [(name, f"{runs} runs, each of the same bits") for name, runs in REPEATED.items()]
    return [*_TRIGGERS, *repeated]
