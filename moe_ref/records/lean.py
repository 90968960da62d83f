"""A case line in little memory: equal parts are held once, and a passing case leaves out what no page shows of it."""

from collections.abc import Hashable
from sys import intern
from typing import Any

import msgspec

from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine, Implementation, StageResult

_NO_NUMBERS: list[int] = []
"""Shared: lines are never changed."""


class Sharing:
    """Makes lines lean; what two of them have in common is one object then."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def lean(self, line: CaseLine) -> CaseLine:
        """The same line; of a passing one without message, guard, mutants and semantic."""
        shared = {"run": intern(line.run), "purpose": intern(line.purpose), "ranks": intern(line.ranks),
                  "device": intern(line.device), "verdict": intern(line.verdict), "reason": intern(line.reason),
                  "implementation": self._implementation(line.implementation),
                  "numerics": self._words(line.numerics), "batches": self._words(line.batches),
                  "stages": [_lean_stage(stage) for stage in line.stages]}
        if line.verdict == Verdict.PASS:
            shared |= {"message": "", "guard": _NO_WORDS, "mutants": _NO_WORDS, "semantic": _NO_NUMBERS}
        return msgspec.structs.replace(line, **shared)

    def _implementation(self, implementation: Implementation) -> Implementation:
        return self._known.setdefault(implementation, implementation)

    def _words(self, words: dict[str, str]) -> dict[str, str]:
        return self._known.setdefault(tuple(words.items()), words)


_NO_WORDS: dict[str, Any] = {}


def _lean_stage(stage: StageResult) -> StageResult:
    if stage.num_bad:
        return stage
    return msgspec.structs.replace(
        stage, stage=intern(stage.stage), note=intern(stage.note), bad_tokens=stage.bad_tokens or _NO_NUMBERS,
        bad_experts=stage.bad_experts or _NO_NUMBERS, bad_ranks=stage.bad_ranks or _NO_NUMBERS,
        bad_tiles=stage.bad_tiles or _NO_NUMBERS, statistics=stage.statistics or _NO_NUMBERS)
