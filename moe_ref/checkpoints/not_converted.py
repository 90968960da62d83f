"""Which modules a configuration leaves in their own dtype: every tool has a rule of its own for the names it lists."""

import re
from collections.abc import Sequence


def by_transformers(listed: Sequence[str] | None, module: str) -> bool:
    """Patterns from the name's start to a dot or its end, or an end of it (transformers 5.23 quantizers_utils.py)."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{one}){boundary}", module) or module.endswith(one) for one in listed or ())


def by_awq(listed: Sequence[str] | None, module: str) -> bool:
    """Any part of the name (autoawq 0.2.9 models/base.py)."""
    return any(one in module for one in listed or ())


def by_compressed_tensors(listed: Sequence[str] | None, module: str) -> bool:
    """The whole name, or behind re: a pattern from its start (compressed-tensors utils/match.py)."""
    return any(re.match(one[3:], module) if one.startswith("re:") else module == one for one in listed or ())


def by_gptq(rules: Sequence[str], module: str) -> bool:
    """The first key of "dynamic" that matches from the name's start: behind -: left out, else converted in another way
    than the rest (GPTQModel 7.7 quantization/config.py)."""
    return any(re.match(rule.removeprefix("-:").removeprefix("+:"), module) for rule in rules)
