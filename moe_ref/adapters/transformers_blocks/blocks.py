"""Blocks of transformers without memory of their own: built once per layer, called with whoever's weights."""

import copy
import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_ref.adapters.transformers_blocks.families import family_of
from moe_ref.adapters.transformers_blocks.family import Family
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.spec import MoESpec

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def served_family(spec: MoESpec) -> Family:
    """The block for a spec; UsageValueError where no block that is known here computes just that."""
    family = family_of(spec)
    if family is None:
        raise UsageValueError(f"transformers: no block that is known here computes {spec}")
    return family


@cache
def build(spec: MoESpec, columns: int, shared_columns: int, backend: str) -> nn.Module:
    """On the meta device, in evaluation mode, for a rank's share of the intermediate sizes."""
    config = configuration(spec, columns)
    config._experts_implementation = backend
    return block_class(spec)(config, shared_columns)


def block_class(spec: MoESpec) -> Callable[[Any, int], nn.Module]:
    """Makes the family's block on the meta device from a configuration and the width of the shared expert.

    The shared expert's class takes its width; the block would derive one that a rank's share may not be a multiple of.
    """
    family = served_family(spec)
    modeling = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")

    def make(config: Any, shared_columns: int) -> nn.Module:
        with torch.device("meta"):
            block = getattr(modeling, family.block)(config)
            if family.shared is not None:
                shared = type(block.get_submodule(family.shared))
                setattr(block, family.shared, shared(config, intermediate_size=shared_columns))
        return block.eval()

    return make


def configuration(spec: MoESpec, columns: int) -> Any:
    """Of the family, for one layer of these sizes."""
    family = served_family(spec)
    module = importlib.import_module(f"transformers.models.{family.module}.configuration_{family.module}")
    return getattr(module, family.config)(**family.options(spec, columns))


@cache
def logits_gate(spec: MoESpec) -> nn.Module:
    """The same router for tokens that are logits: with the identity as its weight, it goes on from the logits."""
    family = served_family(spec)
    config = copy.copy(configuration(spec, spec.intermediate_size))
    config.hidden_size = spec.num_experts
    gate = type(build(spec, spec.intermediate_size, 1, "eager").get_submodule(family.gate))
    with torch.device("meta"):
        return gate(config).eval()
