"""The tier `conformance`: layers that other people's implementations can serve, by family, and probes of one family.

Sizes are multiples of 128 on every rank: block formats and 16-byte strides fit, so that what is not supported is the
mathematics and not the size. Two ranks are process ranks, since most implementations call torch.distributed themselves.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

from moe_ref.contract.vocabulary import Direction, Dtype, Scheme


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
    ConformanceFamily("gpt_oss limit 1", f"{_SIZES}.K4", "norm-routerbias-mlpbias-limit1-alpha1.702-up1",
                      "the same with a clamp that many values reach, at a scale where bf16 says more"),
    ConformanceFamily("llama4", f"{_SIZES}.K1", "sigmoid-sh256-weightinput", "the weight on the input, top-1"),
    ConformanceFamily("nemotron_h", f"{_SIZES}.K3",
                      "sigmoid-norm-eps1em20-bias-scale2.5-relu2-nogate-sh256-shrelu2-shnogate",
                      "squared relu without a gate"),
    ConformanceFamily("gelu_tanh", f"{_SIZES}.K2", "norm-gelutanh", "gelu in tanh form; Grok, Gemma 4's experts"),
)
"""What an implementation is asked for in every dtype, on one rank and two, forward and backward."""

_PROBED = f"{_SIZES}.K2"

PROBES = (
    ("zipf", f"{_PROBED}-{{}}-norm-zipf", "popular experts, injected logits"),
    ("empty", f"{_PROBED}-{{}}-norm-empty", "experts without a token"),
    ("allone", f"{_PROBED}-{{}}-norm-allone", "every token's first choice is the same expert"),
    ("outlier", f"{_PROBED}-{{}}-norm-outlier", "one channel in 64 is 64 times larger"),
    ("large", f"{_PROBED}-{{}}-norm-large", "large pre-activations"),
    ("exact", f"{_PROBED}-{{}}-norm-exact", "sums that are exact in any order: bits decide"),
    ("holes", f"{_PROBED}-{{}}-norm-holes-exact", "slots that name no expert"),
    ("nonfinite", f"{_PROBED}-{{}}-norm-zipf-nonfinite", "NaN and infinity stay in their rows"),
    ("T1", "T1.H128.I256.E8.K2-{}-norm", "one token"),
    ("T0", "T0.H128.I256.E8.K2-{}-norm", "no token"),
    ("T257", "T257.H128.I256.E8.K2-{}-norm", "more rows than a tile"),
    ("E64", "T33.H128.I256.E64.K8-{}-norm", "many experts, few rows each"),
    ("padded", f"{_PROBED}-{{}}-norm-padded", "tensors inside larger ones of NaN"),
)
"""What is tried with the first family's mathematics, in fp32 and bf16: name, rest of the id, what it is there for."""

WIDE = (("qwen3.30b.a3b.T4.E8", Dtype.BF16), ("olmoe.1b.7b.T8.E4", Dtype.BF16), ("olmoe.1b.7b.T8.E4", Dtype.FP16))
"""Published widths, fewer experts."""

ENCODED = ((Scheme.FP8_TENSOR, 1), (Scheme.FP8_ROW, 1), (Scheme.FP8_BLOCK, 1), (Scheme.FP8_BLOCK, 2), (Scheme.INT8, 1),
           (Scheme.GPTQ, 1), (Scheme.GPTQ, 2), (Scheme.GPTQ_ORDER, 1), (Scheme.AWQ_32, 2), (Scheme.MXFP4, 1),
           (Scheme.MXFP8, 1), (Scheme.NVFP4, 1))
"""Encoded experts in bf16, with the first family's mathematics: scheme, and ranks, none of which cuts a block."""

_ENCODED_SIZES = "T33.H256.I512.E4.K2"


@dataclass(frozen=True, kw_only=True)
class ConformanceCase:
    """A case and its place in the table: row is a family, a probe, a published model or a scheme."""

    case_id: str
    kind: Literal["family", "experts over ranks", "probe", "model", "encoded"]
    row: str
    purpose: str
    dtype: Dtype
    tp: int = 1
    direction: Direction = Direction.FORWARD


@cache
def conformance_cases() -> tuple[ConformanceCase, ...]:
    """Families in three dtypes, on one rank and two, backward in fp32 and bf16; their experts over two ranks; probes;
    widths; encoded experts.
    """
    cases = []
    for family, dtype, tp, direction in product(FAMILIES, Dtype, (1, 2), Direction):
        if direction is Direction.BACKWARD and dtype is Dtype.FP16:
            continue
        words = [f"v1-{family.sizes}", dtype, family.words, f"tp{tp}" * (tp > 1),
                 "bwd" * (direction is Direction.BACKWARD)]
        cases.append(ConformanceCase(case_id="-".join(filter(None, words)), kind="family", row=family.name,
                                     purpose=f"{family.name}: {family.purpose}", dtype=dtype, tp=tp,
                                     direction=direction))
    for family, dtype, direction in product(FAMILIES, (Dtype.FP32, Dtype.BF16), Direction):
        words = [f"v1-{family.sizes}", dtype, family.words, "ep2", "bwd" * (direction is Direction.BACKWARD)]
        cases.append(ConformanceCase(case_id="-".join(filter(None, words)), kind="experts over ranks", row=family.name,
                                     purpose=f"{family.name}: experts over two ranks", dtype=dtype,
                                     direction=direction))
    cases += [ConformanceCase(case_id="v1-" + text.format(dtype), kind="probe", row=name, purpose=purpose, dtype=dtype)
              for name, text, purpose in PROBES for dtype in (Dtype.FP32, Dtype.BF16)]
    cases += [ConformanceCase(case_id=f"v1-{text}-{dtype}" + f"-tp{tp}" * (tp > 1), kind="model",
                              row=text.partition(".T")[0], purpose="published width, fewer experts", dtype=dtype, tp=tp)
              for (text, dtype), tp in product(WIDE, (1, 2))]
    cases += [ConformanceCase(case_id=f"v1-{_ENCODED_SIZES}-bf16-{scheme}-norm" + f"-tp{tp}" * (tp > 1), kind="encoded",
                              row=scheme, purpose="encoded experts", dtype=Dtype.BF16, tp=tp) for scheme, tp in ENCODED]
    return tuple(cases)
