"""Subjects made of blocks of transformers: with moe_fast as its experts implementation, and with planted mistakes.

Not importable without transformers.
"""

from dataclasses import replace
from typing import Any

import moe_fast
from moe_ref.adapters.experts_interface import register
from moe_ref.adapters.transformers_blocks import plans
from moe_ref.adapters.transformers_blocks.families import FAMILIES
from moe_ref.adapters.transformers_blocks.family import Family
from moe_ref.adapters.transformers_blocks.layer import BlockLayer
from moe_ref.contract.capabilities import Capabilities, Numerics
from moe_ref.contract.vocabulary import Dtype, Format, Stage

register("moe_fast", moe_fast.experts)


def _fast_numerics(family: Family, dtype: Dtype) -> Numerics:
    """The router's roundings of the block, and rows as moe_fast stores them."""
    router = {stage: at for stage, at in family.numerics(dtype, "eager").storage.items()
              if stage in (Stage.LOGITS, Stage.WEIGHTS)}
    fast = moe_fast.CAPABILITIES.numerics[dtype]
    return replace(fast, storage=dict(fast.storage) | router, reduce=Format(dtype.value))


def _fast_capabilities() -> Capabilities:
    """Blocks without a shared expert, which would be torch's."""
    first, *others = (replace(family.capabilities("moe_fast in transformers", "1", "eager"),
                              numerics={dtype: _fast_numerics(family, dtype) for dtype in Dtype})
                      for family in FAMILIES if family.module in ("mixtral", "olmoe", "gpt_oss"))
    return replace(first, others=tuple(others))


FAST: Any = BlockLayer(_fast_capabilities(), "moe_fast")  # type: ignore[arg-type]


class ColumnsCutThrough(plans.PlanLayer):
    """Its plan cuts the packed gate and up as one matrix: the first rank gets nothing but gates."""

    def moe(self, *arguments: Any, **options: Any) -> Any:
        right = plans.apply_tensor_parallelism

        def wrong(model: Any, mesh: Any, plan: dict[str, str]) -> Any:
            return right(model, mesh, {name: "colwise" if rule == "packed_colwise" else rule
                                       for name, rule in plan.items()})

        plans.apply_tensor_parallelism = wrong
        try:
            return super().moe(*arguments, **options)
        finally:
            plans.apply_tensor_parallelism = right


CUT_THROUGH = ColumnsCutThrough(plans.TP_PLAN.CAPABILITIES, "tp")
