"""Every kernel of a layer's forward pass on one rank, in the order of its launches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_fast.compile.combinations import Combination, combination_of
from moe_fast.compile.recorder import Launch, record
from moe_fast.compile.resources import Resources
from moe_fast.roofline.devices import Device
from moe_fast.roofline.predict import ProductTime, predict
from moe_fast.roofline.product import Product, operand, product_of
from moe_ref.contract.case import Case

Compiler = Callable[[list[Combination]], list[Resources]]


@dataclass(frozen=True)
class KernelTime:
    """part: as gate_up, or "shared gate_up". product, time, resources: None of kernels that are no product."""

    part: str
    seconds: float
    product: Product | None = None
    time: ProductTime | None = None
    resources: Resources | None = None


@dataclass(frozen=True)
class LayerTime:
    """kernels: in order. least: the limit of the routed and shared experts' products and of the router's, together."""

    kernels: tuple[KernelTime, ...]

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.kernels)

    @property
    def least(self) -> float:
        return sum(one.time.least for one in self.kernels if one.time)


def predict_layer(case: Case, device: Device, compiler: Compiler) -> LayerTime:
    """Of rank 0, collectives left out; `compiler` tells what combinations take."""
    launches = record(case, device.architecture)
    products = [product_of(launch, case.problem.num_tokens) for launch in launches]
    todo = [combination_of(launch, device.architecture)
            for launch, product in zip(launches, products, strict=True) if product]
    resources, kernels = iter(compiler(todo)), []
    for launch, product in zip(launches, products, strict=True):
        name = launch.kernel.fn.__name__.removesuffix("_kernel")
        if product is None:
            # No more is known of it than that each of its tensors is read or written.
            kernels.append(KernelTime(name, device.launch + _num_bytes(launch) / device.memory))
            continue
        found = next(resources)
        time = predict(product, found, device)
        routes = name in ("product", "route")
        is_shared = not routes and _experts(launch) == 1 and case.problem.spec.num_experts > 1
        kernels.append(KernelTime("router" if routes else "shared " * is_shared + name, time.seconds, product, time,
                                  found))
    return LayerTime(tuple(kernels))


def _num_bytes(launch: Launch) -> int:
    tensors = {id(one): one for one in launch.arguments.values() if isinstance(one, torch.Tensor)}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def _experts(launch: Launch) -> int:
    return len(operand(launch.arguments.get("w13", launch.arguments.get("w2"))))
