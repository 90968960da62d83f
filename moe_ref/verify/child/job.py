"""What a rank does with a case: makes its inputs, calls the subject under guard, and checks what came back."""

from collections.abc import Callable, Mapping
from types import ModuleType

import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import CommCall, CountingComm, Groups
from moe_ref.contract.routing import Routing
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Direction, Schedule, Stage
from moe_ref.contract.weights import MoEWeights
from moe_ref.inputs.build import Inputs, build_inputs, build_shards, cut_tokens, output_gradient
from moe_ref.verify.child.changed import changed, precedes
from moe_ref.verify.child.gradient_call import call_with_gradients
from moe_ref.verify.child.guard import fingerprint, poison
from moe_ref.verify.child.messages import RankReport, RankTensors, Request


class Job:
    """One case with its inputs; `run_rank` is what every rank does, whatever ranks are."""

    def __init__(self, subject: ModuleType, request: Request, tell: Callable[[str], None] = lambda text: None,
                 device: torch.device | None = None, rank: int | None = None) -> None:
        self.subject, self.request, self.tell = subject, request, tell
        self.case: Case = parse_case(request.case)
        self.inputs: Inputs = build_inputs(self.case.problem)
        self.shares = rank_shares(self.case)
        # A process rank makes its own weights only.
        ranks = range(self.case.parallel.size) if rank is None else [rank]
        made = build_shards(self.case.problem, self.case.parallel, device or request.device, self._tell_expert,
                            self.case.storage, only=frozenset(ranks))
        self.shards: dict[int, MoEWeights] = dict(zip(ranks, made, strict=True))

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
        self.tell(f"{'other inputs before ' if is_changed else ''}run {run + 1} of {self.request.runs}, "
                  f"rank {groups.rank + 1} of {self.case.parallel.size}")
        weights = self.shards[groups.rank]
        if weights.w2_EHI.device != device:
            weights = MoEWeights(**{name: tensor.to(device) for name, tensor in weights.named_tensors()})
        handed = {name: None if tensor is None else tensor.to(device, copy=True)
                  for name, tensor in cut_tokens(self.inputs, self.shares[groups.rank].tokens).items()}
        if token_T is not None:
            handed = {name: None if tensor is None else tensor[token_T] for name, tensor in handed.items()}
        if is_changed:
            handed = changed(handed, run)
        x_TH = handed["x_TH"]
        if self.case.parallel.schedule is Schedule.GATHER and self.shares[groups.rank].tp_rank > 0 and x_TH is not None:
            handed["x_TH"] = -x_TH  # the tokens of rank 0 are broadcast: others must not be used
        watched = [*((n, t) for n, t in handed.items() if t is not None), *weights.named_tensors()]
        before = {name: fingerprint(tensor) for name, tensor in watched}
        calls: list[CommCall] = []
        counting = Groups(tp=CountingComm(groups.tp, calls, "tp"), ep=CountingComm(groups.ep, calls, "ep"))
        trace = Trace()
        with poison(run):
            output = self.subject.moe(handed["x_TH"], weights, self.case.problem.spec, self.case.parallel,
                                      counting, trace=trace if is_traced else None, **options(handed))
        _check_tensor("output", output)
        for stage, tensor in trace.tensors.items():
            if not isinstance(stage, Stage):
                raise StructError(f"trace holds {stage!r}, but should hold stages only")
            _check_tensor(stage, tensor)
        # A copy: a subject may hand out the same buffer again in its next call.
        output = output.detach().clone()
        gradients: RankTensors = {}
        if self.case.direction is Direction.BACKWARD and is_traced:
            with poison(run):
                gradients = self._gradients(handed, weights, groups)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        touched = [name for name, tensor in watched if fingerprint(tensor) != before[name]]
        made = [(f"{call.group}.{call.operation}", call.num_elements, call.num_bytes) for call in calls]
        return {**trace.tensors, Stage.REDUCED: output, **gradients}, RankReport(calls=made), touched

    def _gradients(self, handed: dict[str, torch.Tensor | None], weights: MoEWeights, groups: Groups) -> RankTensors:
        """Of all that this rank is handed; collectives are not counted, since no schedule says what they should be."""
        assert handed["x_TH"] is not None
        grad_y_TH = output_gradient(self.case.problem)[slice(*self.shares[groups.rank].tokens)]
        # A call with other inputs may have fewer tokens, or two for one.
        grad_y_TH = grad_y_TH[torch.arange(len(handed["x_TH"])) % max(len(grad_y_TH), 1)]
        gradients = call_with_gradients(self.subject, self.case, handed, weights,
                                        grad_y_TH.to(weights.w2_EHI.device), groups)
        if gradients is None:
            raise StructError("output: no gradient, but should have one, since the backward direction is declared")
        for stage, gradient in gradients.items():
            _check_tensor(stage, gradient)
        return gradients


def options(handed: Mapping[str, torch.Tensor | None]) -> dict[str, Routing | torch.Tensor | None]:
    """Of what cut_tokens hands to a rank, the arguments by keyword; a routing only where one is injected."""
    given: dict[str, Routing | torch.Tensor | None] = {name: handed[name] for name in ("logits_TE", "residual_TH")}
    ids_TK, weights_TK = handed.get("ids_TK"), handed.get("weights_TK")
    return given if ids_TK is None or weights_TK is None else given | {"routing": Routing(ids_TK, weights_TK)}


class StructError(TypeError):
    """What a subject gave back is not a plain tensor."""


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise StructError(f"{name}: {type(value).__name__}, but should be a torch.Tensor")
    if value.layout is not torch.strided or value.device.type == "meta" or value.dtype.is_complex:
        raise StructError(f"{name}: {value.layout}, {value.dtype} on {value.device}, but should be a real dense tensor")
