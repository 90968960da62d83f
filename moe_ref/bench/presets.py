"""Runs that have a name. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preset:
    """models, degrees of tensor parallelism, numbers of tokens, operations; labels: what a number of tokens stands for.
    """

    models: tuple[str, ...]
    tp: tuple[int, ...]
    tokens: tuple[int, ...]
    operations: tuple[str, ...]
    labels: tuple[tuple[int, str], ...] = ()


_BATCHES, _PROMPT = (1, 8, 32, 64), 32

PRESETS = {
    "default": Preset(models=("mixtral.8x7b", "qwen3.30b.a3b", "olmoe.1b.7b"), tp=(1, 8),
                      tokens=tuple(2**power for power in range(15)), operations=("layer", "experts", "backward")),
    "mixtral-founding": Preset(
        models=("mixtral.8x7b",), tp=(4, 8), operations=("layer", "experts"),
        tokens=tuple(sorted({*_BATCHES, *(_PROMPT * batch for batch in _BATCHES)})),
        labels=tuple([(batch, f"decode {batch}") for batch in _BATCHES]
                     + [(_PROMPT * batch, f"prefill {_PROMPT} x {batch}") for batch in _BATCHES])),
    "cpu-quick": Preset(models=("olmoe.1b.7b.E4",), tp=(16,), tokens=(1, 4),
                        operations=("layer", "experts", "backward")),
}
"""mixtral-founding: a layer's share of an end-to-end table, decode steps and prompts of 32 tokens, at a rank's shapes.
cpu-quick: seconds on a CPU, to see that all is in place."""
