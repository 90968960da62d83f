"""Pinned small layers of released families: every option of the mathematics, alone and as families combine them.

Sizes divide no tile, so that three ranks get different shares. Data are chosen so that the option shows: gate and
up reach the clamps (large), biased scores are negative where a group's fill is compared with them (zipf).
"""

from itertools import product

from moe_ref.contract.vocabulary import Dtype

_SIZES = "T21.H48.I40.E8"
_GROUPS = "bias-g4.2-top2sum"

_ROUTERS = (
    ("K2", "", "OLMoE: softmax without renormalisation"),
    ("K2", "norm", "Mixtral, Qwen3: softmax over the chosen"),
    ("K8", "norm", "every expert chosen"),
    ("K1", "norm", "one expert, weight 1"),
    ("K4", f"sigmoid-norm-eps1em20-{_GROUPS}-scale2.5-sh26-zipf", "DeepSeek-V3: negative scores in kept groups"),
    ("K4", f"sigmoid-norm-eps1em20-{_GROUPS}-scale2.5-fillzero-sh26-zipf", "AXK2: groups filled with 0"),
    ("K3", "g4.2-scale16-fillzero-sh26", "DeepSeek-V2: largest member of a group, softmax"),
    ("K3", "norm-eps1em20-g4.2-top2sum-fillzero-sh26", "Mistral 4: groups by two scores, softmax"),
    ("K3", "norm-eps1em20-bias-scale1.5-sqrtsoftplus-limit10-sh26-shlimit10-large", "DeepSeek-V4"),
    ("K3", "sqrtsoftplus", "square root of softplus alone"),
    ("K3", "sigmoid-norm-biaslogit", "Kolibri: selection bias on logits"),
    ("K3", "sigmoid-norm-eps1em06-bias", "LFM2: a visible epsilon"),
    ("K3", "norm-eps1em12-bias-epsclamp-sh26", "ERNIE 4.5: sum clamped at epsilon"),
    ("K3", "norm-eps0.5-epsclamp", "a clamp that some sums fall below"),
    ("K3", "sigmoid-norm-bias-scale2.5-logitcap1.5-sh26", "Laguna: soft-capped logits"),
    ("K3", "norm-logitscale0.5", "scaled logits"),
    ("K3", "norm-routerbias", "a bias in the logits"),
    ("K3", "norm-expertscale-gelutanh", "Gemma 4: a learned scale per expert"),
    ("K3", "sigmoid-norm-learnscale", "a learned scale per layer"),
    ("K3", "bias-scale6-zero4", "LongCat: identity experts"),
    ("K3", "norm-zero4-cap5-sh26-res", "identity experts beside a capacity"),
    ("K2", "sigmoid-norm-eps1em20-zipf", "sigmoids so small that an epsilon shows"),
)

_EXPERTS = (
    ("K2", "norm-gelu", "gelu, erf form"), ("K2", "norm-gelutanh", "gelu, tanh form"), ("K2", "norm-relu", "relu"),
    ("K2", "norm-relu2", "squared relu, gated"), ("K2", "norm-relu2-nogate-outlier", "squared relu of large rows"),
    ("K2", "norm-nogate", "silu without a gate"),
    ("K3", "sigmoid-norm-eps1em20-bias-scale2.5-relu2-nogate-sh50-shrelu2-shnogate", "Nemotron-H"),
    ("K2", "norm-mlpbias", "biases of both products"),
    ("K2", "norm-routerbias-mlpbias-limit7-alpha1.702-up1-large", "gpt-oss: values beyond its clamp"),
    ("K2", "norm-routerbias-mlpbias-limit1-alpha1.702-up1", "gpt-oss with a low clamp"),
    ("K2", "norm-limit1", "a clamp before the activation, gate not from below"),
    ("K2", "norm-limit1-limitafter", "a clamp after the activation"),
    ("K3", "sigmoid-norm-bias-limit2-limitafter-sh26-shlimit4-shlimitafter-large", "Step 3.7: two limits"),
    ("K3", "sigmoid-norm-bias-limit7-alpha1.702-up1-sh26-shlimit7-shalpha1.702-shup1-large", "MiniMax-M3"),
    ("K3", "sigmoid-norm-eps1em20-bias-scale2.5-limit7-sh26-large", "Hunyuan V4: shared expert without a clamp"),
    ("K3", "sigmoid-norm-bias-gatecap2-upcap2-sh26-shgatecap2-shupcap2", "Inkling 2: soft caps"),
    ("K2", "norm-upm0.5", "a negative offset of up"),
    ("K2", "norm-large", "large pre-activations"), ("K2", "norm-gelu-large", "large pre-activations of gelu"),
)

