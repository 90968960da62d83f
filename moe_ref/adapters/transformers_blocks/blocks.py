"""Blocks of transformers without memory of their own: built once per layer, called with whoever's weights."""

import copy
import importlib
import os
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
    family = served_family(spec)
    home = f"transformers.models.{family.module}"
    config = configuration(spec, columns)
    config._experts_implementation = backend
    modeling = importlib.import_module(f"{home}.modeling_{family.module}")
    with torch.device("meta"):
        block = getattr(modeling, family.block)(config)
        if family.shared is not None:
            # Its class takes the width; the block derives one that a rank's share may not be a multiple of.
            shared = type(block.get_submodule(family.shared))
            setattr(block, family.shared, shared(config, intermediate_size=shared_columns))
    return block.eval()


def configuration(spec: MoESpec, columns: int) -> Any:
    """Of the family, for one layer of these sizes."""
    family = served_family(spec)
    module = importlib.import_module(f"transformers.models.{family.module}.configuration_{family.module}")
    return getattr(module, family.config)(**family.options(spec, columns))


@cache
def logits_gate(spec: MoESpec, columns: int) -> nn.Module:
    """The same router for tokens that are logits: with the identity as its weight, it goes on from the logits."""
    family = served_family(spec)
    config = copy.copy(configuration(spec, columns))
    config.hidden_size = spec.num_experts
    gate = type(build(spec, columns, 1, "eager").get_submodule(family.gate))
    with torch.device("meta"):
        return gate(config).eval()
