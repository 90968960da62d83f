"""What a rank does with a case: makes its inputs, calls the subject under guard, and checks what came back."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import CommCall, CountingComm, Groups
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.routing import Routing
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Direction, Schedule, Scheme, Stage, Storage
from moe_ref.contract.weights import MoEWeights
from moe_ref.inputs.build import Inputs, build_inputs, cut_tokens, output_gradient
from moe_ref.inputs.shards import build_encoded_shards, build_shards
from moe_ref.inputs.storage import padded
from moe_ref.verify.child.changed import changed, precedes
from moe_ref.verify.child.gradient_call import call_with_gradients
from moe_ref.verify.child.guard import Fenced, fingerprint, poison
from moe_ref.verify.child.messages import RankReport, RankTensors, Request
from moe_ref.verify.child.surroundings import Surroundings


class Job:
    """One case with its inputs; `run_rank` is what every rank does, whatever ranks are."""

    def __init__(self, subject: ModuleType, request: Request, tell: Callable[[str], None] = lambda text: None,
                 device: torch.device | None = None, rank: int | None = None,
                 surroundings: Surroundings | None = None) -> None:
        self.subject, self.request, self.tell, self.surroundings = subject, request, tell, surroundings
        self.case: Case = parse_case(request.case)
        self.inputs: Inputs = build_inputs(self.case.problem)
        self.shares = rank_shares(self.case)
        # A process rank makes its own weights only.
        ranks = range(self.case.parallel.size) if rank is None else [rank]
        problem, parallel, only = self.case.problem, self.case.parallel, frozenset(ranks)
        made: Sequence[MoEWeights | QuantisedWeights]
        if problem.scheme is Scheme.PLAIN:
            made = build_shards(problem, parallel, device or request.device, self._tell_expert, self.case.storage,
                                only=only)
        else:
            made = build_encoded_shards(problem, parallel, device or request.device, self._tell_expert, only=only)
        self.shards: dict[int, MoEWeights | QuantisedWeights] = dict(zip(ranks, made, strict=True))

    def _tell_expert(self, expert: int) -> None:
        self.tell(f"weights of expert {expert + 1} of {self.case.problem.spec.num_experts}")

    @property
    def changed_call(self) -> int | None:
        """The run before which there is a call with other inputs."""
        return precedes(self.request.case, self.request.runs)

    def run_rank(self, groups: Groups, device: torch.device, run: int, token_T: torch.Tensor | None = None,
                 is_changed: bool = False, is_traced: bool = True) -> tuple[RankTensors, RankReport, list[str]]:
        """Tensors shown, calls made, and the names of inputs that changed; token_T: the batch, if it is another one.

        is_changed: the call with other inputs that precedes the run. is_traced: whether the subject is given a trace.
        """
        with self.surroundings.kept() if self.surroundings else nullcontext():
            return self._run_rank(groups, device, run, token_T, is_changed, is_traced)

    def _run_rank(self, groups: Groups, device: torch.device, run: int, token_T: torch.Tensor | None,
                  is_changed: bool, is_traced: bool) -> tuple[RankTensors, RankReport, list[str]]:
        self.tell(f"{'other inputs before ' if is_changed else ''}run {run + 1} of {self.request.runs}, "
                  f"rank {groups.rank + 1} of {self.case.parallel.size}")
        weights = self.shards[groups.rank]
        if weights.device != device:
            weights = weights.to(device)
        cut = cut_tokens(self.inputs, self.shares[groups.rank].tokens)
        if token_T is not None:
            cut = {name: None if tensor is None else tensor[token_T] for name, tensor in cut.items()}
        if is_changed:
            cut = changed(cut, run)
        x_TH = cut["x_TH"]
        if self.case.parallel.schedule is Schedule.GATHER and self.shares[groups.rank].tp_rank > 0 and x_TH is not None:
            cut["x_TH"] = -x_TH  # the tokens of rank 0 are broadcast: others must not be used
        given = {name: tensor for name, tensor in cut.items() if tensor is not None}
        fences: dict[str, Fenced] = {}
        if self.case.storage is Storage.PADDED:
            given = {name: padded(tensor.to(device)) for name, tensor in given.items()}
        else:
            fences = {name: Fenced(groups.rank, name, tensor, device) for name, tensor in given.items()}
            given = {name: one.tensor for name, one in fences.items()}
        handed = {name: given.get(name) for name in cut}
        watched = [*((n, t) for n, t in handed.items() if t is not None), *weights.named_tensors()]
        before = {name: (fingerprint(tensor), tensor._version) for name, tensor in watched}
        calls: list[CommCall] = []
        counting = Groups(tp=CountingComm(groups.tp, calls, "tp"), ep=CountingComm(groups.ep, calls, "ep"))
        trace = Trace()
        with self._lent(), poison(run):
            output = self.subject.moe(handed["x_TH"], weights, self.case.problem.spec, self.case.parallel,
                                      counting, trace=trace if is_traced else None, **options(handed))
        shown = self._shown(output, trace)
        gradients: RankTensors = {}
        if self.case.direction is Direction.BACKWARD and is_traced:
            with self._lent(), poison(run):
                gradients = self._gradients(handed, weights, groups)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        made = [(f"{call.group}.{call.operation}", call.num_elements, call.num_bytes) for call in calls]
        left = list(self.surroundings.left) if self.surroundings else []
        return {**shown, **gradients}, RankReport(calls=made, left=left), _changed(watched, before, fences)

    def _lent(self) -> AbstractContextManager:
        return self.surroundings.lent() if self.surroundings else nullcontext()

    def _shown(self, output: object, trace: Trace) -> RankTensors:
        """Copies of what came back: a subject may hand out the same buffers again in its next call."""
        spec, shown = self.case.problem.spec, {}
        widths = (spec.hidden_size, 2 * spec.intermediate_size, spec.num_choices)
        most = _SLACK * max(1, len(self.inputs.x_TH)) * spec.top_k * max(widths)
        for stage, tensor in [*trace.tensors.items(), (Stage.REDUCED, output)]:
            if not isinstance(stage, Stage):
                raise StructError(f"trace holds {str(stage)[:40]!r}, but should hold stages only")
            name = "output" if stage is Stage.REDUCED else stage
            shown[stage] = _plain(name, tensor, most)
        return shown

    def _gradients(self, handed: dict[str, torch.Tensor | None], weights: MoEWeights | QuantisedWeights,
                   groups: Groups) -> RankTensors:
        """Of all that this rank is handed; collectives are not counted, since no schedule says what they should be."""
        assert handed["x_TH"] is not None
        assert isinstance(weights, MoEWeights)  # a case of encoded weights has no backward direction
        grad_y_TH = output_gradient(self.case.problem)[slice(*self.shares[groups.rank].tokens)]
        # A call with other inputs may have fewer tokens, or two for one.
        grad_y_TH = grad_y_TH[torch.arange(len(handed["x_TH"])) % max(len(grad_y_TH), 1)]
        found = call_with_gradients(self.subject, self.case, handed, weights, grad_y_TH.to(weights.w2_EHI.device),
                                    groups)
        if found is None:
            raise StructError("output: no gradient, but should have one, since the backward direction is declared")
        gradients, missing = found
        if missing:
            raise StructError(f"{', '.join(missing)}: None, but should be a gradient, zeros where no row arrived")
        return {stage: _plain(stage, gradient, math.inf) for stage, gradient in gradients.items()}


def _changed(watched: list[tuple[str, torch.Tensor]], before: dict[str, tuple[tuple[int, int], int]],
             fences: dict[str, Fenced]) -> list[str]:
    """Names of inputs that are not what they were, in words where their bits are."""
    changed = []
    for name, tensor in watched:
        bits, version = before[name]
        if fingerprint(tensor) != bits:
            changed.append(name)
        elif name in fences and fences[name].broken():
            changed.append(f"{name} (memory beside it)")
        elif tensor._version != version:
            changed.append(f"{name} (for a time)")
    return changed


def options(handed: Mapping[str, torch.Tensor | None]) -> dict[str, Routing | torch.Tensor | None]:
    """Of what cut_tokens hands to a rank, the arguments by keyword; a routing only where one is injected."""
    given: dict[str, Routing | torch.Tensor | None] = {name: handed[name] for name in ("logits_TE", "residual_TH")}
    ids_TK, weights_TK = handed.get("ids_TK"), handed.get("weights_TK")
    return given if ids_TK is None or weights_TK is None else given | {"routing": Routing(ids_TK, weights_TK)}


class StructError(TypeError):
    """What a subject gave back is not a plain tensor."""


_REAL_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                          torch.int16, torch.int8, torch.uint8, torch.bool})
_SLACK = 16
"""Rows may come padded; how far a stage is off is for the comparison to say, unless it is too much to send."""


def _plain(name: str, value: object, most: float) -> torch.Tensor:
    """A copy of the value, if it is a real dense tensor of a size that a stage may have; raises StructError."""
    if not isinstance(value, torch.Tensor):
        raise StructError(f"{name}: {type(value).__name__}, but should be a torch.Tensor")
    layout = "nested" if value.is_nested else value.layout
    if layout is not torch.strided or value.device.type == "meta" or value.dtype not in _REAL_DTYPES:
        raise StructError(f"{name}: {layout}, {value.dtype} on {value.device}, but should be a real dense tensor")
    if value.numel() > most:
        raise StructError(f"{name}: {value.numel()} elements, but should be those of a stage, and none of this layer "
                          f"has more than {most}")
    copy = value.detach().clone()
    # Parameters and results of collectives that are under way become plain tensors here.
    if type(copy) is not torch.Tensor:
        raise StructError(f"{name}: {type(copy).__name__}, but should be a torch.Tensor")
    return copy
