"""Layers on DTensors in training: sharded data parallelism with an optimizer step, and checkpoints across meshes."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moe_fast
import moe_ref
from moe_ref import MoEWeights
from tests.dtensor_cases import Problem, problem, warm_up
from tests.gloo_ranks import run_gloo_ranks

DP = 2
OPTIMIZERS: dict[str, dict[str, float]] = {"SGD": {"lr": 0.25}, "AdamW": {"lr": 2**-6, "weight_decay": 0.125}}


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    warm_up()


def fully_sharded(given: Problem, axis: str) -> torch.nn.Module:
    """The layer with its weights on a mesh dp x tp or dp x ep: first by the plan, then every parameter cut over dp."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    from moe_fast.distributed import MoEExpertParallel, MoETensorParallel

    mesh = init_device_mesh("cpu", (DP, 2), mesh_dim_names=("dp", axis))
    layer = moe_fast.MoELayer(given.spec)
    layer.load_weights(given.inputs.weights)
    # A local output is a view, of which fully_shard warns, since writing to it would drop its hooks.
    plan = {"tp": MoETensorParallel, "ep": MoEExpertParallel}[axis]
    parallelize_module(layer, mesh[axis], plan(use_local_output=False))
    return fully_shard(layer, mesh=mesh["dp"])


def stepped_by_the_oracle(given: Problem, name: str) -> dict[str, torch.Tensor]:
    """Parameters after one step in fp64 on the mean over dp of the ranks' losses, by autograd through moe_ref."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in given.inputs.weights.named_tensors()}
    y_TH = moe_ref.moe(given.inputs.x_TH, MoEWeights(**leaves), given.spec)
    (y_TH * given.inputs.grad_y_TH.double()).sum().div(DP).backward()
    getattr(torch.optim, name)(leaves.values(), **OPTIMIZERS[name]).step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def step_bound(given: Problem, name: str, parameter: str, stepped: torch.Tensor) -> torch.Tensor:
    """How far a step in fp32 may be off: what the gradient's error moves it, and its own roundings.

    AdamW's first update is lr * g / (abs(g) + eps), which grows with g, so its ends are at those of g; it rounds at
    most 16 times (lerp, square, addcmul, two corrections, root, quotients), the decay and the sum twice each.
    """
    gradient, error = given.truth[parameter] / DP, given.bound[parameter] / DP
    rate = OPTIMIZERS[name]["lr"]
    if name == "SGD":
        return rate * error + 2**-23 * (rate * (gradient.abs() + error) + stepped.abs())
    ends = [end / (end.abs() + 1e-8) for end in (gradient - error, gradient, gradient + error)]
    moved = torch.maximum(ends[2] - ends[1], ends[1] - ends[0])
    return rate * (moved + 16 * 2**-24) + 4 * 2**-24 * (stepped.abs() + rate)


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize(("name", "axis"), [("SGD", "tp"), ("AdamW", "tp"), ("SGD", "ep")])
def test_fully_sharded_step(name: str, axis: str) -> None:
    """On 2 x 2 ranks each dp rank has half of the tokens; FSDP averages over dp: gradients are half of the sum."""
    given = problem("gated shared", num_tokens=12)
    after = stepped_by_the_oracle(given, name)

    def body(rank: int) -> dict[str, float]:
        layer = fully_sharded(given, axis)
        tokens = slice(0, 6) if rank < 2 else slice(6, 12)
        y_TH = layer(given.inputs.x_TH[tokens]).to_local()
        y_TH.backward(given.inputs.grad_y_TH[tokens])
        off = {"y_TH": (y_TH.detach() - given.truth["y_TH"][tokens]).abs() / given.bound["y_TH"][tokens]}
        for parameter, tensor in layer.named_parameters():
            assert (tensor.grad.placements, tensor.grad.device_mesh) == (tensor.placements, tensor.device_mesh)
            difference = tensor.grad.full_tensor() - given.truth[parameter] / DP
            off[f"gradient of {parameter}"] = difference.abs() / (given.bound[parameter] / DP)
        getattr(torch.optim, name)(layer.parameters(), **OPTIMIZERS[name]).step()
        for parameter, tensor in layer.named_parameters():
            difference = tensor.detach().full_tensor() - after[parameter]
            off[parameter] = difference.abs() / step_bound(given, name, parameter, after[parameter])
        return {field: float(ratio.max()) for field, ratio in off.items()}

    for found in run_gloo_ranks(4, body):
        assert len(found) == 1 + 2 * 6
        assert {field: ratio for field, ratio in found.items() if not ratio <= 1} == {}


def spread(given: Problem, plan: str, shape: tuple[int, ...], loaded: bool) -> torch.nn.Module:
    """The layer with its weights or with zeros, under a plan; whole for a mesh of shape ()."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from moe_fast import distributed

    layer = moe_fast.MoELayer(given.spec)
    if loaded:
        layer.load_weights(given.inputs.weights)
    else:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
    return parallelize_module(layer, init_device_mesh("cpu", shape), getattr(distributed, plan)()) if shape else layer


def read(given: Problem, folder: str, shape: tuple[int, ...]) -> list[str]:
    """Loads on a tp mesh, or without one for (): names of what then is not, to the bit, what was saved."""
    import torch.distributed.checkpoint as checkpoint

    layer = spread(given, "MoETensorParallel", shape, loaded=False)
    state: dict[str, Any] = layer.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    layer.load_state_dict(state)
    whole = {name: tensor.full_tensor() if shape else tensor for name, tensor in layer.state_dict().items()}
    saved = dict(given.inputs.weights.named_tensors())
    assert whole.keys() == saved.keys()
    return [name for name, tensor in whole.items() if not torch.equal(tensor, saved[name])]


@pytest.mark.sampled(every=6)
@pytest.mark.parametrize("source", ["ep x tp", "dp x tp", "dp x ep"])
def test_checkpoints_across_meshes(source: str, tmp_path: Path) -> None:
    """Saved from a 2 x 2 mesh, read on tp = 4 and 3, over which nothing divides evenly, and by a plain layer."""
    given = problem("groups, bias, shared")

    def save(rank: int) -> None:
        import torch.distributed.checkpoint as checkpoint

        layer = (spread(given, "MoETensorExpertParallel", (2, 2), loaded=True) if source == "ep x tp"
                 else fully_sharded(given, source[-2:]))
        checkpoint.save(layer.state_dict(), checkpoint_id=str(tmp_path))

    run_gloo_ranks(4, save)
    for shape in [(4,), (3,), ()]:
        size = torch.Size(shape).numel()
        answers = run_gloo_ranks(size, lambda rank, shape=shape: read(given, str(tmp_path), shape))
        assert answers == [[]] * size, shape
