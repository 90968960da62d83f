"""The router of a layer in fp64, every step a method that a fault replaces; values by moe_ref.oracle.router."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from moe_ref.contract.spec import Router
from moe_ref.contract.vocabulary import Stage
from moe_ref.oracle import router as routing
from moe_ref.verify.diagnosis.known import ORDER, Known
from moe_ref.verify.diagnosis.placed import one_hot


class RouterSteps:
    """The right layer. Stages are tensors of the whole layer as in `placed`, P ranks of the grid.

    What the subject showed before the failing stage stands for the stage itself; what comes before `first`, the first
    stage that a fault changes, is the right layer's. words: the fault as a message names it, behind its number in the
    catalogue of defects where it has one. local: it may hold for some experts, or some rows, only. in_tiles: also for
    some columns of them only. variant: one of several forms of the same fault.
    """

    words: ClassVar[str] = ""
    first: ClassVar[Stage] = Stage.LOGITS
    local: ClassVar[Literal["", "expert", "row"]] = ""
    in_tiles: ClassVar[bool] = False

    def __init__(self, known: Known, right: "RouterSteps | None" = None, variant: Any = None) -> None:
        self.known, self.right, self.variant = known, right, variant
        self.case, self.inputs, self.shares = known.case, known.inputs, known.shares
        self.spec, self.parallel = known.case.problem.spec, known.case.parallel
        self.x_TH = known.inputs.x_TH.double()
        self.stages: dict[Stage, torch.Tensor] = dict(known.given)

    @classmethod
    def variants(cls, known: Known) -> Iterable[Any]:
        """The forms in which a case can have the fault; none where it cannot."""
        return (None,)

    def stage(self, stage: Stage) -> torch.Tensor:
        """A stage as the layer has it: shown, the right layer's, or computed once."""
        if stage not in self.stages:
            if self.right is not None and ORDER.index(stage) < ORDER.index(self.first):
                self.stages[stage] = self.right.stage(stage)
            else:
                self.stages[stage] = getattr(self, stage)()
        return self.stages[stage]

    def shown(self, stage: Stage) -> torch.Tensor:
        """The same in the shape of `placed`."""
        value = self.stage(stage)
        if stage is Stage.IDS:
            value = one_hot(value, self.spec.num_choices)
        return value.expand(self.parallel.size, *value.shape) if stage in ORDER[:3] else value

    # Router: (T, E + Z) logits, (T, K) ids and weights.

    def logits(self) -> torch.Tensor:
        if self.inputs.logits_TE is not None:
            return self.inputs.logits_TE.double()
        return routing.router_logits(self.tokens(), self.inputs.weights)

    def tokens(self) -> torch.Tensor:
        return self.x_TH

    def router(self, router: Router) -> Router:
        return router

    @cached_property
    def used_router(self) -> Router | None:
        return None if self.spec.router is None else self.router(self.spec.router)

    def chosen(self) -> torch.Tensor:
        """Ids before any are dropped."""
        assert self.used_router is not None
        logits_TE, router = self.stage(Stage.LOGITS), self.used_router
        selection_TE = self.selection(self.score(logits_TE, router), logits_TE, router)
        return self.top(selection_TE, router)

    def score(self, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
        return routing.score(logits_TE, router)

    def selection(self, score_TE: torch.Tensor, logits_TE: torch.Tensor, router: Router) -> torch.Tensor:
        return routing.selection_score(score_TE, logits_TE, self.inputs.weights.selection_bias_E, router)

    def top(self, selection_TE: torch.Tensor, router: Router) -> torch.Tensor:
        return routing.select(selection_TE, router)

    @cached_property
    def routed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Ids, weights, and weights of shared experts that the router gates."""
        if self.inputs.routing is not None:
            return self.inputs.routing.ids_TK, self.inputs.routing.weights_TK.double(), None
        if (router := self.used_router) is None:
            ids_TK = torch.zeros(len(self.x_TH), 1, dtype=torch.int64)
            return ids_TK, ids_TK.double() + 1.0, None
        ids_TK = self.stages.get(Stage.IDS)
        # What is shown of dropped slots, or of tokens that are not numbers, names no expert to weigh.
        if ids_TK is None or not bool(((ids_TK >= 0) & (ids_TK < self.spec.num_choices)).all()):
            ids_TK = self.chosen()
        return self.weigh(self.weight_scores(), ids_TK, router)

    def weight_scores(self) -> torch.Tensor:
        """What weights are made of, (T, E + Z)."""
        assert self.used_router is not None
        return self.score(self.stage(Stage.LOGITS), self.used_router)

    def weigh(self, score_TE: torch.Tensor, ids_TK: torch.Tensor,
              router: Router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        shared_TS = None
        if routing.router_gated(self.spec):
            shared_TS = routing.shared_scores(self.x_TH, self.inputs.weights, router)
        return routing.weigh(score_TE, ids_TK.long(), router, self.learned_scale(), shared_TS)

    def learned_scale(self) -> torch.Tensor | None:
        return self.inputs.weights.weight_scale_E

    def ids(self) -> torch.Tensor:
        return self.routed[0]

    def weights(self) -> torch.Tensor:
        return self.routed[1]
