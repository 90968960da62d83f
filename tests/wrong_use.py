"""Subjects that call moe_fast wrongly, as an adapter with a mistake would."""

from dataclasses import replace
from types import SimpleNamespace

import torch

import moe_fast
from moe_ref import Groups, MoEWeights, Routing


def _cut_w2(x_TH, weights: MoEWeights, spec, parallel, groups, options):
    shorter = replace(weights, w2_EHI=weights.w2_EHI[:, :, :-1].contiguous())
    return moe_fast.moe(x_TH, shorter, spec, parallel, groups, **options)


def _spoil_ids(x_TH, weights, spec, parallel, groups, options):
    routing = moe_fast.route(x_TH, weights, spec)
    routing = Routing(routing.ids_TK + spec.num_experts, routing.weights_TK)
    return moe_fast.experts(x_TH, routing, weights, spec, parallel, groups, check="values")


def _lone_group(x_TH, weights, spec, parallel, groups, options):
    return moe_fast.moe(x_TH, weights, spec, parallel, Groups(), **options)


def _double_precision(x_TH, weights, spec, parallel, groups, options):
    return moe_fast.moe(x_TH.to(torch.float64), weights, spec, parallel, groups, **options)


MISTAKES = {"k_mismatch": _cut_w2, "ids_out_of_range": _spoil_ids, "wrong_world_size": _lone_group,
            "fp64_input": _double_precision}
TOKENS = {name: 9 + index for index, name in enumerate(MISTAKES)}
"""By this number of tokens a mistake is made, so that one run shows them all."""


def _moe(x_TH, weights, spec, parallel=None, groups=None, **options):
    name = next(name for name, tokens in TOKENS.items() if tokens == len(x_TH))
    return MISTAKES[name](x_TH, weights, spec, parallel, groups, options)


by_tokens = SimpleNamespace(moe=_moe, CAPABILITIES=moe_fast.CAPABILITIES)
