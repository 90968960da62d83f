"""A problem's tokens, weights, logits and residual; sharding cuts them, nothing is redrawn."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from moe_ref.contract.case import Problem
from moe_ref.contract.case_id import format_problem
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.parallel import Range
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Data, Dtype, Scheme
from moe_ref.contract.weights import (
    ExpertWeights,
    parameter_shapes,
)
from moe_ref.inputs.encoded import encoded_matrix, input_scale
from moe_ref.inputs.exact import exact_expert, exact_residual, exact_routing, exact_tokens
from moe_ref.inputs.patterns import pattern_logits, pattern_selection_bias
from moe_ref.inputs.philox import grid_tensor

TOKEN_AMPLITUDE = WEIGHT_AMPLITUDE = 4.0
BIAS_AMPLITUDE = 1.0
ENCODED_AMPLITUDE = 1.0
LARGE_FACTOR = 8.0
OUTLIER_EVERY, OUTLIER_FACTOR, OUTLIER_DAMPING = 64, 64.0, 0.125


def inverse_root(size: int) -> float:
    """The largest 2^-j with 4^j >= size: a power of two in (1 / (2 sqrt(size)), 1 / sqrt(size)]."""
    exponent = 0
    while 4**exponent < size:
        exponent += 1
    return 2.0**-exponent


class EncodedExpert(NamedTuple):
    """One expert's encoded w13 (G, I, H) and w2 (H, I), the fixed scales of the rows they take, and plain biases."""

    w13: Encoded
    w2: Encoded
    w13_input_scale: torch.Tensor
    w2_input_scale: torch.Tensor
    w13_bias_GI: torch.Tensor | None = None
    w2_bias_H: torch.Tensor | None = None


