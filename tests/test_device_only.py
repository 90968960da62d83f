"""Protects CUDA graphs and overlap: a layer that has run once neither waits for the device nor touches the host.

Recorded on meta tensors, where operators do what they do on a GPU: every one of torch's that is dispatched, forward,
backward and inside of the layer's own, is looked at. Rows that travel between ep ranks are left out: the host has to
know how many.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_fast import layer
from moe_fast.compile.recorder import META, record
from moe_ref.contract.case_id import parse_case

READS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select",
                   "unique_dim", "unique_consecutive", "_unique2", "bincount", "repeat_interleave"})
"""Operators that wait for the device: what they return, or how large it is, depends on numbers there."""
FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)
"""Functions that bring numbers from the host, which waits; on meta they dispatch nothing."""

LAYERS = {
    "v1-T40.H96.I48.E6.K2-bf16-norm-gelu": "experts alone",
    "v1-T9.H48.I24-fp32-sh16-shgate": "dense, with a gated shared expert",
    "v1-T40.H96.I48.E6.K3-bf16-sigmoid-norm-bias-g3.2-sh16-shgate": "groups and a selection bias",
    "v1-T40.H96.I48.E6.K3-fp16-norm-mlpbias-limit0.75-sh16-shgate-shmlpbias-shmean-outbias": "every bias, and a mean",
    "v1-T40.H96.I48.E6.K2-bf16-sigmoid-relu2-nogate-weightinput": "a weight on the input",
    "v1-T40.H96.I48.E6.K2-bf16-norm-cap600": "a capacity",
    "v1-T0.H96.I48.E6.K2-bf16-norm-sh16": "no tokens",
}
FORMS = ("", "-tp2", "-ep3", "-tp2-ep2-split1.3-roundrobin-copy0", "-tp2-ep2-wholeshared", "-tp2-allreducerows",
         "-tp2-ep2-reducescatter", "-tp2-ep3-reducescatter-tokenstp-roundrobin", "-tp2-gather",
         "-tp3-gather-wholeshared")
CASES = [f"{name}{form}-bwd" for name in LAYERS for form in FORMS
         if ("-sh16" in name or "wholeshared" not in form) and (".E" in name or "-ep" not in form)
         and ("-cap" not in name or "tokenstp" not in form)]
ENCODED = [f"v1-T40.H96.I48.E6.K2-bf16-{scheme}-norm-mlpbias-sh16-shgate{form}"
           for scheme in ("int8", "gptqorder32", "awq", "mxfp4", "nvfp4", "fp8tensor", "fp8row", "fp8block", "mxfp8")
           for form in ("", "-tp2-ep2", "-tp2-gather")]


class Watched(TorchDispatchMode):
    """Counts operators, and raises at one that reads numbers or that has a tensor of another device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        assert name not in READS, f"aten.{name} waits for the device"
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, found)):
            if isinstance(one, torch.Tensor):
                assert one.device == META, f"aten.{name} has a tensor on {one.device}"
        return found


class NothingFromHost(TorchFunctionMode):
    """Raises where a tensor is made of numbers that Python has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in FROM_HOST, f"torch.{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


def watch(case_id: str) -> Counter[str]:
    """Operators of one case, forward and backward, after a call that leaves behind what is kept per device."""
    case, watched = parse_case(case_id), Watched()
    record(case, "sm_90")
    with watched, NothingFromHost():
        assert record(case, "sm_90") or not case.problem.num_tokens
    return watched.seen


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("case_id", CASES + ENCODED)
def test_nothing_waits_and_nothing_is_on_the_host(case_id: str) -> None:
    seen = watch(case_id)
    assert seen["empty"] > 0, "nothing was seen, so it proves nothing"


def read(x_TH: torch.Tensor) -> None:
    x_TH.sum().item()


def branch(x_TH: torch.Tensor) -> None:
    if x_TH.sum() > 0:
        raise AssertionError("not reached")


def count(x_TH: torch.Tensor) -> None:
    torch.nonzero(x_TH)


def copy_out(x_TH: torch.Tensor) -> None:
    torch.empty(x_TH.shape, dtype=x_TH.dtype).copy_(x_TH)


def copy_in(x_TH: torch.Tensor) -> None:
    torch.tensor([1.0, 2.0], device=x_TH.device)


def table(x_TH: torch.Tensor) -> None:
    torch.arange(len(x_TH))


@pytest.mark.parametrize("mistake", [read, branch, count, copy_out, copy_in, table])
def test_a_mistake_is_seen(mistake: Callable[[torch.Tensor], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line more, where the layer starts: each of them ends a capture or makes the device wait."""
    agreed_tokens, calls = layer.agreed_tokens, []

    def mistaken(x_TH: torch.Tensor, rank: Any) -> torch.Tensor:
        if calls:  # not in the first call, where tables are made
            mistake(x_TH.detach())
        calls.append(rank)
        return agreed_tokens(x_TH, rank)

    monkeypatch.setattr(layer, "agreed_tokens", mistaken)
    with pytest.raises(AssertionError, match=r"waits for the device|has a tensor on cpu"):
        watch(CASES[0])
