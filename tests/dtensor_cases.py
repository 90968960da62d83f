"""Layers for the tests of moe_fast.distributed, with truth and bound, computed once before the ranks are forked."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_fast
import moe_ref
from moe_ref import MLP, MoESpec, MoEWeights, Router, SharedExpert
from moe_ref.contract.vocabulary import Dtype, Format
from moe_ref.oracle.backward.layer import moe_backward
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.output import output_bound
from moe_ref.verify.bounds.rounding import RoundingModel
from tests.backward_bound import Named, bounds, excess, named, num_roundings
from tests.backward_cases import Inputs, draw

HIDDEN, INTERMEDIATE, EXPERTS, SHARED = 32, 35, 5, 17
"""No axis that is cut is a multiple of 2, 3 or 4 ranks."""

SOFTMAX = Router(num_experts=EXPERTS, top_k=2, renormalize=True)


def layer(router: Router | None = SOFTMAX, **options: object) -> MoESpec:
    """A layer of these sizes."""
    return MoESpec(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, router=router,
                   **options)  # type: ignore[arg-type]


MESHES = {"MoETensorParallel": ("tp",), "MoEExpertParallel": ("ep",), "MoETensorExpertParallel": ("ep", "tp")}
"""Plans and the names of their mesh dimensions."""

CASES = {
    "plain": layer(),
    "gated shared": layer(shared=SharedExpert(intermediate_size=SHARED, gate="sigmoid")),
    "groups, bias, shared": layer(
        Router(num_experts=6, top_k=3, score="sigmoid", renormalize=True, num_groups=3, num_groups_kept=2,
               group_score="top2_sum", selection_bias="score", scaling_factor=2.5),
        experts=MLP(activation="gelu"), shared=SharedExpert(intermediate_size=SHARED)),
    "dense": layer(None),
    "every bias": layer(output_bias=True, experts=MLP(bias=True, limit=7.0, sigmoid_scale=1.702, up_offset=1.0),
                        shared=SharedExpert(intermediate_size=SHARED, merge="mean",
                                            mlp=MLP(activation="relu_squared", gated=False, bias=True))),
    "weight on input": layer(Router(num_experts=EXPERTS, top_k=1, score="sigmoid"), weight_on="input"),
}


@dataclass(frozen=True)
class Problem:
    """A layer with its inputs, and truth and bound of its output y_TH and of all gradients, by name."""

    spec: MoESpec
    inputs: Inputs
    truth: Named
    bound: Named

    def excess(self, found: Named) -> dict[str, float]:
        """Largest error over its bound of each tensor that is found."""
        return {name: excess(self.truth, found, {name: self.bound[name]})[name] for name in found}


def drawn(spec: MoESpec, num_tokens: int) -> Inputs:
    """Numbers of one sign, small parameters, experts unlike each other: little cancels, and bounds are close.

    The router's rows have a mean of 0, so that each token has its own choice and every expert some tokens.
    """
    given = draw(spec, num_tokens=num_tokens, dtype=torch.float32)
    tensors = {name: tensor.abs() / 16 for name, tensor in given.weights.named_tensors()}
    if "router_EH" in tensors:
        tensors["router_EH"] = 4 * (tensors["router_EH"] - tensors["router_EH"].mean(1, keepdim=True))
    if "selection_bias_E" in tensors:
        tensors["selection_bias_E"] /= 4
    tensors["w2_EHI"] *= 2.0 ** -(torch.arange(spec.num_experts) % 3)[:, None, None]
    return Inputs(given.x_TH.abs(), MoEWeights(**tensors), given.grad_y_TH.abs(), given.residual_TH.abs())


@cache
def problem(name: str, num_tokens: int = 11, injected: bool = False) -> Problem:
    """The case with its inputs in fp32; injected: the layer's own routing is an input itself."""
    spec, inputs = CASES[name], drawn(CASES[name], num_tokens)
    exact = moe_ref.route(inputs.x_TH, inputs.weights, spec)
    routing = moe_fast.route(inputs.x_TH, inputs.weights, spec)
    assert torch.equal(exact.ids_TK, routing.ids_TK), "a choice within rounding: draw other inputs"
    # The output's bound takes the routing as given: that of every rank, to the bit.
    y_TH, y_bound_TH = output_bound(inputs.x_TH, routing, inputs.weights, spec,
                                    moe_fast.CAPABILITIES.numerics[Dtype.FP32],
                                    RoundingModel(load_tolerances(), "cpu", Format.FP32))
    given = {"routing": routing} if injected else {}
    truth = named(moe_backward(inputs.grad_y_TH, inputs.x_TH, inputs.weights, spec, **given))
    # Of two evaluations in fp64; one in fp32 errs by half as many roundings of 2^-24.
    fp64 = bounds(inputs, spec, given.get("routing", exact), injected=injected)
    relative = num_roundings(spec, num_tokens) * 2**-24
    scale = relative / (1 - relative) / (2 * num_roundings(spec, num_tokens) * 2**-53)
    bound = {field: None if tensor is None else tensor * scale for field, tensor in fp64.items()}
    return Problem(spec, inputs, truth | {"y_TH": y_TH}, bound | {"y_TH": y_bound_TH})


def loaded(given: Problem) -> moe_fast.MoELayer:
    """The layer with its weights, whole on every rank."""
    layer = moe_fast.MoELayer(given.spec)
    layer.load_weights(given.inputs.weights)
    return layer


def parallel(layer: torch.nn.Module, plan: str, shape: tuple[int, ...], **options: Any) -> torch.nn.Module:
    """The layer under a plan, on a mesh of this shape."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from moe_fast import distributed

    return parallelize_module(layer, init_device_mesh("cpu", shape, mesh_dim_names=MESHES[plan][:len(shape)]),
                              getattr(distributed, plan)(**options))


def warm_up() -> None:
    """What every forked rank would otherwise load for itself: DTensor, fake tensors, interpreted kernels."""
    import moe_fast.distributed
    assert moe_fast.distributed
    with FakeTensorMode():
        torch.ops.moe_fast.router_logits(torch.ones(2, 4), torch.ones(3, 4), None)
    given = problem("gated shared")
    loaded(given)(given.inputs.x_TH).backward(given.inputs.grad_y_TH)


def digest(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor, to compare over ranks."""
    return tensor.detach().contiguous().numpy().tobytes()
