"""Pinned backward cases: gradients under every way to spread a layer, and through every option of the mathematics.

Small layers, since a bound on gradients grows with each sum that they pass; large enough that three ranks differ. A few
are as large as the others of their tiers.
"""

from moe_ref.contract.vocabulary import Dtype

_SIZES = "v1-T12.H40.I36"

SPREADS = ("tp2", "tp3-split3.1.0", "tp2-allreducerows", "tp2-reducescatter", "tp3-gather",
           "tp2-reducescatter-tokenstp", "tp2-wholeshared", "tp2-ep2", "tp2-ep3-roundrobin-copy0.5", "tp2-ep2-tokensep",
           "tp2-ep2-reducescatter-tokensboth-share3.2.1.0")

_PLAIN = (
    (".E4.K2-fp16-norm-tp2", "a router's gradient, complete on both ranks"),
    (".E4.K1-bf16-norm-tp2", "one slot, whose renormalised weight has no gradient"),
    ("-fp32-sh19-shgate-res-tp2", "dense"),
    (".E6.K3-bf16-sigmoid-norm-eps1em20-bias-g3.2-top2sum-scale2.5-sh19-shgate-res-tp3", "DeepSeek-V3 routing"),
    (".E6.K3-fp32-norm-gelu-sh19-shgelu-tp2", "gelu"), (".E6.K3-fp32-norm-gelutanh-tp2", "gelu, tanh form"),
    (".E6.K3-fp32-norm-zipf-tp2", "injected logits"), (".E6.K3-fp16-norm-empty-tp2", "experts without rows"),
    (".E6.K3-bf16-norm-outlier-tp2-inoutinterleaved", "outliers, another order in memory"),
    (".E6.K3-fp32-norm-sh19-shgate-res-tp3", "three ranks that all hold columns"),
    (".E6.K3-fp32-norm-sh19-shgate-res-tp2-ep2-reducescatter", "scattered sums over both axes"),
    (".E6.K3-fp32-norm-sh19-shgate-res-tp2-ep2-allreducerows", "rows reduced over both axes"),
    (".E6.K3-fp16-norm-ep2-interleaved", "experts apart, interleaved rows"),
    (".E6.K3-fp32-sigmoid-norm-bias-g3.2-top2sum-inout", "groups, transposed matrices"),
    (".E6.K1-fp32-sigmoid-res-allone-ep2-tokensep", "a rank that serves no row"),
)

_WHOLE = (
    (".E6.K3-bf16-norm-mlpbias-tp2-ep3-roundrobin-copy0.5", "biases of copies"),
    (".E6.K3-fp32-norm-mlpbias-sh19-shgate-shmlpbias-outbias-tp3-gather", "biases without a row split"),
    (".E6.K3-fp32-norm-sh19-shgate-outbias-res-tp2-ep2-tokensep", "an output bias over ranks with other tokens"),
    (".E6.K3-fp32-norm-sh19-shgate-shmlpbias-tp2-reducescatter-tokenstp-wholeshared", "a whole shared expert"),
    (".E6.K3-fp32-sigmoid-norm-cap2-capchoice-tp2", "dropped slots"),
    (".E6.K3-bf16-norm-relu2-nogate-mlpbias-tp2", "a kink"),
    (".E6.K3-fp32-norm-mlpbias-empty-tp2", "biases of experts without rows"),
    (".E6.K3-bf16-norm-routerbias-mlpbias-limit1-alpha1.702-up1-tp2", "gpt-oss with a low clamp"),
    (".E6.K3-fp32-norm-limit1-limitafter-tp2", "a clamp after the activation"),
    (".E6.K3-fp32-norm-scale2.5-sqrtsoftplus-expertscale-tp2", "learned scales of experts"),
    (".E6.K3-fp32-norm-logitscale0.5-logitcap1.5-tp2", "soft-capped logits"),
    (".E6.K3-fp32-sigmoid-norm-eps1.5-epsclamp-tp2", "an epsilon that is reached"),
    (".E6.K3-bf16-scale2-zero3-tp2", "identity experts"),
    (".E6.K3-fp32-sigmoid-norm-learnscale-sh24-shgatecap2-shupcap2.5-shrouter2-shmean-tp2", "shared router columns"),
    (".E6.K3-bf16-sigmoid-norm-sh19-weightinput-tp2", "weights on the input"),
)

_LARGER = (
    ("v1-T33.H96.I160.E8.K2-bf16-norm-sh83-shgate-res-tp4-bwd", "four ranks, three tiles of tokens"),
    ("v1-T33.H96.I160.E8.K2-fp32-norm-sh83-shgate-res-tp8-bwd", "eight ranks"),
    ("v1-T150.H64.I96.E4.K2-fp16-norm-tp4-ep2-bwd", "experts of several tiles of rows"),
    ("v1-T32.H48.I64.E8.K2-bf16-sigmoid-norm-tp8-reducescatter-tokenstp-bwd", "tokens of eight ranks"),
    ("v1-T33.H96.I160.E8.K2-bf16-norm-large-tp2-bwd", "saturated activations"),
)


def larger_backward_ids() -> list[tuple[str, str]]:
    """(case id, purpose), for tier quick and what holds it."""
    return [(name, f"gradients: {purpose}") for name, purpose in _LARGER]


def backward_ids(whole_spec: bool = False) -> list[tuple[str, str]]:
    """(case id, purpose); whole_spec: of every option instead of every spread."""
    if whole_spec:
        named = list(_WHOLE)
    else:
        named = [(f".E6.K3-{dtype}-norm-sh19-shgate-res-{spread}", f"{spread} in {dtype}")
                 for spread in SPREADS for dtype in (Dtype.FP32, Dtype.BF16)] + list(_PLAIN)
    return [(f"{_SIZES}{words}-bwd", f"gradients: {purpose}") for words, purpose in named]
