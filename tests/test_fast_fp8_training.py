"""moe_fast in 8 bits, forward and backward: codes of weights and of columns to the bit, layers by the referee, and
mistakes of the kind that a tolerance hides, seeded where the kernels are called.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from math import nan
from types import SimpleNamespace

import pytest
import torch

from moe_fast import fp8_training
from moe_fast.held import operands_of
from moe_fast.held_experts import entered
from moe_fast.kernels import round_columns as columns
from moe_fast.kernels import round_matrix as matrix
from moe_fast.kernels.align import align
from moe_fast.kernels.round_columns import RoundedColumns
from moe_fast.operators import fp8, fp8_gradients
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.vocabulary import Stage, Verdict
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_encoded_shards, build_shards
from tests.in_process import judged
from tests.test_fast_rounded_rows import DTYPES, ROW, codes_of, expected_rows, wide_rows

SMALL = "v1-T12.H40.I36.E6.K3"


# What is multiplied


def of_rows(w_EGNK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = expected_rows(w_EGNK.reshape(-1, w_EGNK.shape[-1]), ROW)
    return codes.view(w_EGNK.shape), scales.view(*w_EGNK.shape[:3], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 130, 1100])
def test_codes_of_a_matrix(width: int, dtype: torch.dtype) -> None:
    """Rows for the sum over columns; columns of both projections, as one, for the sum over rows. Any strides."""
    w_EGNK = torch.stack([wide_rows(width, dtype) * factor for factor in (1, -1, 0.5, -0.25)]).view(2, 2, 11, width)
    transposed_EGNK = w_EGNK.transpose(2, 3).contiguous().transpose(2, 3)
    for given in (w_EGNK, transposed_EGNK, torch.nn.functional.pad(w_EGNK, (3, 5, 1, 2))[..., 1:-2, 3:-5]):
        found, back = matrix.rounded_rows(given), matrix.rounded_columns(given)
        assert (found.shape, back.shape) == ((2, 2, 11, width), (2, width, 22))
        columns_EKN = given.permute(0, 3, 1, 2).flatten(2)
        for one, (codes, scales) in ((found, of_rows(given)), (back, of_rows(columns_EKN[:, None]))):
            assert torch.equal(one.codes.float(), codes.view(one.codes.shape))
            assert torch.equal(one.scales, scales.view(one.scales.shape))


def routed(num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids of 21 tokens, two slots each: some of no expert at hand, and the last expert without rows."""
    ids_TK = torch.randint(-1, num_experts - 1, (21, 2), generator=torch.Generator().manual_seed(3))
    hosted_E = torch.arange(num_experts)
    return ids_TK, hosted_E, torch.rand(42, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_codes_of_columns(by_token: bool, weighted: bool, dtype: torch.dtype) -> None:
    """Every expert's rows by themselves, at places that 16 divides, zeros up to the next expert's."""
    (ids_TK, hosted_E, weights_R), width = routed(5), 70
    alignment = align(ids_TK, hosted_E, 16)
    places = columns.places_of(alignment, 5)
    rows = torch.randn(21 if by_token else 42, width, generator=torch.Generator().manual_seed(5)).to(dtype)
    rows[:, 3] *= 2.0**-10
    rows[:, 4] = 0
    found = columns.round_columns(rows, weights_R if weighted else None, places, 5, alignment, 2 if by_token else None)
    offsets, starts = alignment.offsets.tolist(), places.starts.tolist()
    assert starts[-1] <= places.count
    for e in range(5):
        position = torch.arange(offsets[e], offsets[e + 1])
        row = alignment.sorted_rows_R[position].long()
        taken = (rows[row // 2] if by_token else rows[position]).float()
        taken = taken * weights_R[row][:, None] if weighted else taken
        codes, scales = expected_rows(torch.nn.functional.pad(taken.T, (0, 1)), ROW)
        assert starts[e] % 16 == 0
        assert torch.equal(found.scales_EN[e], scales[:, 0])
        held = found.codes_NP[:, starts[e]:starts[e + 1]].float()
        assert torch.equal(held[:, :len(row)], codes[:, :-1])
        assert not held[:, len(row):].any()


def test_what_is_not_finite_in_columns() -> None:
    """It has no part in its column's scale, and its own code is NaN."""
    ids_T1 = torch.zeros(20, 1, dtype=torch.int64)
    alignment = align(ids_T1, ids_T1[0], 16)
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(5))
    rows[7, 1] = torch.inf
    found = columns.round_columns(rows, None, columns.places_of(alignment, 1), 1, alignment)
    rows[7, 1] = 0
    scales = rows.abs().amax(0) / 448
    assert torch.equal(found.scales_EN[0], scales)
    expected = codes_of(rows, scales[None])
    expected[7, 1] = nan
    assert torch.equal(found.codes_NP[:, :20].float().nan_to_num(99), expected.T.nan_to_num(99))


# Layers


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("words", [
    "fp32-norm", "bf16-norm-sh19-shgate-res-tp3", "fp16-norm-zipf-large-tp2",
    "fp32-norm-mlpbias-sh19-shgate-shmlpbias-outbias-tp2", "bf16-norm-empty-tp2", "fp32-norm-tp2-split3.0",
    "fp32-sigmoid-norm-sh19-weightinput-outlier-tp2", "bf16-norm-relu-tp2", "fp32-norm-relu2-nogate-mlpbias-tp2",
    "fp32-norm-cap600-tp2",
    # Rows reduced before the merge, or scattered; experts over ranks, rows that travel, a shared expert that is whole.
    "fp32-norm-tp2-allreducerows", "fp32-norm-sh19-tp2-reducescatter-tokenstp", "bf16-norm-sh19-shgate-ep2-tokensep",
    "fp32-norm-tp2-ep2-reducescatter-tokensboth", "bf16-norm-sh19-tp2-wholeshared", "fp32-norm-ep3-roundrobin-copy0.3",
    # Halves: the activation is gathered, w2 cut by output.
    "bf16-norm-tp2-gather", "fp32-norm-mlpbias-sh19-shgate-tp2-gather", "fp32-norm-weightinput-tp2-gather",
])
def test_layers_pass(words: str) -> None:
    """Forward and backward, every way to spread a layer."""
    line = judged(fp8_training, f"{SMALL}-{words}-bwd")
    assert line.verdict is Verdict.PASS, line.message


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("case_id", ["v1-T33.H96.I64-bf16-bwd", "v1-T1.H96.I64.E4.K2-bf16-norm-bwd",
                                     "v1-T70.H130.I200.E3.K2-bf16-norm-tp2-bwd"])
def test_other_sizes_pass(case_id: str) -> None:
    """A dense layer, one token, more rows than a tile and sizes that none divides."""
    line = judged(fp8_training, case_id, runs=1)
    assert line.verdict is Verdict.PASS, line.message


def test_the_usual_layer_is_none_in_8_bits() -> None:
    """What is judged is the rounding: a layer in bf16 is more exact, and wrong under this contract."""
    class Plain:
        CAPABILITIES = replace(fp8_training.CAPABILITIES, stages=tuple(
            one for one in fp8_training.CAPABILITIES.stages if not one.endswith(("codes", "scales"))))
        moe = staticmethod(fp8_training.layer.moe)

    line = judged(Plain(), f"{SMALL}-fp32-norm-bwd", runs=1)
    assert line.verdict is Verdict.MISMATCH


# Mistakes

_rows, _columns, _round_columns = matrix.rounded_rows, matrix.rounded_columns, columns.round_columns


def codes_of_the_forward_pass(w_EGNK: torch.Tensor) -> Encoded:
    """The gradient of rows multiplies the numbers of the forward pass: rounded again by columns, but from codes."""
    rounded = _rows(w_EGNK)
    return _columns((rounded.codes.float() * rounded.scales).to(w_EGNK.dtype))


def neighbouring_scale(w_EGNK: torch.Tensor) -> Encoded:
    rounded = _columns(w_EGNK)
    return replace(rounded, scales=rounded.scales.roll(1, -2))


def one_scale(*arguments: object) -> RoundedColumns:
    """The largest column's scale for all, and codes under it."""
    found = _round_columns(*arguments)  # type: ignore[arg-type]
    scales_EN = found.scales_EN.amax(1, keepdim=True).expand_as(found.scales_EN).contiguous()
    ratio_N = (found.scales_EN / scales_EN).amax(0)
    return RoundedColumns((found.codes_NP.float() * ratio_N[:, None]).to(torch.float8_e4m3fn), scales_EN)


def without_weights(rows: torch.Tensor, weights: object, *others: object) -> RoundedColumns:
    return _round_columns(rows, None, *others)  # type: ignore[arg-type]


def scales_of_the_next_expert(*arguments: object) -> RoundedColumns:
    found = _round_columns(*arguments)  # type: ignore[arg-type]
    return replace(found, scales_EN=found.scales_EN.roll(1, 0))


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize(("name", "mistake", "stage"), [
    ("rounded_columns", codes_of_the_forward_pass, Stage.GRAD_W13),
    ("rounded_columns", neighbouring_scale, Stage.GRAD_W13),
    ("round_columns", one_scale, Stage.GRAD_W2), ("round_columns", without_weights, Stage.GRAD_W2),
    ("round_columns", scales_of_the_next_expert, Stage.GRAD_W2),
])
def test_a_mistake_of_the_backward_pass_is_seen(name: str, mistake: Callable, stage: Stage,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass is right, and so is every other gradient that does not take it."""
    monkeypatch.setattr(fp8_gradients, name, mistake)
    line = judged(fp8_training, f"{SMALL}-fp32-norm-bwd", runs=1)
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, stage), line.message


def test_a_mistake_of_the_forward_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of gate for up: rows of both are rounded by themselves."""
    def swapped(w_EGNK: torch.Tensor) -> Encoded:
        rounded = _rows(w_EGNK)
        return replace(rounded, scales=rounded.scales.flip(1)) if w_EGNK.shape[1] == 2 else rounded

    monkeypatch.setattr(fp8, "rounded_rows", swapped)
    line = judged(fp8_training, f"{SMALL}-bf16-norm", runs=1)
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.ACT), line.message


def test_the_gradient_of_a_weight_is_of_the_rounded_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the forward pass multiplied: without rounding it is nearer to the true one, and not this layer's."""
    def exact(act_RI: torch.Tensor, grad_TH: torch.Tensor, w2_EHI: torch.Tensor, bias_EH: torch.Tensor | None,
              routed: fp8_gradients.RoutedRows) -> torch.Tensor:
        found_R, offsets = torch.zeros(routed.ids_TK.numel()), routed.alignment.offsets.tolist()
        for e in range(routed.num_experts):
            row = routed.alignment.sorted_rows_R[offsets[e]:offsets[e + 1]].long()
            down_RH = act_RI[offsets[e]:offsets[e + 1]] @ w2_EHI[e].T
            found_R[row] = (down_RH * grad_TH[row // routed.top_k]).sum(1)
        return found_R.view(routed.ids_TK.shape)

    monkeypatch.setattr(fp8_gradients, "of_output_weights", exact)
    line = judged(fp8_training, f"{SMALL}-fp32-norm-bwd", runs=1)
    assert (line.verdict, line.first_stage) == (Verdict.MISMATCH, Stage.GRAD_ROUTER), line.message


# Use


def test_codes_are_refused() -> None:
    """Encoded weights have no gradient, and are multiplied by moe_fast as they are."""
    with pytest.raises(UsageTypeError, match="weights: QuantisedWeights, but should be MoEWeights"):
        fp8_training.in_fp8(build_encoded_shards(parse_case("v1-T4.H32.I32.E2.K1-bf16-fp8row").problem, Parallel())[0])


def test_it_compiles_to_the_same_bits() -> None:
    """torch.compile without a graph break, forward and backward: weights are marked inside the graph."""
    case = parse_case(f"{SMALL}-bf16-norm-sh19-shgate")
    shard, x_TH = build_shards(case.problem, case.parallel)[0], build_inputs(case.problem).x_TH.requires_grad_()
    leaves = [x_TH, *(tensor.requires_grad_() for _, tensor in shard.named_tensors())]
    results = []
    for function in (fp8_training.moe, torch.compile(fp8_training.moe, fullgraph=True, backend="aot_eager")):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lru_cache.*")  # torch traces through the caches of checks, and says so
            y_TH = function(x_TH, shard, case.problem.spec)
        results.append([y_TH, *torch.autograd.grad(y_TH.square().sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(bool(one.any()) for one in results[0])


def test_shared_experts_that_the_router_weights_are_refused() -> None:
    """Each would be rows of its own; without a word they would be rounded together."""
    case = parse_case("v1-T12.H40.I36.E6.K3-fp32-sigmoid-norm-sh20-shrouter2")
    shard, x_TH = build_shards(case.problem, case.parallel)[0], build_inputs(case.problem).x_TH
    with pytest.raises(UsageValueError, match=r"moe_fast\.fp8_training: .* is not implemented"):
        fp8_training.moe(x_TH, shard, case.problem.spec)


def test_weights_stay_what_they_are() -> None:
    """Moved, cut or with a gradient that is added up: a mode that is lost would be another layer, in silence."""
    case = parse_case(f"{SMALL}-bf16-norm-sh19")
    weights = fp8_training.in_fp8(build_shards(case.problem, case.parallel)[0])
    alone = SimpleNamespace(size=1)
    for one in (weights.to("cpu"), weights.shard(Parallel(tp=2), 1), entered(weights, (alone,))):
        assert operands_of(one) == "fp8_row"
    assert operands_of(fp8_training.MoELayer(case.problem.spec).weights) == "fp8_row"
