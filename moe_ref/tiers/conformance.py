"""The tier `conformance`: layers that other people's implementations can serve, by family, and probes of one family.

Sizes are multiples of 128 on every rank: block formats and 16-byte strides fit, so that what is not supported is the
mathematics and not the size. Two ranks are process ranks, since most implementations call torch.distributed themselves.
"""

from dataclasses import dataclass

from moe_ref.contract.vocabulary import Direction, Dtype


@dataclass(frozen=True)
class ConformanceFamily:
    """A row of layers: the name of the family, sizes and words of the case ids, and what it is there for."""

    name: str
    sizes: str
    words: str
    purpose: str


_SIZES = "T33.H128.I256.E8"

FAMILIES = (
    ConformanceFamily("mixtral", f"{_SIZES}.K2", "norm", "softmax over the chosen; also Qwen3, Granite"),
    ConformanceFamily("olmoe", f"{_SIZES}.K3", "", "softmax without renormalisation; also Jamba"),
    ConformanceFamily("qwen2_moe", f"{_SIZES}.K4", "sh256-shgate", "a gated shared expert"),
    ConformanceFamily("deepseek_v2", f"{_SIZES}.K3", "g4.2-scale16-fillzero-sh256", "groups by their best, scaled"),
    ConformanceFamily("deepseek_v3", f"{_SIZES}.K4", "sigmoid-norm-eps1em20-bias-g4.2-top2sum-scale2.5-sh256",
                      "sigmoid, selection bias, groups by two; also GLM-4.5, Kimi-K2"),
    ConformanceFamily("gpt_oss", f"{_SIZES}.K4", "norm-routerbias-mlpbias-limit7-alpha1.702-up1-large",
                      "biases, clamped and scaled SwiGLU, values beyond the clamp"),
    ConformanceFamily("llama4", f"{_SIZES}.K1", "sigmoid-sh256-weightinput", "the weight on the input, top-1"),
    ConformanceFamily("nemotron_h", f"{_SIZES}.K3",
                      "sigmoid-norm-eps1em20-bias-scale2.5-relu2-nogate-sh256-shrelu2-shnogate",
                      "squared relu without a gate"),
    ConformanceFamily("gelu_tanh", f"{_SIZES}.K2", "norm-gelutanh", "gelu in tanh form; Grok, Gemma 4's experts"),
)
"""What an implementation is asked for in every dtype, on one rank and two, forward and backward."""

_PROBED = f"{_SIZES}.K2"

PROBES = (
    (f"{_PROBED}-{{}}-norm-zipf", "popular experts, injected logits"),
    (f"{_PROBED}-{{}}-norm-empty", "experts without a token"),
    (f"{_PROBED}-{{}}-norm-allone", "every token's first choice is the same expert"),
    (f"{_PROBED}-{{}}-norm-outlier", "one channel in 64 is 64 times larger"),
    (f"{_PROBED}-{{}}-norm-large", "large pre-activations"),
    (f"{_PROBED}-{{}}-norm-exact", "sums that are exact in any order: bits decide"),
    (f"{_PROBED}-{{}}-norm-holes-exact", "slots that name no expert"),
    (f"{_PROBED}-{{}}-norm-zipf-nonfinite", "NaN and infinity stay in their rows"),
    ("T1.H128.I256.E8.K2-{}-norm", "one token"),
    ("T0.H128.I256.E8.K2-{}-norm", "no token"),
    ("T257.H128.I256.E8.K2-{}-norm", "more rows than a tile"),
    ("T33.H128.I256.E64.K8-{}-norm", "many experts, few rows each"),
    (f"{_PROBED}-{{}}-norm-padded", "tensors inside larger ones of NaN"),
)

WIDE = (
    ("qwen3.30b.a3b.T4.E8-bf16", "published width"), ("qwen3.30b.a3b.T4.E8-bf16-tp2", "published width, two ranks"),
    ("olmoe.1b.7b.T8.E4-bf16", "published width"), ("olmoe.1b.7b.T8.E4-fp16-tp2", "published width, two ranks"),
)


def conformance_ids() -> list[tuple[str, str]]:
    """(case id, purpose): families in three dtypes, on one rank and two, backward in fp32 and bf16; probes; widths."""
    ids = []
    for family in FAMILIES:
        for dtype in Dtype:
            for tp in ("", "-tp2"):
                stem = "-".join(filter(None, (f"v1-{family.sizes}", dtype, family.words))) + tp
                ids.append((stem, f"{family.name}: {family.purpose}"))
                if dtype is not Dtype.FP16:
                    ids.append((stem + "-bwd", f"{family.name}: {Direction.BACKWARD}"))
    ids += [("v1-" + text.format(dtype), purpose) for text, purpose in PROBES for dtype in (Dtype.FP32, Dtype.BF16)]
    return ids + [(f"v1-{text}", purpose) for text, purpose in WIDE]
