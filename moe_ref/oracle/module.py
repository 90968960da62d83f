"""The oracle as an nn.Module, and what it declares of itself as a subject."""

from typing import get_args

from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.features import Feature
from moe_ref.contract.module import LayerModule
from moe_ref.contract.router_spec import Score
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.spec import Activation
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
from moe_ref.oracle.layer import moe


class MoELayer(LayerModule):
    """The reference layer over this rank's parameters; output in fp64."""

    layer_function = staticmethod(moe)


_STORED = (Stage.LOGITS, Stage.WEIGHTS, Stage.GATE_UP, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED,
           Stage.REDUCED)

_EXACT = {dtype: Numerics(storage=dict.fromkeys(_STORED, Format.FP64), accumulate=Format.FP64, reduce=Format.FP64)
          for dtype in Dtype}

CAPABILITIES = Capabilities(
    name="moe_ref", version="0.1.0", numerics=_EXACT, schemes=dict.fromkeys(ENCODINGS, _EXACT),
    stages=(*_STORED, Stage.IDS), activations=get_args(Activation), scores=get_args(Score), features=tuple(Feature),
    directions=tuple(Direction),
    max_tp=64, max_ep=64, tokens=tuple(Tokens), hostings=tuple(Hosting), redundant=True,
    shared_placements=tuple(SharedPlacement), schedules=tuple(Schedule), storages=tuple(Storage),
    ranks=tuple(Ranks), deterministic=True, equal_ranks=True, lower_id_ties=True, injected_routing=True,
    collectives_through_groups=True)
