"""Protects what `moe-ref bench` counts, draws and times: a rank's shapes, useful work, probes, turns."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

from moe_ref.bench import timing
from moe_ref.bench.kernels import part_of, part_range, profiled
from moe_ref.bench.limits import measure_limits
from moe_ref.bench.memory import needed_bytes
from moe_ref.bench.presets import PRESETS
from moe_ref.bench.problem import NUM_PROBES, Operation, draw_batch, draw_probes, draw_weights, rank_layer
from moe_ref.bench.timing import HostClock, interleaved
from moe_ref.bench.work import Load, Work, operation_work, part_work
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Dtype

MIXTRAL_TP8 = rank_layer("mixtral.8x7b", 8, Dtype.BF16)
TINY = rank_layer("olmoe.1b.7b.E4", 32, Dtype.BF16)


def test_a_rank_has_its_columns() -> None:
    """A rank of 8 has an eighth of I, all of H and E; an uneven cut leaves the widest part; shared ones are cut too."""
    assert (MIXTRAL_TP8.spec.hidden_size, MIXTRAL_TP8.spec.intermediate_size, MIXTRAL_TP8.spec.num_experts) == (
        4096, 1792, 8)
    assert rank_layer("mixtral.8x7b", 3, Dtype.BF16).spec.intermediate_size == 4779
    deepseek = rank_layer("deepseek.v3", 8, Dtype.BF16).spec
    assert deepseek.shared is not None
    assert (deepseek.intermediate_size, deepseek.shared.intermediate_size) == (256, 256)
    assert rank_layer("mixtral.8x7b.E2", 1, Dtype.BF16).spec.num_experts == 2


@pytest.mark.parametrize(("model", "tp", "words"), [
    ("nothing", 1, "unknown model"), ("mixtral.8x7b", 0, "tp=0"), ("mixtral.8x7b.E9", 1, "cut to 9"),
    ("mixtral.8x7b", 20000, "tp=20000, but should be at most 14336")])
def test_layers_that_are_none(model: str, tp: int, words: str) -> None:
    """Each is refused with the numbers."""
    with pytest.raises(UsageValueError, match=words):
        rank_layer(model, tp, Dtype.BF16)


def test_work_of_mixtral_counted_by_hand() -> None:
    """64 tokens of 2 experts each on a rank of 8: 3 matrices of 1792 x 4096 per row, all 8 experts read once, bf16."""
    load = Load(tokens=64, rows=128, visited=8, itemsize=2)
    matrices = 22_020_096
    assert matrices == 3 * 1792 * 4096
    experts = operation_work(MIXTRAL_TP8.spec, Operation.EXPERTS, load)
    assert experts == Work(5_637_144_576, 353_370_112)
    assert experts == Work(2 * 128 * matrices, 2 * (8 * matrices + 64 * 4096 + 64 * 4096))
    layer = operation_work(MIXTRAL_TP8.spec, Operation.LAYER, load)
    assert layer == Work(5_637_144_576 + 2 * 64 * 4096 * 8, 353_370_112 + 2 * 8 * 4096)
    backward = operation_work(MIXTRAL_TP8.spec, Operation.BACKWARD, load)
    assert backward == Work(11_274_289_152, 2 * (2 * 8 * matrices + 3 * 64 * 4096))


def test_work_counts_visited_experts_and_rows_without_padding() -> None:
    """One token reads two experts, not eight, but its backward pass writes the gradients of all eight."""
    load = Load(tokens=1, rows=2, visited=2, itemsize=2)
    matrices = 3 * 1792 * 4096
    assert operation_work(MIXTRAL_TP8.spec, Operation.EXPERTS, load) == Work(4 * matrices, 2 * (2 * matrices + 8192))
    assert operation_work(MIXTRAL_TP8.spec, Operation.BACKWARD, load).num_bytes == 2 * (10 * matrices + 3 * 4096)


def test_work_of_a_shared_expert() -> None:
    """DeepSeek-V3's passes every token: 3 matrices of 256 x 7168 on a rank of 8, beside those of the routed rows."""
    spec, load = rank_layer("deepseek.v3", 8, Dtype.BF16).spec, Load(tokens=4, rows=32, visited=20, itemsize=2)
    matrices = 3 * 256 * 7168
    assert operation_work(spec, Operation.EXPERTS, load) == Work(2 * 36 * matrices, 2 * (21 * matrices + 8 * 7168))
    assert part_work(spec, "gate_up", load) is None


