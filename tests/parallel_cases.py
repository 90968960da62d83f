"""Every form of parallelism with every kind of layer, small, and how virtual ranks run them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch

import moe_ref
from moe_ref import MLP, Case, CountingComm, Groups, MoESpec, MoEWeights, Parallel, Routing
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import CommCall, grid_groups
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.shares import RankShare, rank_shares
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_shards

Result = TypeVar("Result")

LAYERS = (
    "T13.H24.I20.E6.K2-fp32-norm-res",
    "T9.H24.I20.E6.K3-fp32-norm-routerbias-mlpbias-limit0.75-alpha1.702-up1",
    "T9.H24.I20.E6.K2-fp32-sigmoid-norm-bias-g3.2-expertscale-sh10-shgate",
    "T9.H24.I20.E6.K2-fp32-norm-mlpbias-sh10-shgate-shmlpbias-outbias-res",
    "T9.H24.I20.E6.K2-fp32-sigmoid-norm-learnscale-sh10-shrouter2",
    "T9.H24.I20.E4.K3-fp32-scale2-zero3-sh10-shmean-outbias",
    "T9.H24.I20.E6.K2-fp32-sigmoid-sh10-weightinput-zipf",
    "T9.H24.I20.E2.K1-fp32-nogate-outbias-allone",
    "T5.H24.I20-fp32-sh10-res",
    "T0.H24.I20.E6.K2-fp32-mlpbias-sh10-shgate",
)
"""Biases, gates, identity experts, a mean, a weight on the input; more ranks than experts; no router; no token."""

FORMS = (
    "tp3", "tp3-split1.0.2", "tp3-wholeshared", "tp3-allreducerows", "tp3-split1.0.2-allreducerows-wholeshared",
    "tp3-reducescatter", "tp3-split0.1.0-reducescatter-wholeshared", "tp3-gather", "tp3-split2.0.1-gather",
    "tp3-gather-wholeshared", "tp3-reducescatter-tokenstp-share3.0.1", "tp3-reducescatter-tokenstp-wholeshared",
    "ep3", "ep3-roundrobin-copy0.0-wholeshared", "ep3-allreducerows", "ep3-tokensep-share2.0.1", "ep2-reducescatter",
    "tp2-ep2", "tp2-ep2-split3.1-roundrobin", "tp2-ep2-wholeshared", "tp2-ep2-copy0.0",
    "tp2-ep2-split1.0-allreducerows", "tp2-ep2-reducescatter-copy0", "tp2-ep2-reducescatter-wholeshared",
    "tp2-ep2-reducescatter-tokenstp-share1.2", "tp2-ep3-reducescatter-tokenstp-share0.1-copy0-wholeshared",
    "tp2-ep2-tokensep-share1.3", "tp2-ep3-tokensep-roundrobin-copy0-wholeshared",
    "tp2-ep2-allreducerows-tokensep-share0.1", "tp2-ep2-allreducerows-tokensep-wholeshared",
    "tp2-ep2-reducescatter-tokensep-copy0.0", "tp2-ep2-split0.1-reducescatter-tokensep-wholeshared",
    "tp2-ep2-reducescatter-tokensboth-share3.0.1.2", "tp2-ep2-split2.1-reducescatter-tokensboth-roundrobin",
    "tp2-ep3-reducescatter-tokensboth-share0.0.2.0.0.1-copy0-wholeshared",
)
"""Every schedule, holder of tokens, hosting and place of the shared expert; ranks without columns, tokens, experts."""

CASES = tuple(f"v1-{layer}-{form}" for layer in LAYERS for form in FORMS)
"""All of them."""


@dataclass(frozen=True)
class Layer:
    """A layer's whole inputs in fp64: what the unsharded truth is computed from, and each rank's part cut from."""

    spec: MoESpec
    x_TH: torch.Tensor
    weights: MoEWeights
    residual_TH: torch.Tensor
    grad_y_TH: torch.Tensor
    logits_TE: torch.Tensor | None = None
    routing: Routing | None = None


@cache
def drawn_layer(layer: str) -> Layer:
    """The generated inputs of a problem; routing is the router's own, of logits where the pattern forces them."""
    problem = parse_case(f"v1-{layer}").problem
    inputs, (whole,) = build_inputs(problem), build_shards(problem, Parallel())
    weights = MoEWeights(**{name: tensor.double() for name, tensor in whole.named_tensors()})
    size = problem.num_tokens * problem.spec.hidden_size
    grad_y_TH = (torch.arange(size, dtype=torch.float64) * 37 % 11 - 5).view(inputs.x_TH.shape)
    residual_TH = inputs.x_TH.double().flip(1)
    return Layer(problem.spec, inputs.x_TH.double(), weights, residual_TH, grad_y_TH, inputs.logits_TE)


