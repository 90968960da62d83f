"""What the layer on DTensors refuses, and in which words."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import moe_fast
from moe_ref import MoEWeights, Parallel, Router
from moe_ref.contract.errors import UsageError, UsageValueError
from moe_ref.contract.trace import Trace
from tests.dtensor_cases import CASES, layer, parallel, problem
from tests.gloo_ranks import run_gloo_ranks

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a sharded layer": (
        lambda: parallel(moe_fast.MoELayer(CASES["plain"], Parallel(splits=(2,))), "MoETensorParallel", (1,)),
        r"should hold whole parameters: the mesh spreads it"),
    "a mesh of one dimension": (
        lambda: parallel(moe_fast.MoELayer(CASES["plain"]), "MoETensorExpertParallel", (1,)),
        r"mesh of shape \(1,\), but should have 2 dimensions: experts, columns"),
    "a cut of the hidden axis": (
        lambda: parallel(moe_fast.MoELayer(CASES["plain"]), "MoETensorParallel", (1,), input_layouts=shard(1)),
        r"input_layouts=.*but should be Replicate\(\) or Shard\(0\) for each of 1"),
    "another module": (lambda: parallel(torch.nn.Linear(2, 2), "MoETensorParallel", (1,)),
                       r"module: Linear, but should be a moe_fast.MoELayer"),
    "identity experts": (lambda: called(moe_fast.MoELayer(layer(Router(num_experts=5, top_k=2, num_zero_experts=2)))),
                         r"identity experts is not implemented on DTensors"),
    "a trace": (lambda: called(moe_fast.MoELayer(CASES["plain"]), trace=Trace()),
                r"trace: given, but a layer on DTensors shows no stages"),
    "local weights": (lambda: moe_on_dtensors(lambda weights: weights),
                      r"w13_EGIH: Tensor, but should be a DTensor as x_TH is"),
    "weights placed by two roles": (lambda: moe_on_dtensors(misplaced),
                                    r"w2_EHI: .*Shard\(dim=1\).*, but should be .*Shard\(dim=2\).* beside w13_EGIH"),
}


def shard(dim: int) -> object:
    """Shard(dim)."""
    from torch.distributed.tensor import Shard

    return Shard(dim)


def called(layer: torch.nn.Module, **options: Any) -> torch.Tensor:
    """One token through the layer on a mesh of one rank."""
    return parallel(layer, "MoETensorParallel", (1,))(torch.ones(1, 32), **options)


def moe_on_dtensors(place: Callable[[MoEWeights], MoEWeights]) -> object:
    """moe_dtensor with a replicated x_TH and weights placed by `place`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    from moe_fast.distributed import moe_dtensor

    given = problem("plain")
    x_TH = distribute_tensor(given.inputs.x_TH, init_device_mesh("cpu", (1,)), [Replicate()])
    return moe_dtensor(x_TH, place(given.inputs.weights), given.spec)


def misplaced(weights: MoEWeights) -> MoEWeights:
    """w13 cut into columns, w2 by its output."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dims = {"w13_EGIH": Shard(2), "w2_EHI": Shard(1)}
    mesh = init_device_mesh("cpu", (1,))
    return MoEWeights(**{name: distribute_tensor(tensor, mesh, [dims.get(name, Replicate())])
                         for name, tensor in weights.named_tensors()})


def test_what_is_refused() -> None:
    """Wrong use raises before any kernel starts, with what was given and what should be."""
    def body(rank: int) -> dict[str, str]:
        said = {}
        for name, (call, _) in REFUSED.items():
            try:
                call()
            except UsageError as error:
                said[name] = str(error)
        return said

    [said] = run_gloo_ranks(1, body)
    assert {name for name, (_, words) in REFUSED.items() if not re.search(words, said.get(name, ""))} == set(), said


def test_too_few_experts_for_the_ranks() -> None:
    """5 experts over 6 ranks would leave one without any: said on every rank, before anything is sent."""
    def body(rank: int) -> str:
        with pytest.raises(UsageValueError) as raised:
            parallel(moe_fast.MoELayer(CASES["plain"]), "MoEExpertParallel", (6,))
        return str(raised.value)

    [said] = set(run_gloo_ranks(6, body))
    assert said == "MoEExpertParallel: 5 experts over 6 ranks, but each should hold one at least"
