"""What the fast layer declares of itself, and the check that a spec is within it."""

from dataclasses import replace
from functools import cache

import torch

from moe_fast.form import ACTIVATIONS
from moe_ref.contract.capabilities import Capabilities, Numerics, Products
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import UsageTypeError, raise_faults
from moe_ref.contract.features import Feature
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import (
    Direction,
    Dtype,
    Format,
    Hosting,
    Ranks,
    Schedule,
    Scheme,
    SharedPlacement,
    Stage,
    Storage,
    Tokens,
)


def _numerics(dtype: Dtype) -> Numerics:
    """fp32 router and accumulators; rows and partial sums between ranks in the model's dtype."""
    stored = Format(dtype.value)
    rows = dict.fromkeys((Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED), stored)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **rows}, reduce=stored)


def _decoded(dtype: Dtype) -> Numerics:
    """The same with weights that are decoded in fp32 and rounded to the model's dtype."""
    return replace(_numerics(dtype), decoded=Format(dtype.value))


def _rounded(scheme: Scheme, dtype: Dtype) -> Numerics:
    """The same with weights as codes, and rows rounded to codes beside them; every sum in a matrix unit is a block."""
    return replace(_numerics(dtype), products=ROUNDED[scheme],
                   promoted_after=ENCODINGS[scheme].columns or LONGEST_SUM)


LONGEST_SUM = 128
"""Products that a sum in a matrix unit has where scales do not change along K."""

ROUNDED: dict[Scheme, Products] = {Scheme.FP8_TENSOR: "fp8_tensor", Scheme.FP8_ROW: "fp8_row",
                                   Scheme.FP8_BLOCK: "fp8_block", Scheme.MXFP8: "mxfp8"}
"""Schemes whose products have two operands in e4m3."""

DECODED = (Scheme.GPTQ, Scheme.GPTQ_32, Scheme.GPTQ_ORDER, Scheme.GPTQ_ORDER_32, Scheme.AWQ, Scheme.AWQ_32,
           Scheme.MXFP4)
"""Schemes whose weights are decoded before a product."""
EXACT = (Scheme.INT8, Scheme.NVFP4)
"""Schemes of which what is multiplied is exact in every dtype: a scale joins the sums."""

CAPABILITIES = Capabilities(
    name="moe_fast", version="0.1.0", numerics={dtype: _numerics(dtype) for dtype in Dtype},
    schemes={scheme: {dtype: _decoded(dtype) for dtype in Dtype} for scheme in DECODED}
    | {scheme: {dtype: _numerics(dtype) for dtype in Dtype} for scheme in EXACT}
    | {scheme: {dtype: _rounded(scheme, dtype) for dtype in Dtype} for scheme in ROUNDED},
    stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.PERMUTE_SCALES, Stage.PERMUTE_CODES, Stage.ACT,
            Stage.ACT_SCALES, Stage.ACT_CODES, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED),
    activations=ACTIVATIONS, scores=("softmax", "sigmoid", "sqrt_softplus"),
    features=(Feature.DENSE, Feature.LOGIT_BIAS, Feature.LOGIT_CAP, Feature.GROUPS, Feature.GROUP_FILL_ZERO,
              Feature.SELECTION_BIAS, Feature.SELECTION_BIAS_ON_LOGITS, Feature.EPSILON_CLAMP, Feature.LEARNED_SCALE,
              Feature.ZERO_EXPERTS, Feature.CAPACITY, Feature.WEIGHT_ON_INPUT, Feature.NOT_GATED, Feature.MLP_BIAS,
              Feature.LIMIT, Feature.SCALED_SWIGLU, Feature.SOFTCAP, Feature.SHARED_EXPERT, Feature.SHARED_ROUTER_GATE,
              Feature.SHARED_MEAN, Feature.OUTPUT_BIAS, Feature.RESIDUAL),
    max_tp=64, max_ep=64, tokens=tuple(Tokens), hostings=tuple(Hosting), redundant=True,
    shared_placements=tuple(SharedPlacement), schedules=tuple(Schedule), storages=tuple(Storage), ranks=tuple(Ranks),
    directions=tuple(Direction), deterministic=True, equal_ranks=True, lower_id_ties=True, injected_routing=True,
    collectives_through_groups=True)

FP8_TRAINING = replace(
    CAPABILITIES, name="moe_fast.fp8_training", schemes={},
    numerics={dtype: replace(numerics, products="fp8_row", promoted_after=LONGEST_SUM)
              for dtype, numerics in CAPABILITIES.numerics.items()},
    # Of shared experts that the router weights each is a row of its own.
    features=tuple(one for one in CAPABILITIES.features if one is not Feature.SHARED_ROUTER_GATE))
"""Of plain weights whose products are of 8 bits: fp8_training.py."""


@cache
def check_supported(spec: MoESpec, in_fp8: bool = False) -> None:
    """Raise UsageValueError that names everything in `spec` that no kernel here computes, or none in 8 bits."""
    capabilities = FP8_TRAINING if in_fp8 else CAPABILITIES
    raise_faults(capabilities.name, [f"{reason} is not implemented"
                                     for reason in capabilities.refused_mathematics(spec)])


def check_scheme(scheme: Scheme, dtype: torch.dtype) -> None:
    """Raise UsageTypeError unless there are kernels for encoded experts beside tokens of that dtype."""
    taken = {name: [TORCH_DTYPES[one] for one in dtypes] for name, dtypes in CAPABILITIES.schemes.items()}
    if scheme not in taken:
        raise UsageTypeError(f"weights: scheme {scheme}, but should be one of {', '.join(taken)} [moe_fast]")
    if dtype not in taken[scheme]:
        raise UsageTypeError(f"x_TH: dtype {dtype}, but should be one of {', '.join(map(str, taken[scheme]))} with "
                             f"scheme {scheme} [moe_fast]")