@cache
def whole_numbers(layer: str) -> Layer:
    """The same layer in numbers that fp64 computes with exactly, whatever the order: every comparison is for equality.

    Small integers everywhere, relu for the activation, an injected routing with integer weights: no sum of absolute
    values, forward or backward, reaches 2^24.
    """
    drawn = drawn_layer(layer)
    spec = replace(drawn.spec, experts=_relu(drawn.spec.experts))
    if spec.shared is not None:
        spec = replace(spec, shared=replace(spec.shared, mlp=_relu(spec.shared.mlp)))
    ids_TK = moe_ref.route(drawn.x_TH, drawn.weights, drawn.spec, logits_TE=drawn.logits_TE).ids_TK
    if len(ids_TK) > 2:
        ids_TK[2, 0] = -1  # a slot without an expert
    weights_TK = (torch.arange(ids_TK.numel(), dtype=torch.float64) % 7 - 8).view(ids_TK.shape)
    gates = spec.shared.num_gates if spec.shared else 0
    gates_TS = (torch.arange(len(ids_TK) * gates, dtype=torch.float64) % 3 + 2).view(len(ids_TK), gates)
    weights = MoEWeights(**{name: (8 * tensor).round() for name, tensor in drawn.weights.named_tensors()})
    return Layer(spec, drawn.x_TH.round(), weights, drawn.residual_TH.round(), drawn.grad_y_TH,
                 routing=Routing(ids_TK, weights_TK, shared_TS=gates_TS if gates else None))


def _relu(mlp: MLP) -> MLP:
    return MLP(activation="relu", gated=mlp.gated, bias=mlp.bias)


def part(layer: Layer, start: int, stop: int) -> Layer:
    """What a rank with these tokens is handed."""
    def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[start:stop]

    routing = layer.routing
    if routing is not None:
        routing = Routing(routing.ids_TK[start:stop], routing.weights_TK[start:stop], shared_TS=rows(routing.shared_TS))
    return replace(layer, x_TH=layer.x_TH[start:stop], residual_TH=layer.residual_TH[start:stop],
                   grad_y_TH=layer.grad_y_TH[start:stop], logits_TE=rows(layer.logits_TE), routing=routing)


def split(case_id: str) -> tuple[str, str]:
    """The layer and the form of one of CASES."""
    form = next(form for form in sorted(FORMS, key=len, reverse=True) if case_id.endswith("-" + form))
    return case_id.removeprefix("v1-").removesuffix("-" + form), form


def on_ranks(case: Case, layer: Layer,
             body: Callable[[Layer, RankShare, Groups], Result]) -> list[tuple[Result, list[CommCall]]]:
    """body(its part of the layer, its share, its groups) on every rank of the grid, and the collectives of each."""
    parallel, shares = case.parallel, rank_shares(case)

    def rank_body(comm: LocalComm) -> tuple[Result, list[CommCall]]:
        share, calls, groups = shares[comm.rank], [], grid_groups(comm, parallel.tp, parallel.ep)
        counting = Groups(tp=CountingComm(groups.tp, calls, "tp"), ep=CountingComm(groups.ep, calls, "ep"))
        mine = replace(part(layer, *share.tokens), weights=layer.weights.shard(parallel, comm.rank))
        return body(mine, share, counting), calls

    return run_virtual_ranks(parallel.size, rank_body)
