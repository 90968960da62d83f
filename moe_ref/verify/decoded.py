"""Encoded weights of a case as the oracle and its bounds see them: the numbers that a contract multiplies."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.schemes import ENCODINGS
from moe_ref.contract.vocabulary import Format, Scheme
from moe_ref.contract.weights import ExpertWeights
from moe_ref.inputs.build import EncodedExpert, GeneratedWeights, Inputs
from moe_ref.numerics.formats import round_to
from moe_ref.oracle.decode import decode


@dataclass(frozen=True)
class DecodedWeights(GeneratedWeights):
    """Generated codes, decoded exactly and then rounded to the format that a contract declares, one expert at a time.

    What is no matrix of an expert is as generated. stored: that format; None: exact.
    """

    stored: Format | None = None

    def read(self, matrix: Encoded) -> torch.Tensor:
        """A matrix as the contract multiplies it, in fp64."""
        value = decode(matrix)
        return value if self.stored is None else round_to(value, self.stored)

    def _plain(self, expert: EncodedExpert) -> ExpertWeights:
        biases = (None if bias is None else bias.double() for bias in (expert.w13_bias_GI, expert.w2_bias_H))
        return ExpertWeights(self.read(expert.w13), self.read(expert.w2), *biases)

    def expert(self, e: int) -> ExpertWeights:
        """Expert e in fp64, drawn and decoded anew at every call."""
        return self._plain(self.encoded_expert(e))

    def shared_expert(self) -> ExpertWeights | None:
        """The shared expert in fp64, or None."""
        expert = self.encoded_shared_expert()
        return None if expert is None else self._plain(expert)

    @cached_property
    def fixed_scales(self) -> Mapping[tuple[int | None, bool], float]:
        """(expert, or None for the shared one; whether of w13) -> the fixed scale of the rows that it takes."""
        if not ENCODINGS[self.problem.scheme].input_scale:
            return {}
        indices: dict[int | None, int] = {e: e for e in range(self.problem.spec.num_experts)} | {None: 0}
        return {(e, is_first): float(scale) for e, index in indices.items()
                for is_first, scale in zip((True, False), self.input_scales(index), strict=True)}


def decoded_inputs(inputs: Inputs, numerics: Numerics) -> Inputs:
    """The inputs, their weights decoded as the contract multiplies them where they are encoded."""
    if inputs.problem.scheme is Scheme.PLAIN or isinstance(inputs.weights, DecodedWeights):
        return inputs
    return replace(inputs, weights=DecodedWeights(inputs.problem, numerics.decoded))
