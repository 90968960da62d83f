"""Protects the fast layer over encoded experts whose weights are decoded: what is read, how it is rounded, where it is
cut, and what is refused. Its judge is the harness, whose scales differ between all neighbours.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.library import opcheck

import moe_fast
from moe_fast import capabilities
from moe_fast.capabilities import CAPABILITIES
from moe_fast.held_experts import routed_experts, with_shared
from moe_fast.kernels import decoded_down as down_module
from moe_fast.kernels import decoded_gate_up as gate_up_module
from moe_fast.kernels.align import align
from moe_fast.kernels.decoded_down import decoded_down
from moe_fast.kernels.decoded_tile import encoded_operand, run_of
from moe_fast.operators.encoded_act_rows import encoded_act_rows
from moe_fast.operators.encoded_arguments import EncodedGateUp
from moe_fast.operators.encoded_down_arguments import EncodedDownArguments
from moe_fast.operators.encoded_experts import encoded_experts, merged_by_codes
from moe_fast.operators.encoded_merged_down import encoded_merged_down
from moe_fast.operators.encoded_parts import flattened
from moe_fast.tiles import Tile
from moe_ref import Groups, Parallel, parse_case
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.errors import UsageError, UsageTypeError, UsageValueError
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.rank import Rank
from moe_ref.contract.vocabulary import Scheme, Verdict
from moe_ref.inputs.build import Inputs, build_inputs
from moe_ref.inputs.shards import build_encoded_shards
from moe_ref.oracle.decode import decode
from tests.in_process import judged

SCHEMES = ("int8", "gptq", "gptq32", "gptqorder", "gptqorder32", "awq", "awq32", "mxfp4", "nvfp4")
DTYPES = ("bf16", "fp16", "fp32")

LAYERS = ("norm", "norm-mlpbias-limit0.75-alpha1.702-up1", "norm-sh90-shgate-outbias-res")
"""Routed experts alone; biases inside them; a shared expert, which is encoded too."""

EVERY = {f"v1-T9.H161.I300.E4.K2-{dtype}-{scheme}-{LAYERS[(number + tp) % 3]}{f'-tp{tp}' * (tp > 1)}": tp
         for number, (scheme, dtype) in enumerate(product(SCHEMES, DTYPES)) for tp in (1, 2, 3)}
"""Every scheme in every dtype. Of 300 columns tp 2 and 3 begin at 150, 100 and 200: inside a block and a byte; the last
byte of a row of 161 holds one code."""

OTHERS = {
    "v1-T9.H96.I75.E4.K2-bf16-awq32-norm-tp2": "a rank begins at column 38 of 75, in the middle of a byte or not",
    "v1-T9.H96.I75.E4.K2-bf16-mxfp4-norm-tp3-split1.0.2": "a rank without columns",
    "v1-T9.H96.I75.E4.K2-fp32-gptqorder32-norm-nogate-tp2": "one projection",
    "v1-T9.H96.I75.E4.K2-bf16-int8-norm-sh33-weightinput-zipf": "a weight on the input",
    "v1-T9.H96.I75.E4.K3-bf16-nvfp4-scale2-zero3-sh33-shmean-outbias-tp2": "identity experts, a mean",
    "v1-T9.H96.I75.E4.K3-fp16-nvfp4-scale2-zero3-sh33-tp2-gather": "identity experts, gathered",
    "v1-T9.H96.I75.E4.K2-bf16-gptq32-sigmoid-norm-learnscale-sh66-shrouter2-tp2":
        "shared experts with weights of their own are cut apart, here inside a block",
    "v1-T9.H96.I75.E4.K2-bf16-awq32-sigmoid-norm-learnscale-sh66-shrouter2-tp2-gather": "the same, gathered",
    "v1-T9.H96.I75.E4.K2-bf16-gptqorder32-norm-mlpbias-sh33-shgate-shmlpbias-tp3-gather": "w2 cut by output",
    "v1-T9.H96.I75.E4.K2-bf16-mxfp4-norm-sh33-tp2-allreducerows": "rows are reduced",
    "v1-T9.H96.I75.E4.K2-fp16-awq-norm-sh33-tp2-wholeshared": "the shared expert is whole",
    "v1-T9.H96.I75.E6.K2-bf16-int8-norm-sh33-ep3-roundrobin-copy0.0": "experts in turn, one three times",
    "v1-T9.H96.I75.E6.K2-bf16-gptq32-norm-sh33-shgate-res-tp2-ep2-tokensep-share1.3": "rows travel",
    "v1-T9.H96.I75.E6.K2-bf16-nvfp4-norm-sh33-tp2-ep2-reducescatter-tokensboth-share3.0.1.2": "a part is empty",
    "v1-T9.H96.I75.E3.K2-fp32-awq32-norm-ep4": "a rank without experts",
    "v1-T0.H96.I75.E4.K2-bf16-gptq32-norm-sh33": "no tokens",
    "v1-T9.H96.I75-bf16-mxfp4-sh33-tp2": "dense",
    "v1-T40.H520.I300.E4.K2-bf16-gptq32-norm-tp2": "more columns than a tile, several blocks in one",
}
EXTREME = tuple(f"v1-T9.H160.I200.E4.K2-{DTYPES[number % 3]}-{scheme}-norm-extreme-tp3"
                for number, scheme in enumerate(SCHEMES))
"""Tiny, huge and zero scales, the largest codes, and tails in which a wrong code would become infinite."""


@pytest.mark.sampled(every=9)
@pytest.mark.parametrize("case_id", [*EVERY, *OTHERS, *EXTREME])
def test_encoded_experts_are_right(case_id: str) -> None:
    """All stages from their own inputs, and the output, as the harness judges anybody."""
    line = judged(moe_fast, case_id, runs=1)
    assert line.verdict is Verdict.PASS, line.reason


def without_start(encoded: Encoded, tile: Tile) -> dict[str, object]:
    """A part that forgets how far inside its first block it begins."""
    return encoded_operand(encoded, tile) | {"column_start": 0}


def one_block_early(encoded: Encoded, tile: Tile) -> dict[str, object]:
    """The scale of the neighbour, but for the first row."""
    operand = encoded_operand(encoded, tile)
    return operand | {"scales": operand["scales"].roll(1, -1)}


def swapped_halves(encoded: Encoded, tile: Tile) -> dict[str, object]:
    """The even column in the high half."""
    operand = encoded_operand(encoded, tile)
    return operand | {"codes": (encoded.codes & 15) << 4 | encoded.codes >> 4}


@pytest.mark.sampled(every=3, each="mistake")
@pytest.mark.parametrize(("mistake", "scheme"), [(without_start, "gptq"), (without_start, "awq32"),
                                                 (one_block_early, "mxfp4"), (one_block_early, "nvfp4"),
                                                 (swapped_halves, "gptqorder32")])
def test_a_mistake_is_seen(mistake: Callable[[Encoded, Tile], dict[str, object]], scheme: str,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the cases above would prove nothing of where codes and scales are read."""
    for module in (gate_up_module, down_module):
        monkeypatch.setattr(module, "encoded_operand", mistake)
    line = judged(moe_fast, f"v1-T9.H160.I300.E4.K2-bf16-{scheme}-norm-tp3", runs=1)
    assert line.verdict is Verdict.MISMATCH


