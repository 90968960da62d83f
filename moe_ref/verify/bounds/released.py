"""A released implementation's rounding points as the harness's contract, and the bound that follows from them."""

from dataclasses import replace

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Format, Stage
from moe_ref.contract.weights import MoEWeights
from moe_ref.verify.bounds.output import output_bound
from moe_ref.verify.bounds.rounding import RoundingModel


def released_numerics(released: ReleasedNumerics, model_format: Format) -> Numerics:
    """Where rows are stored, and the formats of activation and merge; "model" is `model_format`."""
    def at(place: str) -> Format:
        return model_format if place == "model" else Format.FP32

    rows, weight = at(released.rows), at(released.weight)
    storage = {Stage.LOGITS: at(released.logits), Stage.WEIGHTS: weight, Stage.PERMUTE: model_format,
               Stage.GATE_UP: rows, Stage.ACT: rows, Stage.DOWN: rows, Stage.SHARED: model_format,
               Stage.MERGED: model_format, Stage.REDUCED: model_format}
    return Numerics(storage=storage, weight_at="act" if released.weight_at == "act" else "merge",
                    activation=model_format if released.activation == "model" else None,
                    merge=model_format if released.merge == "model" else None)


def released_bound(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights, spec: MoESpec,
                   released: ReleasedNumerics, model_format: Format,
                   model: RoundingModel) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 truth (T, H) for a given routing and what code with these rounding points may be off by.

    Released code stores the routed sum, its scaled value, the shared expert's rows and their sum one after the
    other, so the parts are bounded apart and joined here, with a store after each. The routing's weights are as
    the experts receive them: without the scaling factor where that is on the output.
    """
    numerics = released_numerics(released, model_format)
    bare = replace(weights, shared_w13_GIH=None, shared_w2_HI=None, shared_w13_bias_GI=None, shared_w2_bias_H=None,
                   shared_gate_SH=None, output_bias_H=None)
    routed = replace(spec, shared=None, output_bias=False)
    truth, bound = output_bound(x_TH, routing, bare, routed, numerics, model)
    if released.scale_on == "output" and spec.router is not None:
        factor = spec.router.scaling_factor
        truth, bound = _stored(truth * factor, bound * factor, model_format, model)
    if spec.shared is not None:
        nowhere = replace(routing, ids_TK=torch.full_like(routing.ids_TK, -1))
        summed = replace(spec, shared=replace(spec.shared, merge="sum"), output_bias=False)
        shared = output_bound(x_TH, nowhere, replace(weights, output_bias_H=None), summed, numerics, model)
        truth, bound = _stored(truth + shared[0], bound + shared[1], model_format, model)
        if spec.shared.merge == "mean":
            truth, bound = _stored(truth / 2, bound / 2, model_format, model)
    if weights.output_bias_H is not None:
        truth, bound = _stored(truth + weights.output_bias_H.double(), bound, model_format, model)
    return truth, bound


def _stored(truth: torch.Tensor, bound: torch.Tensor, stored: Format,
            model: RoundingModel) -> tuple[torch.Tensor, torch.Tensor]:
    """After one elementwise operation of fp32 and a store."""
    bound = bound + model.evaluation_unit * (truth.abs() + bound)
    return truth, bound + model.rounded(truth.abs() + bound, stored)
