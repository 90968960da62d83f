"""What the fast layer declares of itself, and the check that a spec is within it."""

from functools import cache

from moe_fast.form import ACTIVATIONS
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.errors import raise_faults
from moe_ref.contract.features import Feature
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import (
    Direction,
    Dtype,
    Format,
    Hosting,
    Ranks,
    Schedule,
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


CAPABILITIES = Capabilities(
    name="moe_fast", version="0.1.0", numerics={dtype: _numerics(dtype) for dtype in Dtype},
    stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED,
            Stage.REDUCED),
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

@cache
def check_supported(spec: MoESpec) -> None:
    """Raise UsageValueError that names everything in `spec` that no kernel here computes."""
    raise_faults("moe_fast", [f"{reason} is not implemented" for reason in CAPABILITIES.refused_mathematics(spec)])
