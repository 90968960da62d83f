"""The oracle's layer with mistakes of the backward direction, under every form of parallelism; forward it is right.

Gradients are changed on their way out, or the collectives that complete them are left out. In one process only: a child
lets no implementation import the oracle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import moe_ref
from moe_ref.contract.comm import Comm, Groups
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.trace import Trace
from moe_ref.contract.weights import MoEWeights
from tests.subjects.gradients import Change, changed


@dataclass(frozen=True)
class BackwardComm:
    """Passes calls on; once `started`, sums of tensors whose last axis has `width` are left undone."""

    inner: Comm
    width: int
    started: list[bool]

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        skipped = self.started and tensor.dim() > 1 and tensor.shape[-1] == self.width
        return tensor.clone() if skipped else self.inner.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.inner.all_gather(tensor)

    def reduce_scatter(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return self.inner.reduce_scatter(tensor, rows)

    def all_to_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self.inner.all_to_all(tensors)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.inner.broadcast(tensor)


class OracleGradients:
    """The oracle with its gradients, under every form of parallelism; a mistake overrides one of the two methods."""

    CAPABILITIES = replace(moe_ref.CAPABILITIES, schemes={})

    def moe(self, x_TH: torch.Tensor, weights: MoEWeights, spec: MoESpec, parallel: Parallel | None = None,
            groups: Groups | None = None, *, routing: Routing | None = None, logits_TE: torch.Tensor | None = None,
            residual_TH: torch.Tensor | None = None, trace: Trace | None = None) -> torch.Tensor:
        groups = groups or Groups()
        given = {"x_TH": x_TH, "logits_TE": logits_TE, "residual_TH": residual_TH, **dict(weights.named_tensors())}
        handed = {name: changed(tensor, self.change(name, groups)) for name, tensor in given.items()
                  if tensor is not None}
        parameters = MoEWeights(**{name: handed[name] for name, _ in weights.named_tensors()})
        started: list[bool] = []
        y_TH = moe_ref.moe(handed["x_TH"], parameters, spec, parallel, self.backward_groups(groups, spec, started),
                           routing=routing, logits_TE=handed.get("logits_TE"), residual_TH=handed.get("residual_TH"),
                           trace=trace)
        started.append(True)
        return y_TH

    def change(self, name: str, groups: Groups) -> Change:
        """What becomes of the gradient of a tensor before it is returned."""
        return lambda gradient: gradient

    def backward_groups(self, groups: Groups, spec: MoESpec, started: list[bool]) -> Groups:
        """The groups to work with; `started` fills when the forward pass is over."""
        return groups


class _Skipping(OracleGradients):
    """Sums over tp of the gradients whose last axis is `width` of the spec are left out in the backward pass."""

    def backward_groups(self, groups: Groups, spec: MoESpec, started: list[bool]) -> Groups:
        return replace(groups, tp=BackwardComm(groups.tp, self.width(spec), started))

    def width(self, spec: MoESpec) -> int:
        raise NotImplementedError


class TokensNotReduced(_Skipping):
    """The gradient of the tokens is this rank's part; sums as wide as tokens include the router's over tokens."""

    def width(self, spec: MoESpec) -> int:
        return spec.hidden_size


class WeightsNotReduced(_Skipping):
    """The gradient of the routing weights is this rank's part, and with it the router's."""

    def width(self, spec: MoESpec) -> int:
        return spec.top_k


class TokensReducedTwice(OracleGradients):
    """One all-reduce too many of the complete gradient of the tokens."""

    def change(self, name: str, groups: Groups) -> Change:
        return groups.tp.all_reduce if name == "x_TH" else super().change(name, groups)


class TokensTimesRanks(OracleGradients):
    """The gradient of the tokens is multiplied by tp."""

    def change(self, name: str, groups: Groups) -> Change:
        return (lambda gradient: gradient * groups.tp.size) if name == "x_TH" else super().change(name, groups)


class WholeParametersDivided(OracleGradients):
    """Gradients of what every rank holds whole are averaged where they should be complete."""

    def change(self, name: str, groups: Groups) -> Change:
        whole = name in ("router_EH", "shared_gate_SH", "output_bias_H")
        return (lambda gradient: gradient / groups.tp.size) if whole else super().change(name, groups)


class GateAndUpSwapped(OracleGradients):
    """The two halves of w13's gradient change places."""

    def change(self, name: str, groups: Groups) -> Change:
        return (lambda gradient: gradient.flip(1)) if name == "w13_EGIH" else super().change(name, groups)


class EmptyExpertsNotZero(OracleGradients):
    """Gradients of experts without rows are whatever was in memory."""

    def change(self, name: str, groups: Groups) -> Change:
        def left(gradient: torch.Tensor) -> torch.Tensor:
            empty_E = ~gradient.flatten(1).any(1)
            return gradient + empty_E.view(-1, *[1] * (gradient.dim() - 1)) * 2.0**-20
        return left if name == "w2_EHI" else super().change(name, groups)


class ResidualDropped(OracleGradients):
    """The residual's gradient is lost."""

    def change(self, name: str, groups: Groups) -> Change:
        return torch.zeros_like if name == "residual_TH" else super().change(name, groups)


class SharedGateDropped(OracleGradients):
    """No gradient reaches the shared gate."""

    def change(self, name: str, groups: Groups) -> Change:
        return torch.zeros_like if name == "shared_gate_SH" else super().change(name, groups)


oracle_gradients = OracleGradients()
