"""What the experts allocate is known before: measured on tensors without memory, at the sizes of released models."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fast
from moe_fast import memory
from moe_fast.architecture import assuming
from moe_fast.invariance import batch_invariant
from moe_fast.launch import recording
from moe_fast.operators.arguments import ExpertsArguments
from moe_fast.operators.experts import experts_forward
from moe_fast.operators.fp8_gradients import mlp_gradients_in_fp8
from moe_fast.operators.mlp_gradients import mlp_gradients
from moe_ref.contract.case_id import parse_case
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_shards

LAYERS = {
    # tokens, top-k, experts, hidden, intermediate and shared size of a rank
    "Mixtral 8x7B on 8 ranks, prefill": (4096, 2, 8, 4096, 1792, 0),
    "Mixtral 8x7B on 8 ranks, very long prefill": (262144, 2, 8, 4096, 1792, 0),
    "DeepSeek-V3 on 8 ranks, prefill": (4096, 8, 256, 7168, 256, 256),
    "a wide shared expert": (2048, 1, 8, 1024, 256, 4096),
}


class Peak(TorchDispatchMode):
    """The largest sum of the sizes of tensors made within it that were alive at once; views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made._base is None and not func.is_view:
            size = made.untyped_storage().nbytes()
            self.now += size
            self.largest = max(self.largest, self.now)
            weakref.finalize(made, self._gone, size)
        return made

    def _gone(self, size: int) -> None:
        self.now -= size


def given(num_tokens: int, top_k: int, num_experts: int, hidden: int, intermediate: int,
          shared: int) -> ExpertsArguments:
    """A layer in bf16 that has shapes alone."""
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    beside = (meta(2, shared, hidden), meta(hidden, shared)) if shared else (None, None)
    return ExpertsArguments(
        meta(num_tokens, hidden), meta(num_tokens, top_k, dtype=torch.int32),
        meta(num_tokens, top_k, dtype=torch.float32), meta(num_experts, dtype=torch.int64),
        meta(num_experts, 2, intermediate, hidden),
        meta(num_experts, hidden, intermediate), *beside, None, "silu", "silu")


@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_pass_needs_what_the_formula_says(name: str) -> None:
    """Within 3 %, which are tables of blocks; a very long prefill pays its result, and one chunk."""
    tokens, top_k, _, hidden, intermediate, shared = LAYERS[name]
    arguments = given(*LAYERS[name])
    with assuming("sm_90"), recording(lambda *_: None), Peak() as peak:
        experts_forward(arguments)
    said = memory.forward_bytes(tokens, top_k, hidden, intermediate, 2, shared)
    assert said <= peak.largest < 1.03 * said


@pytest.mark.parametrize("name", [name for name in LAYERS if "long" not in name])
def test_a_backward_pass_needs_what_the_formula_says(name: str) -> None:
    """Within 6 %: parts of sums, and tables."""
    tokens, top_k, num_experts, hidden, intermediate, _ = LAYERS[name]
    arguments = given(*LAYERS[name])
    with assuming("sm_90"), recording(lambda *_: None), Peak() as peak:
        found = mlp_gradients(torch.empty_like(arguments.x_TH), arguments.routed(), None)
    said = memory.backward_bytes(tokens, top_k, num_experts, hidden, intermediate, 2)
    gradient_bytes = tokens * hidden * 2  # that of the result, made here
    assert found.rows_RH.shape == (tokens * top_k, hidden)
    assert said <= peak.largest - gradient_bytes < 1.06 * said


@pytest.mark.parametrize("name", LAYERS)
def test_training_in_8_bits_needs_little_more(name: str) -> None:
    """Forward the codes of weights, and no copy of one in its own dtype; backward a fifth more than in bf16 at most."""
    arguments = given(*LAYERS[name])
    codes = sum(one.numel() for one in (arguments.w13_EGIH, arguments.w2_EHI, arguments.shared_w13_GIH,
                                        arguments.shared_w2_HI) if one is not None)
    peaks = []
    for operands in ("exact", "fp8_row"):
        with assuming("sm_90"), recording(lambda *_: None):
            with Peak() as forward:
                experts_forward(replace(arguments, operands=operands))
            with Peak() as backward:
                gradient_TH = torch.empty_like(arguments.x_TH)
                if operands == "exact":
                    mlp_gradients(gradient_TH, arguments.routed(), None)
                else:
                    mlp_gradients_in_fp8(gradient_TH, arguments.routed())
        peaks.append((forward.largest, backward.largest))
    (plain, plain_backward), (rounded, rounded_backward) = peaks
    assert plain < rounded < 1.1 * plain + 1.01 * codes
    assert plain_backward < rounded_backward < 1.2 * plain_backward


@pytest.mark.parametrize("case", ["v1-T37.H80.I48.E4.K2-bf16-norm-sh32-shgate", "v1-T16.H80.I48.E4.K3-fp32-norm"])
def test_chunks_change_no_bit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tiles are the same: 37 tokens in chunks of 4, the last of which is one token."""
    parsed = parse_case(case)
    x_TH, (weights,) = build_inputs(parsed.problem).x_TH, build_shards(parsed.problem, parsed.parallel)
    with batch_invariant():
        whole_TH = moe_fast.moe(x_TH, weights, parsed.problem.spec)
        monkeypatch.setattr(memory, "CHUNK_ROWS", 8)
        assert torch.equal(moe_fast.moe(x_TH, weights, parsed.problem.spec), whole_TH)
