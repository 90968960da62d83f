"""Pinned cases whose sums are exact in any order, so that every right implementation gives the same bits."""

_SMOKE = (
    ("v1-T33.H96.I160.E8.K2-bf16-norm-exact-tp2", "partial sums of two ranks"),
    ("v1-T33.H96.I160.E8.K2-fp16-norm-sh83-res-exact-ep2", "experts apart, shared expert, residual"),
    ("v1-T40.H72.I90-fp32-res-exact-tp4", "a dense layer"),
)

_QUICK = (
    ("v1-T140.H64.I65.E3.K2-bf16-norm-exact", "more rows per expert than a tile"),
    ("v1-T1.H64.I96.E4.K2-bf16-norm-exact-tp2", "a single token"),
    ("v1-T19.H48.I33.E16.K8-bf16-exact-tp8", "8 slots, 33 columns over 8 ranks"),
    ("v1-T17.H80.I72.E5.K3-fp32-norm-gelu-exact-tp3-split2.1.0", "a rank without columns"),
    ("v1-T21.H130.I50.E16.K4-bf16-exact-tp4-allreducerows", "rows reduced before the merge"),
    ("v1-T7.H257.I129.E6.K1-fp16-norm-exact-tp2-reducescatter", "one past the tiles, reduce-scatter"),
    ("v1-T64.H64.I128.E4.K2-bf16-norm-gelutanh-sh67-exact-tp2-gather", "gathers, everything divides every tile"),
    ("v1-T33.H96.I160.E8.K2-bf16-norm-sh83-res-exact-tp2-reducescatter-tokenstp", "tokens sharded over tp"),
    ("v1-T33.H96.I160.E8.K2-fp32-norm-sh83-exact-tp2-wholeshared", "a whole shared expert"),
    ("v1-T33.H96.I160.E8.K2-fp32-norm-exact-ep3-roundrobin-copy0.7", "copies of experts"),
    ("v1-T33.H96.I160.E8.K2-fp16-norm-exact-ep2-tokensep", "rows that travel"),
    ("v1-T33.H96.I160.E8.K2-bf16-norm-res-exact-tp2-ep2-reducescatter-tokensboth-share3.2.1.0",
     "a rank without tokens"),
    ("v1-T33.H96.I160.E8.K2-bf16-norm-exact-inoutinterleaved", "another order in memory"),
    ("v1-qwen3.30b.a3b.T4.E8-bf16-exact-tp2", "published widths"),
)

_FAMILIES = (
    ("v1-T21.H48.I40.E8.K3-bf16-norm-relu-exact", "relu"),
    ("v1-T21.H48.I40.E8.K3-bf16-norm-relu2-exact-tp3", "squared relu, gated"),
    ("v1-T21.H48.I40.E8.K3-fp16-norm-relu2-nogate-sh26-shrelu2-shnogate-exact-tp3", "squared relu without a gate"),
    ("v1-T21.H48.I40.E8.K3-fp32-norm-nogate-res-exact", "silu without a gate"),
)


def exact_ids(tier_name: str) -> list[tuple[str, str]]:
    """(case id, purpose) of a tier; quick and what holds it has those of smoke too."""
    named = {"smoke": _SMOKE, "families": _FAMILIES}.get(tier_name, (*_SMOKE, *_QUICK))
    return [(text, f"exact in any order: {purpose}") for text, purpose in named]
