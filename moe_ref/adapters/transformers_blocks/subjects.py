"""The implementations `transformers.eager`, `transformers.grouped_mm` and `transformers.batched_mm`."""

from dataclasses import replace

import transformers

from moe_ref.adapters.transformers_blocks.families import FAMILIES
from moe_ref.adapters.transformers_blocks.family import Backend
from moe_ref.adapters.transformers_blocks.layer import BlockLayer


def _layer(backend: Backend) -> BlockLayer:
    """One declaration per block, since each rounds in its own way."""
    name = f"transformers.{backend}"
    first, *others = (family.capabilities(name, transformers.__version__, backend)
                      for family in FAMILIES if backend in family.backends)
    return BlockLayer(replace(first, others=tuple(others)), backend)


EAGER, GROUPED_MM, BATCHED_MM = _layer("eager"), _layer("grouped_mm"), _layer("batched_mm")