def test_work_of_parts_counted_by_hand() -> None:
    """gate_up has two thirds of the operations, down one; what one writes the next reads."""
    load = Load(tokens=64, rows=128, visited=8, itemsize=2)
    gate_up, down, combine = (part_work(MIXTRAL_TP8.spec, part, load) for part in ("gate_up", "down", "combine"))
    matrix = 1792 * 4096
    assert gate_up == Work(2 * 128 * 2 * matrix, 2 * (16 * matrix + 64 * 4096 + 128 * 1792))
    assert down == Work(2 * 128 * matrix, 2 * (8 * matrix + 128 * 1792 + 128 * 4096))
    assert combine == Work(2 * 128 * 4096, 2 * (128 + 64) * 4096)
    assert part_work(MIXTRAL_TP8.spec, "align", load) is None


def test_memory_grows_with_what_is_held() -> None:
    """Each subject keeps rows, and in a backward pass gradients of all weights."""
    forward, backward, more = (needed_bytes(MIXTRAL_TP8, *rest) for rest in (
        (Operation.EXPERTS, 64, 1), (Operation.BACKWARD, 64, 1), (Operation.BACKWARD, 64, 3)))
    assert MIXTRAL_TP8.num_bytes == 2 * 8 * (3 * 1792 + 1) * 4096
    assert MIXTRAL_TP8.num_bytes < forward
    assert backward - forward == MIXTRAL_TP8.num_bytes
    assert more - backward > 2 * MIXTRAL_TP8.num_bytes


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_probes_are_the_same_at_every_number_of_tokens(tokens: int) -> None:
    """The truth is computed once, so tokens, gradients and routing of probes must not change to the last bit."""
    weights = draw_weights(TINY, "cpu")
    probes = draw_probes(TINY, weights, "cpu")
    batch = draw_batch(TINY, weights, probes, tokens, "cpu")
    count = min(tokens, NUM_PROBES)
    assert len(batch.place_P.unique()) == count
    for drawn, probed in ((batch.x_TH, probes.x_PH), (batch.grad_TH, probes.grad_PH),
                          (batch.routing.ids_TK, probes.routing.ids_TK),
                          (batch.routing.weights_TK, probes.routing.weights_TK)):
        assert torch.equal(drawn[batch.place_P], probed[:count])
    assert (batch.num_rows, len(batch.x_TH)) == (tokens * 4, tokens)
    assert batch.num_visited == 4


class Ticking(HostClock):
    """A clock whose seconds are what a call returns, and that notes whose turn it was."""

    def __init__(self) -> None:
        self.turns: list[float] = []

    def seconds(self, call: object) -> float:
        self.turns.append(call())  # type: ignore[operator]
        return self.turns[-1]


def test_subjects_take_turns() -> None:
    """Every round has each of them once and starts with another, so that nobody is always the first."""
    clock = Ticking()
    spreads = interleaved({"a": lambda: 1.0, "b": lambda: 2.0, "c": lambda: 3.0}, clock, 0.0)
    rounds = [tuple(clock.turns[start:start + 3]) for start in range(0, len(clock.turns), 3)]
    assert rounds == [(1, 2, 3), (2, 3, 1)]
    assert (spreads["b"].median, spreads["b"].repetitions) == (2.0, 2)
    assert interleaved({}, clock, 0.0) == {}