@dataclass(frozen=True)
class GeneratedWeights:
    """Unsharded weights of a problem, made expert by expert when asked for; at most one expert is held.

    In [-a, a) with a = WEIGHT_AMPLITUDE * inverse_root(fan in), so that pre-activations and logits have a standard
    deviation between 0.9 and 1.8, where activations differ from each other and gate from up; 8 times less
    where outlier data comes in, whose tokens are larger. Gate and up weights of large data are 8 times larger.
    """

    problem: Problem

    @cached_property
    def _name(self) -> str:
        return format_problem(self.problem)

    def _draw(self, name: str, shape: tuple[int, ...], index: int = 0, damped: bool = False,
              factor: float = 1.0) -> torch.Tensor:
        amplitude = WEIGHT_AMPLITUDE * inverse_root(shape[-1]) * factor
        if damped and self.problem.data is Data.OUTLIER:
            amplitude *= OUTLIER_DAMPING
        return grid_tensor(self._name, name, shape, self.problem.dtype, amplitude, index)

    def _small(self, name: str, amplitude: float, dtype: Dtype | None = None) -> torch.Tensor | None:
        """A parameter that is no matrix, in [-amplitude, amplitude); None where the layer has none of that name."""
        shape = parameter_shapes(self.problem.spec).get(name)
        if shape is None:
            return None
        return grid_tensor(self._name, name.rpartition("_")[0], shape, dtype or self.problem.dtype, amplitude)

    def _mlp(self, prefix: str, mlp: MLP, intermediate_size: int, index: int) -> ExpertWeights:
        problem, hidden = self.problem, self.problem.spec.hidden_size
        if problem.data is Data.EXACT:
            return exact_expert(problem, prefix, mlp, intermediate_size, index)
        projections, factor = mlp.num_projections, LARGE_FACTOR if problem.data is Data.LARGE else 1.0
        matrices = (self._draw(prefix + "w13", (projections, intermediate_size, hidden), index, True, factor),
                    self._draw(prefix + "w2", (hidden, intermediate_size), index))
        return ExpertWeights(*matrices, *self._biases(prefix, mlp, intermediate_size, index))

    def _biases(self, prefix: str, mlp: MLP, intermediate_size: int, index: int) -> tuple[torch.Tensor, ...]:
        """Of w13 and w2; none where the MLP has none."""
        if not mlp.bias:
            return ()
        shapes = {"w13_bias": (mlp.num_projections, intermediate_size), "w2_bias": (self.problem.spec.hidden_size,)}
        return tuple(grid_tensor(self._name, prefix + bias, shape, self.problem.dtype, BIAS_AMPLITUDE, index)
                     for bias, shape in shapes.items())

    def encoded_expert(self, e: int) -> EncodedExpert:
        """Expert e of a scheme, drawn anew at every call; inputs decode nothing."""
        return self._encoded_mlp("", self.problem.spec.experts, self.problem.spec.intermediate_size, e)

    def encoded_shared_expert(self) -> EncodedExpert | None:
        """The shared expert of a scheme, or None."""
        shared = self.problem.spec.shared
        return self._encoded_mlp("shared_", shared.mlp, shared.intermediate_size, 0) if shared else None

    def _encoded_mlp(self, prefix: str, mlp: MLP, intermediate_size: int, index: int) -> EncodedExpert:
        problem, hidden = self.problem, self.problem.spec.hidden_size
        factor = LARGE_FACTOR if problem.data is Data.LARGE else 1.0
        damped = OUTLIER_DAMPING if problem.data is Data.OUTLIER else 1.0
        shapes = {"w13": (mlp.num_projections, intermediate_size, hidden), "w2": (hidden, intermediate_size)}
        amplitudes = {"w13": factor * damped, "w2": 1.0}
        w13, w2 = (encoded_matrix(self._name, prefix + name, problem.scheme, problem.dtype, problem.data, shape,
                                  ENCODED_AMPLITUDE * inverse_root(shape[-1]) * amplitudes[name], index)
                   for name, shape in shapes.items())
        return EncodedExpert(w13, w2, *self.input_scales(index), *self._biases(prefix, mlp, intermediate_size, index))

    def input_scales(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The fixed scales of the rows that w13 and w2 of an expert take, where a scheme has them; shared: index 0."""
        # An activation is a product of two that are larger by the factor of large data.
        factor = LARGE_FACTOR if self.problem.data is Data.LARGE else 1.0
        return input_scale(index, 1.0), input_scale(index + 3, 4.0 * factor**2)

    def expert(self, e: int) -> ExpertWeights:
        """Expert e, drawn anew at every call; of a scheme encoded_expert has it."""
        assert self.problem.scheme is Scheme.PLAIN
        return self._mlp("", self.problem.spec.experts, self.problem.spec.intermediate_size, e)

    def shared_expert(self) -> ExpertWeights | None:
        """The shared expert, or None."""
        assert self.problem.scheme is Scheme.PLAIN
        shared = self.problem.spec.shared
        return self._mlp("shared_", shared.mlp, shared.intermediate_size, 0) if shared else None

    @cached_property
    def router_EH(self) -> torch.Tensor | None:
        spec = self.problem.spec
        if spec.router is None:
            return None
        return self._draw("router", (spec.num_choices, spec.hidden_size), damped=True)

    @cached_property
    def router_bias_E(self) -> torch.Tensor | None:
        return self._small("router_bias_E", BIAS_AMPLITUDE)

    @cached_property
    def selection_bias_E(self) -> torch.Tensor | None:
        """fp32, in [-0.5, 0.5): negative selection scores occur."""
        drawn = self._small("selection_bias_E", 0.5, Dtype.FP32)
        return None if drawn is None else pattern_selection_bias(self.problem, drawn)

    @cached_property
    def weight_scale_E(self) -> torch.Tensor | None:
        """fp32, in [0.5, 1.5)."""
        drawn = self._small("weight_scale_E", 0.5, Dtype.FP32)
        return None if drawn is None else 1.0 + drawn

    @cached_property
    def shared_gate_SH(self) -> torch.Tensor | None:
        spec = self.problem.spec
        if spec.shared is None or spec.shared.num_gates == 0:
            return None
        return self._draw("shared_gate", (spec.shared.num_gates, spec.hidden_size), damped=True)

    @cached_property
    def output_bias_H(self) -> torch.Tensor | None:
        return self._small("output_bias_H", BIAS_AMPLITUDE)


@dataclass(frozen=True)
class Inputs:
    """What a layer is called with, unsharded: x_TH; injected logits_TE (fp32), residual_TH, routing, or None."""

    problem: Problem
    x_TH: torch.Tensor
    logits_TE: torch.Tensor | None
    residual_TH: torch.Tensor | None
    weights: GeneratedWeights
    routing: Routing | None = None

    def digest(self) -> str:
        """16 hex digits over the bits of tokens, logits, residual, routing and the first expert."""
        injected = (self.routing.ids_TK, self.routing.weights_TK) if self.routing else ()
        hasher = hashlib.sha256()
        for tensor in (self.x_TH, self.logits_TE, self.residual_TH, *injected, *self._first_expert()):
            if tensor is not None:
                hasher.update(tensor.reshape(-1).clone().view(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()[:16]

    def _first_expert(self) -> list[torch.Tensor]:
        """What of it tells whether weights are the same: first rows, or all codes and scales."""
        if self.problem.scheme is Scheme.PLAIN:
            expert = self.weights.expert(0)
            return [expert.w13_GIH[:, :1], expert.w2_HI[:1]]
        encoded = self.weights.encoded_expert(0)
        return [tensor for matrix in encoded[:2] for tensor in matrix.tensors.values()]


def build_inputs(problem: Problem) -> Inputs:
    """The inputs of `problem`, on the CPU."""
    if problem.data is Data.EXACT:
        return Inputs(problem, exact_tokens(problem), None, exact_residual(problem) if problem.residual else None,
                      GeneratedWeights(problem), exact_routing(problem))
    shape, name = (problem.num_tokens, problem.spec.hidden_size), format_problem(problem)
    x_TH = grid_tensor(name, "x", shape, problem.dtype, TOKEN_AMPLITUDE)
    if problem.data is Data.OUTLIER:
        x_TH[:, 17 % shape[1]::OUTLIER_EVERY] *= OUTLIER_FACTOR
    if problem.data is Data.NON_FINITE:
        x_TH[1:2, 5 % shape[1]] = torch.nan
        x_TH[2:3, 3 % shape[1]] = torch.inf
    residual_TH = grid_tensor(name, "residual", shape, problem.dtype, TOKEN_AMPLITUDE) if problem.residual else None
    return Inputs(problem, x_TH, pattern_logits(problem), residual_TH, GeneratedWeights(problem))


def output_gradient(problem: Problem) -> torch.Tensor:
    """Gradient of the output, (T, H), that a backward pass of `problem` starts from, on the CPU."""
    shape = (problem.num_tokens, problem.spec.hidden_size)
    return grid_tensor(format_problem(problem), "grad_y", shape, problem.dtype, TOKEN_AMPLITUDE)


def cut_tokens(inputs: Inputs, tokens: Range) -> dict[str, torch.Tensor | None]:
    """x_TH, logits_TE and residual_TH of the tokens [start, stop), as one rank is handed them.

    With an injected routing its ids_TK and weights_TK too.
    """
    start, stop = tokens
    whole = {"x_TH": inputs.x_TH, "logits_TE": inputs.logits_TE, "residual_TH": inputs.residual_TH}
    if inputs.routing is not None:
        whole |= {"ids_TK": inputs.routing.ids_TK, "weights_TK": inputs.routing.weights_TK}
    return {name: None if tensor is None else tensor[start:stop] for name, tensor in whole.items()}