def rows_of(encoded: Encoded, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(K, N): what the down kernel makes of one-hot rows of act, which is the matrix of expert 0."""
    count = encoded.num_columns
    alignment = align(torch.zeros(count, 1, dtype=torch.int64), torch.arange(1), 16)
    return decoded_down(torch.eye(count, dtype=dtype), encoded, None, None, alignment, Tile(16, 64, 64))


def one_block_rows(scheme: Scheme, scales: torch.Tensor, columns: int, **others: torch.Tensor) -> Encoded:
    """A row for each scale, with every code of 4 bits in it."""
    codes = torch.arange(columns // 2, dtype=torch.uint8).remainder(8).mul(2)
    return Encoded(scheme=scheme, codes=(codes | (codes + 1) << 4).expand(1, len(scales), -1).contiguous(),
                   scales=scales[None, :, None], num_columns=columns, **others)


def test_every_code_and_every_scale_of_8_bits_is_decoded_exactly() -> None:
    """Powers of two from the one that is subnormal in fp32; e4m3 with its subnormal numbers and signs; both NaN.

    The largest powers are left out: 6 times 2^126 is beyond fp32.
    """
    every = torch.arange(256, dtype=torch.uint8)
    powers = torch.cat([every[:253], every[255:]])
    matrices = [one_block_rows(Scheme.MXFP4, powers, 32),
                one_block_rows(Scheme.NVFP4, every.view(torch.float8_e4m3fn), 16, second_scale=torch.ones(1))]
    for encoded in matrices:
        wanted_NK = decode(encoded)[0].float()
        assert torch.equal(rows_of(encoded).T.nan_to_num(2.0**60), wanted_NK.nan_to_num(2.0**60))
        assert wanted_NK.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoded_weights_are_rounded_once(dtype: torch.dtype) -> None:
    """To nearest, ties to even: a bf16 scale times a number of 5 bits has up to 13."""
    scales = (torch.arange(128, 256) / 128).to(torch.bfloat16)
    zeros = torch.arange(128, dtype=torch.uint8).remainder(16)[None, :, None].contiguous()
    encoded = one_block_rows(Scheme.AWQ_32, scales, 32, zeros=zeros)
    assert torch.equal(rows_of(encoded, dtype).T, decode(encoded)[0].to(dtype))


@pytest.mark.parametrize(("scheme", "start", "run"), [
    ("int8", 0, 64), ("gptq", 0, 64), ("gptq", 64, 64), ("gptq", 96, 32), ("gptq", 100, 4), ("gptq32", 0, 32),
    ("gptq32", 31, 1), ("nvfp4", 0, 16), ("nvfp4", 8, 8), ("gptqorder", 0, 1)])
def test_how_many_columns_share_a_scale(scheme: str, start: int, run: int) -> None:
    """In a tile of 64 columns: one scale for the whole tile where it lies in a block, however it is cut."""
    encoded = Encoded(scheme=Scheme(scheme), codes=torch.empty(0), scales=torch.empty(0), num_columns=256,
                      column_start=start)
    assert run_of(encoded, 64) == run


def layer(words: str = "gptq32-norm-mlpbias-sh33-shgate", dtype: str = "bf16") -> tuple[Inputs, QuantisedWeights]:
    problem = parse_case(f"v1-T9.H96.I75.E4.K2-{dtype}-{words}").problem
    return build_inputs(problem), build_encoded_shards(problem, Parallel())[0]


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("words", ["gptqorder32-norm-mlpbias-sh33-shgate", "mxfp4-norm"])
def test_torch_checks_the_operators(words: str) -> None:
    """Schema, fakes with the shapes of results, and no gradient where there is none."""
    inputs, weights = layer(words, "fp32")
    spec, rank = inputs.problem.spec, Rank(Parallel(), Groups())
    ids_TK, weights_TK = torch.tensor([[0, 2]] * 9), torch.full((9, 2), 0.5)
    given = routed_experts(inputs.x_TH, ids_TK, weights_TK, weights, spec, rank)
    if spec.shared is not None:
        given = with_shared(given, torch.ones(9, 1), weights, spec, rank)
    routed = given.routed()
    act_RI = torch.ones(18, 75)
    for operator, arguments in (
            (encoded_experts, given),
            (encoded_act_rows, EncodedGateUp(inputs.x_TH, ids_TK, given.hosted_E, weights.w13, routed.form, None,
                                             routed.w13_bias_EGI)),
            (encoded_merged_down, EncodedDownArguments(act_RI, ids_TK, weights_TK, given.hosted_E, weights.w2))):
        opcheck(operator, flattened(weights.scheme, arguments))


def test_codes_and_scales_may_have_any_strides() -> None:
    """Parts of larger tensors, one experts after the other or side by side: the same bits."""
    inputs, weights = layer("awq32-norm")

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers with every axis but the last in another order, and room between those of the last."""
        room = torch.zeros(*reversed(tensor.shape[:-1]), 2 * tensor.shape[-1], dtype=tensor.dtype)
        view = room.permute(*reversed(range(tensor.dim() - 1)), tensor.dim() - 1)[..., ::2]
        return view.copy_(tensor)

    others = replace(weights, w13=weights.w13.mapped(spread), w2=weights.w2.mapped(spread))
    assert others.w13.codes.stride(-1) == 2
    spec = inputs.problem.spec
    assert torch.equal(moe_fast.moe(inputs.x_TH, others, spec), moe_fast.moe(inputs.x_TH, weights, spec))


def test_the_layer_compiles_to_the_same_bits() -> None:
    """torch.compile without a graph break."""
    inputs, weights = layer()
    spec = inputs.problem.spec
    torch._dynamo.reset()
    compiled = torch.compile(moe_fast.moe, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*lru_cache.*")  # torch traces through the caches of checks, and says so
        found_TH = compiled(inputs.x_TH, weights, spec)
    assert torch.equal(found_TH, moe_fast.moe(inputs.x_TH, weights, spec))


@pytest.mark.parametrize("name", ["x_TH", "router_EH", "w2_bias_EH"])
def test_gradients_are_refused_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes have none; under no_grad leaves are numbers as any others."""
    inputs, weights = layer()
    x_TH, spec = inputs.x_TH, inputs.problem.spec
    if name == "x_TH":
        x_TH = x_TH.clone().requires_grad_()
    else:
        weights = replace(weights, **{name: getattr(weights, name).clone().requires_grad_()})
    with torch.no_grad():
        assert torch.equal(moe_fast.moe(x_TH, weights, spec), moe_fast.moe(x_TH, layer()[1], spec))
    monkeypatch.setattr("moe_fast.launch.interpret", lambda *_: pytest.fail("a kernel ran"))
    with pytest.raises(UsageTypeError, match="requires a gradient, but experts that are encoded"):
        moe_fast.moe(x_TH, weights, spec)
    routing = moe_fast.layer.Routing(torch.zeros(9, 2, dtype=torch.int64), torch.ones(9, 2), shared_TS=torch.ones(9, 1))
    with pytest.raises(UsageTypeError, match="requires a gradient"):
        moe_fast.experts(x_TH, routing, weights, spec)


def test_an_operator_says_that_it_has_no_gradient() -> None:
    """Asked by itself, without the layer."""
    inputs, weights = layer("gptq32-norm", "fp32")
    given = routed_experts(inputs.x_TH.clone().requires_grad_(), torch.tensor([[0, 2]] * 9), torch.ones(9, 2), weights,
                           inputs.problem.spec, Rank(Parallel(), Groups()))
    with pytest.raises(UsageTypeError, match="a gradient through encoded experts, but codes have none"):
        merged_by_codes(given).sum().backward()


def test_schemes_that_are_not_declared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With those that are, and for a dtype with those of the scheme."""
    inputs, weights = layer()
    numerics = CAPABILITIES.schemes[Scheme.GPTQ_32]
    declared = {Scheme.GPTQ_32: {dtype: one for dtype, one in numerics.items() if dtype == "fp32"}}
    monkeypatch.setattr(capabilities, "CAPABILITIES", replace(CAPABILITIES, schemes=declared))
    with pytest.raises(UsageTypeError, match=r"dtype torch\.bfloat16, but should be one of torch\.float32 with scheme"):
        moe_fast.moe(inputs.x_TH, weights, inputs.problem.spec)
    monkeypatch.setattr(capabilities, "CAPABILITIES", replace(CAPABILITIES, schemes={Scheme.MXFP4: numerics}))
    with pytest.raises(UsageTypeError, match="scheme gptq32, but should be one of mxfp4"):
        moe_fast.moe(inputs.x_TH, weights, inputs.problem.spec)


@pytest.mark.parametrize(("changed", "error", "message"), [
    ({"w2": "w13"}, UsageValueError, "w2"),
    ({"w13_bias_EGI": torch.ones(4, 2, 75)}, UsageTypeError, "w13_bias_EGI: dtype torch.float32, but should be"),
    ({"scheme": Scheme.GPTQ}, UsageTypeError, "scheme gptq32, but should be gptq as the weights"),
])
def test_wrong_weights_are_told(changed: dict[str, object], error: type[UsageError], message: str) -> None:
    """Before any kernel starts."""
    inputs, weights = layer()
    held = {name: getattr(weights, value) if value == "w13" else value for name, value in changed.items()}
    with pytest.raises(error, match=message):
        moe_fast.moe(inputs.x_TH, replace(weights, **held), inputs.problem.spec)
