"""What is timed: one rank's layer of a published model, its weights drawn on the device, tokens with probes among them.

A rank of tp has the columns of I that its shard has and no collective: what ranks exchange is not timed. Probes are the
same few tokens at every number of tokens, so that the truth that results are compared with is computed once.
"""

import math
import re
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.errors import UsageValueError, positive_faults, raise_faults
from moe_ref.contract.parallel import cut
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Dtype
from moe_ref.contract.weights import MoEWeights, parameter_shapes
from moe_ref.models.registry import cut_experts, find_model
from moe_ref.oracle.router import route

NUM_PROBES = 2
_MORE_LOGIT, _OTHERS = 3.0, 0.25
"""What a probe's chosen logits gain, and what is left of all, whose standard deviation is 1."""
_SMALL = 0.02
"""Standard deviation of biases, and of scales about 1: large ones would send every token to the same experts."""
_WITH_EXPERTS = re.compile(r"(?P<model>.+)\.E(?P<experts>\d+)")


class Operation(StrEnum):
    """`layer`: from tokens to output, router included. `experts`: for a given routing. `backward`: gradients of the
    latter, of x, routing weights and every expert's parameters, without the forward pass before it.
    """

    LAYER = "layer"
    EXPERTS = "experts"
    BACKWARD = "backward"


@dataclass(frozen=True)
class RankLayer:
    """The widest rank's part of a model's layer; spec: with that part's widths, as a layer of its own."""

    model: str
    tp: int
    dtype: Dtype
    spec: MoESpec

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return TORCH_DTYPES[self.dtype].itemsize * sum(map(math.prod, parameter_shapes(self.spec).values()))


def rank_layer(model: str, tp: int, dtype: Dtype) -> RankLayer:
    """A registered model's layer on one rank of `tp`; "mixtral.8x7b.E2" is the layer with two experts.

    UsageValueError on a model that is not known or has a capacity, and on more ranks than columns.
    """
    raise_faults("bench", positive_faults(tp=tp))
    match = _WITH_EXPERTS.fullmatch(model)
    spec = cut_experts(find_model(match["model"]).spec, int(match["experts"])) if match else find_model(model).spec
    if spec.router is not None and spec.router.capacity is not None:
        raise UsageValueError(f"bench: the router of {model} has a capacity, but a few tokens are compared with their "
                              "truth, which should not depend on the others")
    shared = spec.shared
    narrowest = min(spec.intermediate_size, shared.intermediate_size if shared else spec.intermediate_size)
    if tp > narrowest:
        raise UsageValueError(f"bench: tp={tp}, but should be at most {narrowest}, the columns of {model}")
    if shared is not None:
        # Blocks that the router weighs by themselves cannot be cut into equal ones on every rank.
        if shared.num_experts > 1 and shared.intermediate_size // shared.num_experts % tp:
            raise UsageValueError(f"bench: tp={tp}, but should divide the width of a shared expert of {model}, "
                                  f"{shared.intermediate_size // shared.num_experts}")
        shared = replace(shared, intermediate_size=_widest(shared.intermediate_size, tp))
    return RankLayer(model, tp, dtype,
                     replace(spec, intermediate_size=_widest(spec.intermediate_size, tp), shared=shared))


def _widest(size: int, tp: int) -> int:
    return max(stop - start for start, stop in cut(size, (1,) * tp))


def draw_weights(layer: RankLayer, device: str, seed: int = 0) -> MoEWeights:
    """Normal weights, made in place on the device, so that pre-activations and logits are of the order of 1."""
    generator, drawn = torch.Generator(device).manual_seed(seed), {}
    for name, shape in parameter_shapes(layer.spec).items():
        dtype = torch.float32 if name in ("selection_bias_E", "weight_scale_E") else TORCH_DTYPES[layer.dtype]
        small = len(shape) == 1 or "bias" in name
        drawn[name] = torch.empty(shape, dtype=dtype, device=device).normal_(
            float(name == "weight_scale_E"), _SMALL if small else shape[-1]**-0.5, generator=generator)
    return MoEWeights(**drawn)