def test_a_spread_is_median_and_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow repetition of five moves neither."""
    monkeypatch.setitem(timing.LEAST_ROUNDS, "cpu", 5)
    times = iter([5.0, 1.0, 2.0, 100.0, 3.0])
    spread = interleaved({"a": lambda: next(times)}, Ticking(), 0.0)["a"]
    assert (spread.median, spread.low, spread.high) == (3.0, 2.0, 5.0)


class FakeCuda:
    """What CudaClock uses of torch.cuda, on a machine that has none; can_capture: whether a capture succeeds."""

    Stream = Event = MagicMock

    def __init__(self, can_capture: bool) -> None:
        self.can_capture, self.mode, self.captured = can_capture, 0, MagicMock()

    def get_sync_debug_mode(self) -> int:
        return self.mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = 2 if mode == "error" else int(mode)

    def synchronize(self) -> None:
        """Nothing runs."""

    def CUDAGraph(self) -> MagicMock:
        return self.captured

    @contextmanager
    def graph(self, graph: MagicMock, stream: MagicMock) -> Iterator[None]:
        yield
        if not self.can_capture:
            raise RuntimeError("capture failed\nfor a reason")


@pytest.mark.parametrize(("waits", "can_capture", "mode", "reason"), [
    (False, True, "graph", ""), (False, False, "eager", "capture failed"),
    (True, True, "eager", "waits for the device: called a synchronizing operation")])
def test_what_can_be_captured_is_replayed(waits: bool, can_capture: bool, mode: str, reason: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waits for the device is asked first and never captured; what was asked leaves torch as it was."""
    cuda, calls = FakeCuda(can_capture), list[int]()

    def call() -> str:
        calls.append(cuda.mode)
        if waits and cuda.mode == 2:
            raise RuntimeError("called a synchronizing operation")
        return "result"
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    monkeypatch.setattr(timing, "_FLUSHED_BYTES", 16)
    monkeypatch.setattr(timing.CudaClock, "device", "cpu")
    clock = timing.CudaClock()
    prepared = clock.prepare(call)
    assert (prepared.mode, prepared.reason, cuda.mode) == (mode, reason, 0)
    before = len(calls)
    assert prepared.call() == "result"
    assert len(calls) - before == (mode == "eager")
    assert cuda.captured.replay.call_count == (mode == "graph")


def test_limits_are_measured_in_bytes_and_operations() -> None:
    """A copy reads and writes; a product of side n has 2 n^3 operations."""
    copy, product = measure_limits(Dtype.BF16, HostClock())
    assert copy.per_s * copy.spread.median == pytest.approx(2 * 2**22)
    assert product.per_s * product.spread.median == pytest.approx(2 * 256**3)


def test_kernels_are_found_in_their_part() -> None:
    """What runs in a range belongs to its part; the range itself is no kernel; counts are of one call."""
    matrix = torch.ones(32, 32)

    def call() -> None:
        with part_range("gate_up"):
            F.linear(F.linear(matrix, matrix), matrix)
        with part_range("down"):
            matrix.sum()
        matrix.cos()
    found = profiled(call, HostClock())
    starts = Counter[tuple[str, str]]({(one.part, one.name): one.starts for one in found})  # type: ignore[dict-item]
    assert starts["gate_up", "aten::mm"] + starts["gate_up", "aten::addmm"] == 2
    assert starts["down", "aten::sum"] == 1
    assert starts["", "aten::cos"] == 1
    assert {"gate_up", "down"}.isdisjoint(one.name for one in found)
    assert found == sorted(found, key=lambda one: -one.seconds)


@pytest.mark.parametrize(("name", "part"), [
    ("gate_up_kernel", "gate_up"), ("down_kernel_0d1d", "down"), ("combine_kernel", "combine"),
    ("down_gradient_kernel", ""), ("void cutlass::device_kernel", "")])
def test_kernels_are_known_by_their_names(name: str, part: str) -> None:
    """PART_kernel; a kernel that merely begins like a part is another one."""
    assert part_of(name) == part


def test_the_founding_preset_is_its_table() -> None:
    """Decode steps of 1, 8, 32 and 64 tokens and prompts of 32 tokens at the same batches, Mixtral at tp 4 and 8."""
    preset = PRESETS["mixtral-founding"]
    assert (preset.models, preset.tp) == (("mixtral.8x7b",), (4, 8))
    assert preset.tokens == (1, 8, 32, 64, 256, 1024, 2048)
    assert [tokens for tokens, label in preset.labels if label.startswith("decode")] == [1, 8, 32, 64]
    assert {label: tokens for tokens, label in preset.labels}["prefill 32 x 64"] == 2048
    assert all(tokens in preset.tokens for tokens, _ in preset.labels)
    assert PRESETS["default"].tokens[0] == 1
    assert PRESETS["default"].tokens[-1] == 16384
