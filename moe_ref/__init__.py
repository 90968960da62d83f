"""moe_ref: the reference, the oracle and the differential harness for mixture-of-experts layers.

Public names are imported when first used, so `import moe_ref` costs little and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "route": "oracle.router", "experts": "oracle.layer", "moe": "oracle.layer", "MoELayer": "oracle.module",
    "moe_backward": "oracle.backward.layer", "Gradients": "contract.gradients",
    "load_balancing_loss": "oracle.losses", "sequence_balance_loss": "oracle.losses",
    "router_z_loss": "oracle.losses",
    "Layout": "layouts.layout", "from_layout": "layouts.convert", "to_layout": "layouts.convert",
    "open_checkpoint": "checkpoints.reader", "open_quantised": "checkpoints.quantised_reader",
    "moe_as_released": "oracle.released", "ReleasedNumerics": "contract.released",
    "MoESpec": "contract.spec", "Router": "contract.router_spec", "Capacity": "contract.router_spec",
    "MLP": "contract.spec", "SharedExpert": "contract.spec",
    "MoEWeights": "contract.weights", "ExpertWeights": "contract.weights", "Routing": "contract.routing",
    "QuantisedWeights": "contract.quantised", "Encoded": "contract.encoded", "Scheme": "contract.vocabulary",
    "decode": "oracle.decode", "encode": "schemes.encode",
    "Parallel": "contract.parallel", "Groups": "contract.comm", "Comm": "contract.comm",
    "CountingComm": "contract.comm", "SoloComm": "contract.comm", "TorchComm": "contract.torch_comm",
    "LocalComm": "contract.local_comm", "run_virtual_ranks": "contract.local_comm",
    "Trace": "contract.trace", "Stage": "contract.vocabulary", "Verdict": "contract.vocabulary",
    "Direction": "contract.vocabulary", "Dtype": "contract.vocabulary",
    "Schedule": "contract.vocabulary", "Tokens": "contract.vocabulary",
    "Hosting": "contract.vocabulary", "SharedPlacement": "contract.vocabulary", "grid_groups": "contract.comm",
    "Capabilities": "contract.capabilities", "Feature": "contract.features", "WeightSource": "contract.weights",
    "Numerics": "contract.capabilities",
    "Problem": "contract.case", "Case": "contract.case",
    "format_case": "contract.case_id", "parse_case": "contract.case_id",
    "UsageError": "contract.errors", "UsageValueError": "contract.errors", "UsageTypeError": "contract.errors",
    "Format": "contract.vocabulary", "Ranks": "contract.vocabulary", "find_model": "models.registry",
    "layout_shapes": "layouts.convert",
    "absorb_act_order": "layouts.act_order", "ActOrderSource": "layouts.act_order", "group_order": "layouts.act_order",
    "CAPABILITIES": "oracle.module",
    "assert_conforms": "conforms.assertion", "Conformed": "conforms.assertion", "Mismatch": "conforms.mismatch",
}
__all__ = [
    "CAPABILITIES",
    "MLP",
    "ActOrderSource",
    "Capabilities",
    "Capacity",
    "Case",
    "Comm",
    "Conformed",
    "CountingComm",
    "Direction",
    "Dtype",
    "Encoded",
    "ExpertWeights",
    "Feature",
    "Format",
    "Gradients",
    "Groups",
    "Hosting",
    "Layout",
    "LocalComm",
    "Mismatch",
    "MoELayer",
    "MoESpec",
    "MoEWeights",
    "Numerics",
    "Parallel",
    "Problem",
    "QuantisedWeights",
    "Ranks",
    "ReleasedNumerics",
    "Router",
    "Routing",
    "Schedule",
    "Scheme",
    "SharedExpert",
    "SharedPlacement",
    "SoloComm",
    "Stage",
    "Tokens",
    "TorchComm",
    "Trace",
    "UsageError",
    "UsageTypeError",
    "UsageValueError",
    "Verdict",
    "WeightSource",
    "__version__",
    "absorb_act_order",
    "assert_conforms",
    "decode",
    "encode",
    "experts",
    "find_model",
    "format_case",
    "from_layout",
    "grid_groups",
    "group_order",
    "layout_shapes",
    "load_balancing_loss",
    "moe",
    "moe_as_released",
    "moe_backward",
    "open_checkpoint",
    "open_quantised",
    "parse_case",
    "route",
    "router_z_loss",
    "run_virtual_ranks",
    "sequence_balance_loss",
    "to_layout",
]

if TYPE_CHECKING:
    from moe_ref.checkpoints.quantised_reader import open_quantised
    from moe_ref.checkpoints.reader import open_checkpoint
    from moe_ref.conforms.assertion import Conformed, assert_conforms
    from moe_ref.conforms.mismatch import Mismatch
    from moe_ref.contract.capabilities import Capabilities, Numerics
    from moe_ref.contract.case import Case, Problem
    from moe_ref.contract.case_id import format_case, parse_case
    from moe_ref.contract.comm import Comm, CountingComm, Groups, SoloComm, grid_groups
    from moe_ref.contract.encoded import Encoded
    from moe_ref.contract.errors import UsageError, UsageTypeError, UsageValueError
    from moe_ref.contract.features import Feature
    from moe_ref.contract.gradients import Gradients
    from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
    from moe_ref.contract.parallel import Parallel
    from moe_ref.contract.quantised import QuantisedWeights
    from moe_ref.contract.released import ReleasedNumerics
    from moe_ref.contract.router_spec import Capacity, Router
    from moe_ref.contract.routing import Routing
    from moe_ref.contract.spec import MLP, MoESpec, SharedExpert
    from moe_ref.contract.torch_comm import TorchComm
    from moe_ref.contract.trace import Trace
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
        Tokens,
        Verdict,
    )
    from moe_ref.contract.weights import ExpertWeights, MoEWeights, WeightSource
    from moe_ref.layouts.act_order import ActOrderSource, absorb_act_order, group_order
    from moe_ref.layouts.convert import from_layout, layout_shapes, to_layout
    from moe_ref.layouts.layout import Layout
    from moe_ref.models.registry import find_model
    from moe_ref.oracle.backward.layer import moe_backward
    from moe_ref.oracle.decode import decode
    from moe_ref.oracle.layer import experts, moe
    from moe_ref.oracle.losses import load_balancing_loss, router_z_loss, sequence_balance_loss
    from moe_ref.oracle.module import CAPABILITIES, MoELayer
    from moe_ref.oracle.released import moe_as_released
    from moe_ref.oracle.router import route
    from moe_ref.schemes.encode import encode


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_ref' has no attribute {name!r}")
    return getattr(import_module(f"moe_ref.{_HOMES[name]}"), name)
