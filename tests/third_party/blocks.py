"""Blocks of transformers, built, filled and run."""

import importlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_ref.contract.routing import Routing
from moe_ref.contract.weights import MoEWeights
from tests.third_party.data import fill
from tests.third_party.family import Experts, Family

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PLACE = "model.layers.0.mlp."
"""Where the block would be in its model, for the names that from_pretrained looks at."""


@dataclass(frozen=True)
class Run:
    """What one call of a block gave: output (T, H), its router's routing, logits where they are to be injected."""

    output_TH: torch.Tensor
    routing: Routing
    logits_TE: torch.Tensor | None = None


def build(family: Family, dtype: torch.dtype, experts: Experts = "eager") -> nn.Module:
    """The family's block in bf16 or wider, in evaluation mode; its title alone decides on the data."""
    home = f"transformers.models.{family.module}"
    configuration = importlib.import_module(f"{home}.configuration_{family.module}")
    config = getattr(configuration, family.config)(**family.options)
    config._experts_implementation = experts
    modeling = importlib.import_module(f"{home}.modeling_{family.module}")
    with torch.no_grad():
        if family.make is not None:
            block = family.make(config, modeling)
        else:
            block = getattr(modeling, family.block)(config, *family.arguments)
    fill(block.eval(), family, zlib.crc32(family.title.encode()))
    # Values are those of the 16-bit checkpoint in every dtype, so that fp32 and bf16 runs share one truth.
    cast(block, torch.bfloat16, kept_in_fp32(modeling) + family.kept)
    return block if dtype == torch.bfloat16 else block.to(dtype)


def replaceable(block: nn.Module) -> bool:
    """Whether its experts are of a class whose computation transformers can replace; the decorator marks it."""
    return any(hasattr(module, "is_transposed") for module in block.modules())


def kept_in_fp32(modeling: Any) -> tuple[str, ...]:
    """Parts of names that from_pretrained keeps in fp32 when a model is loaded in a 16-bit dtype."""
    models = [value for name, value in vars(modeling).items()
              if name.endswith("PreTrainedModel") and value.__module__ == modeling.__name__]
    return tuple(part for model in models for part in model._keep_in_fp32_modules_strict or ())


def cast(block: nn.Module, dtype: torch.dtype, kept: tuple[str, ...]) -> None:
    """Convert floating-point parameters and buffers as loading in `dtype` would."""
    for path, module in block.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                place = PLACE + (f"{path}.{name}" if path else name)
                if tensor is None or not tensor.is_floating_point() or any(part in place for part in kept):
                    continue
                if isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.data.to(dtype)
                else:
                    store[name] = tensor.to(dtype)


def weights_of(block: nn.Module, family: Family) -> MoEWeights:
    """The block's parameters as ours, differentiable views of them."""
    return MoEWeights(**family.read(block))


def run(block: nn.Module, family: Family, x_BSH: torch.Tensor) -> Run:
    """One call; with gradients if they are enabled."""
    with _recorded(block, family.router) as routed, _recorded(block, family.logits) as logits:
        output = block(x_BSH.clone())
    output = output[0] if isinstance(output, tuple) else output
    routing = family.routing(routed[0], block, family.spec)
    logits_TE = logits[0].flatten(0, -2) if logits else None
    return Run(output.reshape(-1, output.shape[-1]), routing, logits_TE)


@contextmanager
def _recorded(block: nn.Module, path: str) -> Iterator[list[Any]]:
    """Outputs of the submodule at `path` while the context lasts; none for an empty path."""
    seen: list[Any] = []
    hook = block.get_submodule(path).register_forward_hook(
        lambda module, inputs, output: seen.append(output)) if path else None
    try:
        yield seen
    finally:
        if hook is not None:
            hook.remove()