_MERGES = (
    ("K1", "sigmoid-sh26-weightinput", "Llama 4: weights on the input, top-1"),
    ("K3", "sigmoid-norm-scale2.5-relu-weightinput-res", "weights on the input of several experts"),
    ("K2", "norm-outbias", "JetMoE: a bias after the merge"),
    ("K2", "norm-sh26-outbias-res", "output bias and residual"),
    ("K2", "norm-sh26-shmean", "Cohere 2: mean of routed and shared"),
    ("K2", "sigmoid-sh26-shmean-outbias-res", "mean, then bias, then residual"),
    ("K3", "sigmoid-norm-bias-scale2.5-learnscale-sh26-shrouter2", "Inkling: shared experts in the router"),
    ("K3", "sigmoid-sh26-shrouter1", "a shared expert weighted by the router without renormalisation"),
    ("K2", "sh26-shgate", "Qwen2-MoE: gated shared expert"),
    ("K2", "norm-mlpbias-sh26-shgate-shmlpbias", "biases of a gated shared expert"),
    ("K2", "norm-sh26-shgelu-shnogate", "a shared expert unlike the routed ones"),
)

_CAPACITIES = (
    ("K1", "capfactor1.25-capseq7-relu-nogate", "Switch: a limit in every sequence"),
    ("K2", "norm-capfactor1-capchoice-relu-nogate-mlpbias", "GShard, NLLB: first choices first"),
    ("K2", "norm-cap4-capweight", "Megatron: larger weights first"),
    ("K3", "sigmoid-norm-cap5-capafter", "renormalised over what is left"),
    ("K3", "sigmoid-norm-cap5-capafter-sh26-shrouter2", "and over the router's shared experts"),
    ("K2", "norm-cap3-allone", "all tokens want one expert"),
    ("K3", "sigmoid-bias-scale2.5-cap4-capchoice-zipf", "crowded experts"),
)

_NON_FINITE = (
    ("K2", "norm-nonfinite", "NaN and infinity from the router on"),
    ("K2", "norm-zipf-nonfinite", "NaN and infinity behind an injected routing"),
    ("K2", "norm-limit1-zipf-nonfinite", "a clamp must not swallow a NaN"),
    ("K3", "sigmoid-norm-relu2-nogate-sh26-zipf-nonfinite", "nor must a relu"),
    ("K2", "norm-gelutanh-sh26-shgate-zipf-nonfinite", "through a gated shared expert"),
)

_OTHER_SIZES = (
    ("T24.H48.I40.E2.K1", "sigmoid-norm-eps1em20-zipf", "one small sigmoid: the largest effect of an epsilon"),
    ("T21.H48.I40", "relu2-nogate", "dense, without a gate"), ("T21.H48.I40", "mlpbias-limit1", "dense, clamped"),
    ("T9.H48.I40", "nonfinite", "dense: NaN and infinity"),
    ("T0.H48.I40.E8.K2", "norm-cap3-mlpbias-outbias", "no token at all"),
    ("T1.H48.I40.E8.K2", "norm-zero4-cap1-sh26-shmean", "a single token"),
)

_SPREAD_LAYERS = (
    ("K2", "norm-mlpbias-sh26-shgate-shmlpbias-outbias-res", "biases that must come in once"),
    ("K3", "bias-scale6-zero4-sh26", "identity experts"),
    ("K3", "sigmoid-norm-bias-scale2.5-learnscale-sh26-shrouter2", "shared experts in the router"),
    ("K2", "norm-sh26-shmean-outbias-res", "mean of routed and shared"),
    ("K3", "sigmoid-norm-scale2.5-relu-weightinput-res", "weights on the input"),
)

_SPREADS = ("tp2", "tp2-allreducerows", "tp2-reducescatter", "tp3-gather", "tp2-reducescatter-tokenstp",
            "tp3-split2.1.0", "tp2-wholeshared", "tp2-ep2", "tp2-ep3-roundrobin-copy0.7", "tp2-ep2-tokensep",
            "tp2-ep2-reducescatter-tokensboth-share3.2.1.0")


def family_ids() -> list[tuple[str, str]]:
    """(case id, purpose) of every layer in fp32 and bf16, on one rank and on three; of some spread in every way."""
    named = [(f"{_SIZES}.{top_k}", words, purpose)
             for top_k, words, purpose in (*_ROUTERS, *_EXPERTS, *_MERGES, *_CAPACITIES, *_NON_FINITE)]
    ids = []
    for (sizes, words, purpose), dtype, tp in product((*named, *_OTHER_SIZES), (Dtype.FP32, Dtype.BF16), (1, 3)):
        parts = ["v1", sizes, dtype, *[words] * (words != ""), *["tp3"] * (tp == 3)]
        ids.append(("-".join(parts), purpose))
    ids += [(f"v1-{_SIZES}.{top_k}-{Dtype.FP32}-{words}-{spread}", f"{purpose}, {spread}")
            for (top_k, words, purpose), spread in product(_SPREAD_LAYERS, _SPREADS)]
    return ids
