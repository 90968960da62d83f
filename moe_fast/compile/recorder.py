"""The launches of one layer, forward and backward, as a GPU would see them: recorded on meta tensors, none is run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from moe_fast import fp8_training
from moe_fast.architecture import assuming
from moe_fast.compile.parameters import META, parameters
from moe_fast.launch import recording
from moe_fast.layer import moe
from moe_ref.contract.case import Case
from moe_ref.contract.comm import Groups
from moe_ref.contract.dtypes import TORCH_DTYPES
from moe_ref.contract.vocabulary import Direction, Scheme

_GPU = torch._C.DispatchKey.CUDA


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: its arguments by name, tensors on meta, and the compiler's options among them."""

    kernel: triton.JITFunction
    arguments: dict[str, object]


def record(case: Case, architecture: str, in_fp8: bool = False) -> list[Launch]:
    """Every launch of rank 0 of `case` on that architecture, in order, its gradients too where it asks for them.

    Sizes, strides, offsets and dtypes are those of a real call, so what the compiler derives from them is too; tokens
    that travel between ep ranks are left out, as their number is only known to a device that ran. in_fp8: of a layer
    that trains in 8 bits.
    """
    launches: list[Launch] = []
    problem, weights = case.problem, parameters(case)
    if in_fp8:
        weights = fp8_training.in_fp8(weights)
    x_TH = torch.empty(problem.num_tokens, problem.spec.hidden_size, dtype=TORCH_DTYPES[problem.dtype], device=META,
                       requires_grad=problem.scheme is Scheme.PLAIN)
    groups = Groups(tp=_MetaComm(case.parallel.tp), ep=_MetaComm(case.parallel.ep))
    recorder = recording(lambda kernel, arguments: launches.append(Launch(kernel, arguments)))
    with assuming(architecture), recorder, _RunOperators():
        y_TH = moe(x_TH, weights, problem.spec, case.parallel, groups)
        if case.direction is Direction.BACKWARD:
            y_TH.backward(torch.empty_like(y_TH))
    return launches


class _RunOperators(TorchDispatchMode):
    """moe_fast's operators do on meta tensors what they do on a GPU, where meta alone would run their fakes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "moe_fast":
            return func(*args, **(kwargs or {}))
        kernel = torch.library.get_kernel(func, _GPU)
        return kernel.call_boxed(torch._C.DispatchKeySet(_GPU), *args, **(kwargs or {}))


@dataclass(frozen=True)
class _MetaComm:
    """Rank 0 of a group of `size`: shapes of what collectives would bring."""

    size: int
    rank: int = 0
    device: torch.device = META

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [torch.empty_like(tensor) for _ in range(self.size)]

    def reduce_scatter(self, tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return tensor.new_empty(rows[self.rank], *tensor.shape[1:])

    def all_to_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.empty_like(tensors[self.rank]) for _ in range(self.size)]

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor)
