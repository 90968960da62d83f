"""The fast layer as an nn.Module, and what it declares of itself."""

from moe_fast.layer import moe
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.module import LayerModule
from moe_ref.contract.vocabulary import Dtype, Format, Ranks, Stage


class MoELayer(LayerModule):
    """The fast layer over this rank's parameters; output in the dtype of its input."""

    layer_function = staticmethod(moe)


def _numerics(dtype: Dtype) -> Numerics:
    """fp32 router and accumulators; rows and partial sums between ranks in the model's dtype."""
    stored = Format(dtype.value)
    rows = dict.fromkeys((Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED), stored)
    return Numerics(storage={Stage.LOGITS: Format.FP32, Stage.WEIGHTS: Format.FP32, **rows}, reduce=stored)


CAPABILITIES = Capabilities(
    name="moe_fast", version="0.1.0", numerics={dtype: _numerics(dtype) for dtype in Dtype},
    stages=(Stage.LOGITS, Stage.IDS, Stage.WEIGHTS, Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED,
            Stage.REDUCED),
    activations=("silu", "gelu", "gelu_tanh"), scores=("softmax", "sigmoid"), grouped_routing=True,
    selection_bias=True, shared_expert=True, dense=True, residual=True, max_tp=64, ranks=tuple(Ranks),
    deterministic=True, equal_ranks=True, lower_id_ties=True, collectives_through_groups=True)