@dataclass(frozen=True)
class Probes:
    """Tokens whose results are compared; grad_PH: of their outputs. Their choice of experts is a clear one."""

    x_PH: torch.Tensor
    grad_PH: torch.Tensor
    routing: Routing


def draw_probes(layer: RankLayer, weights: MoEWeights, device: str, seed: int = 0) -> Probes:
    """NUM_PROBES tokens and the oracle's routing of them; logits of the chosen experts are moved away from the others.

    A choice that roundings could change would leave nothing to compare a layer with that routes by itself.
    """
    x_PH, grad_PH = (_normal((NUM_PROBES, layer.spec.hidden_size), layer, device, seed + 1 + number)
                     for number in range(2))
    found = route(x_PH, weights, layer.spec)
    if weights.router_EH is not None and found.logits_TE is not None:
        more_PE = (_OTHERS - 1) * found.logits_TE
        more_PE = more_PE.scatter_add(1, found.ids_TK, torch.full_like(found.weights_TK, _MORE_LOGIT))
        router_EH = weights.router_EH.double()
        # The shortest step that has these logits.
        x_PH = (x_PH + torch.linalg.solve(router_EH @ router_EH.T, more_PE.T).T @ router_EH).to(x_PH.dtype)
    return Probes(x_PH, grad_PH, given_routing(x_PH, weights, layer.spec))


def given_routing(x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec) -> Routing:
    """The oracle's routing as an implementation is handed one: ids in int32, weights and gates in fp32."""
    found = route(x_TH, weights, spec)
    gates_TS = None if found.shared_TS is None else found.shared_TS.float()
    return Routing(found.ids_TK.int(), found.weights_TK.float(), shared_TS=gates_TS)


@dataclass(frozen=True)
class Batch:
    """Tokens, their routing, the gradient of the output, and where the first probes stand among them, (P,)."""

    x_TH: torch.Tensor
    grad_TH: torch.Tensor
    routing: Routing
    place_P: torch.Tensor
    num_experts: int

    @property
    def num_rows(self) -> int:
        """R: slots that have an expert, identity experts left out."""
        return int(self._with_expert.sum())

    @property
    def num_visited(self) -> int:
        """Experts that have rows."""
        return len(self.routing.ids_TK[self._with_expert].unique())

    @property
    def _with_expert(self) -> torch.Tensor:
        return (self.routing.ids_TK >= 0) & (self.routing.ids_TK < self.num_experts)


def draw_batch(layer: RankLayer, weights: MoEWeights, probes: Probes, num_tokens: int, device: str,
               seed: int = 0) -> Batch:
    """`num_tokens` tokens, probes spread evenly over them; loads of experts are what the router makes of them."""
    x_TH, grad_TH = (_normal((num_tokens, layer.spec.hidden_size), layer, device, seed + 3 + number)
                     for number in range(2))
    count = min(num_tokens, NUM_PROBES)
    place_P = torch.arange(count, device=device) * num_tokens // count
    x_TH[place_P], grad_TH[place_P] = probes.x_PH[:count], probes.grad_PH[:count]
    routing = given_routing(x_TH, weights, layer.spec)
    # A product of another size may round otherwise, and the truth is computed for the probes' own weights.
    for drawn, probed in ((routing.ids_TK, probes.routing.ids_TK), (routing.weights_TK, probes.routing.weights_TK),
                          (routing.shared_TS, probes.routing.shared_TS)):
        if drawn is not None and probed is not None:
            drawn[place_P] = probed[:count]
    return Batch(x_TH, grad_TH, routing, place_P, layer.spec.num_experts)


def _normal(shape: tuple[int, int], layer: RankLayer, device: str, seed: int) -> torch.Tensor:
    drawn = torch.empty(shape, dtype=TORCH_DTYPES[layer.dtype], device=device)
    return drawn.normal_(generator=torch.Generator(device).manual_seed(seed))
