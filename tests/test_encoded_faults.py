"""Encoded weights that do not fit are told before any kernel starts: what was found, what should be there, and where.

Each fault is one that somebody's loader has made, or that one would: torch copies, broadcasts and converts most of them
without a word, and the layer then computes with other numbers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_ref.contract.encoded import Encoded, check_encoded
from moe_ref.contract.errors import UsageError, UsageTypeError, UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights, check_held, check_quantised
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from moe_ref.contract.vocabulary import Scheme
from tests.made_encoded import SCHEMES, drawn
from tests.test_encoded import SPEC, layer

SHAPE = (2, 3, 40, 261)


def refused(encoded: Any, words: str, kind: type[Exception] = UsageValueError, shape: tuple[int, ...] = SHAPE,
            scheme: Scheme | None = None) -> None:
    """check_encoded names the matrix and says so."""
    with pytest.raises(kind, match="^w2: .*" + words) as raised:
        check_encoded("w2", encoded, scheme or encoded.scheme, shape)
    assert isinstance(raised.value, UsageError)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_fits(scheme: Scheme) -> None:
    """Nothing is raised of a matrix that is right."""
    check_encoded("w2", drawn(scheme, SHAPE), scheme, SHAPE)


# Kinds.

NARROW = [scheme for scheme in SCHEMES if ENCODINGS[scheme].codes in (Codes.E2M1, Codes.INT4)]
"""Two codes to a byte."""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_that_were_converted(scheme: Scheme) -> None:
    """copy_ of a bf16 checkpoint into a buffer for codes converts numbers to codes of the same value, and the other way
    (https://github.com/vllm-project/vllm/issues/35324): codes have one dtype, and no other is taken for it."""
    encoded = drawn(scheme, SHAPE)
    for dtype in (torch.bfloat16, torch.float32, torch.int32):
        refused(replace(encoded, codes=encoded.codes.to(dtype)), rf"codes: dtype {dtype}, but should be torch\.",
                UsageTypeError)


@pytest.mark.parametrize("scheme", NARROW)
def test_codes_as_int8(scheme: Scheme) -> None:
    """Shifted right, a signed byte brings its sign along."""
    encoded = drawn(scheme, SHAPE)
    refused(replace(encoded, codes=encoded.codes.view(torch.int8)), r"codes: dtype torch\.int8, but should be "
            r"torch\.uint8", UsageTypeError)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_of_another_format(scheme: Scheme) -> None:
    """fp16 where fp32 are, e8m0 as floats, e4m3 as bytes: each decodes to something."""
    encoded = drawn(scheme, SHAPE)
    dtype = {Scales.FP32: torch.float16, Scales.HALF: torch.float32, Scales.E8M0: torch.float32,
             Scales.E4M3: torch.uint8}[ENCODINGS[scheme].scales]
    refused(replace(encoded, scales=encoded.scales.to(dtype)), rf"scales: dtype {dtype}, but should be torch\.\w+.*"
            rf"\[{scheme}\]", UsageTypeError)


@pytest.mark.parametrize(("scheme", "part", "dtype"), [
    (Scheme.AWQ, "zeros", torch.float16), (Scheme.AWQ_32, "zeros", torch.int8),
    (Scheme.GPTQ_ORDER, "groups", torch.int64), (Scheme.NVFP4, "second_scale", torch.bfloat16)])
def test_what_goes_with_the_scales_in_another_format(scheme: Scheme, part: str, dtype: torch.dtype) -> None:
    encoded = drawn(scheme, SHAPE)
    changed: Any = {part: encoded.tensors[part].to(dtype)}
    refused(replace(encoded, **changed), rf"{part}: dtype {dtype}, but should be torch\.", UsageTypeError)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_on_two_devices(scheme: Scheme) -> None:
    """Scales that stay behind when codes move."""
    encoded = drawn(scheme, SHAPE)
    refused(replace(encoded, scales=encoded.scales.to("meta")), "scales: device meta, but should be cpu as codes",
            UsageTypeError)


def test_another_scheme() -> None:
    """mxfp4 and nvfp4, or two group sizes, have the same codes; only the name tells them apart."""
    refused(drawn(Scheme.MXFP4, SHAPE), "scheme mxfp4, but should be nvfp4", UsageTypeError, scheme=Scheme.NVFP4)
    refused(drawn(Scheme.GPTQ, SHAPE), "scheme gptq, but should be gptq32", UsageTypeError, scheme=Scheme.GPTQ_32)


@pytest.mark.parametrize("given", [torch.zeros(40, 261), None], ids=["a tensor", "nothing"])
def test_no_encoded_matrix(given: Any) -> None:
    refused(given, f"{type(given).__name__}, but should be Encoded", UsageTypeError, scheme=Scheme.INT8)


# Shapes.


def parts_of(scheme: Scheme) -> list[str]:
    """Names of the tensors that the scheme has."""
    return list(drawn(scheme, SHAPE).tensors)


EVERY_PART = [(scheme, part) for scheme in SCHEMES for part in parts_of(scheme)]


@pytest.mark.parametrize(("scheme", "part"), EVERY_PART)
def test_a_missing_tensor(scheme: Scheme, part: str) -> None:
    """Without zero points or a second scale the formula still runs."""
    encoded = drawn(scheme, SHAPE)
    changed: Any = {part: None}
    if part == "codes":
        with pytest.raises(UsageValueError, match=r"w2: codes is missing, but should be \(2, 3, 40, "):
            check_encoded("w2", replace(encoded, **changed), scheme, SHAPE)
    else:
        refused(replace(encoded, **changed), rf"{part} is missing, but should be \(2, 3")


@pytest.mark.parametrize(("scheme", "part"), [(scheme, part) for scheme in SCHEMES for part in
                                              ("zeros", "groups", "second_scale") if part not in parts_of(scheme)])
def test_a_tensor_too_many(scheme: Scheme, part: str) -> None:
    """Zero points that a symmetric scheme would leave unread."""
    changed: Any = {part: torch.zeros(2, 3)}
    refused(replace(drawn(scheme, SHAPE), **changed), f"{part} is given, but {scheme} has none")


@pytest.mark.parametrize(("scheme", "part"), EVERY_PART)
def test_a_tensor_of_another_shape(scheme: Scheme, part: str) -> None:
    """One expert less, which indexing by expert would find only in the last one."""
    encoded = drawn(scheme, SHAPE)
    one = encoded.tensors[part]
    changed: Any = {part: one[:1]}
    refused(replace(encoded, **changed), rf"{part}: shape \(1, 3.*\), but should be \(2, 3")


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if ENCODINGS[one].rows is not None])
def test_scales_of_all_rows_with_codes_of_some(scheme: Scheme) -> None:
    """A loader that cuts w13 and leaves its scales whole (https://github.com/vllm-project/vllm/issues/41511)."""
    whole = drawn(scheme, (384, 261))
    part = replace(whole.rows((0, 128)), scales=whole.scales)
    found, wanted = whole.scales.shape, whole.rows((0, 128)).scales.shape
    refused(part, rf"scales: shape \({found[0]}, {found[1]}\), but should be \({wanted[0]}, {wanted[1]}\)",
            shape=(128, 261))


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if ENCODINGS[one].columns and not ENCODINGS[one].order])
def test_scales_of_all_columns_with_codes_of_some(scheme: Scheme) -> None:
    """The same of w2."""
    whole = drawn(scheme, (130, 384))
    part = replace(whole.columns((128, 256)), scales=whole.scales)
    found = whole.scales.shape
    refused(part, rf"scales: shape \({found[0]}, {found[1]}\), but should be \({found[0]}, {found[1] // 3}\)",
            shape=(130, 128))


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if ENCODINGS[one].columns and not ENCODINGS[one].order])
def test_an_offset_that_was_forgotten(scheme: Scheme) -> None:
    """A part that begins inside a block and does not say so reads the next block's scale too early. Where the count of
    blocks tells, it is told."""
    size = ENCODINGS[scheme].columns
    assert size is not None
    part = drawn(scheme, (130, 4 * size)).columns((size - 1, 2 * size + 1))
    assert part.column_start == size - 1
    refused(replace(part, column_start=0), r"scales: shape \(\d+, 3\), but should be \(\d+, 2\)", shape=(130, size + 2))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_offsets_outside_the_first_block(scheme: Scheme) -> None:
    """A negative one would count blocks from the end."""
    encoding = ENCODINGS[scheme]
    columns = 1 if encoding.order else encoding.columns or 1
    for changed, words in (({"row_start": -1}, rf"row_start=-1, but should be 0 to {(encoding.rows or 1) - 1}"),
                           ({"column_start": columns}, rf"column_start={columns}, but should be 0 to {columns - 1}")):
        offset: Any = changed
        refused(replace(drawn(scheme, SHAPE), **offset), words)


@pytest.mark.parametrize("scheme", NARROW)
def test_a_byte_for_every_code(scheme: Scheme) -> None:
    """Codes that were unpacked already, or packed along the other axis as GPTQ stores them."""
    encoded = drawn(scheme, SHAPE)
    unpacked = torch.zeros(SHAPE, dtype=torch.uint8)
    refused(replace(encoded, codes=unpacked), r"codes: shape \(2, 3, 40, 261\), but should be \(2, 3, 40, 131\)")
    other_axis = torch.zeros(2, 3, 20, 261, dtype=torch.uint8)
    refused(replace(encoded, codes=other_axis), r"codes: shape \(2, 3, 20, 261\), but should be \(2, 3, 40, 131\)")


def test_columns_that_nobody_counted() -> None:
    """Of 131 bytes there are 261 or 262 columns."""
    refused(replace(drawn(Scheme.MXFP4, SHAPE), num_columns=262), "num_columns=262, but should be 261")


# Layers.


def changed_layer(scheme: Scheme, change: Callable[[QuantisedWeights], dict[str, Any]]) -> QuantisedWeights:
    """A right layer with some fields exchanged."""
    weights = layer(scheme)
    return replace(weights, **change(weights))


def rows_of(matrix: Encoded | None) -> Encoded:
    """Half of the rows."""
    assert matrix is not None
    return matrix.rows((0, matrix.shape[-2] // 2))


LAYERS: dict[str, tuple[Scheme, Callable[[QuantisedWeights], dict[str, Any]], type[Exception], str]] = {
    "half of w13": (Scheme.FP8_BLOCK, lambda one: {"w13": rows_of(one.w13)}, UsageValueError,
                    r"w13: codes: shape \(5, 2, 100, 96\), but should be \(5, 2, 200, 96\)"),
    "w2 transposed": (Scheme.INT8, lambda one: {"w2": drawn(Scheme.INT8, (5, 200, 96))}, UsageValueError,
                      r"num_columns=96, but should be 200.*codes: shape \(5, 200, 96\), but should be \(5, 96, 200\)"),
    "w2 of another scheme": (Scheme.GPTQ, lambda one: {"w2": layer(Scheme.AWQ).w2}, UsageTypeError,
                             "w2: scheme awq, but should be gptq as the weights"),
    "the shared expert unsharded": (Scheme.NVFP4, lambda one: {"shared_w2": None}, UsageValueError,
                                    "shared_w2 is missing, but the spec has shared_w2_HI"),
    "w2 in bf16": (Scheme.MXFP4, lambda one: {"w2": torch.zeros(5, 96, 200, dtype=torch.bfloat16)}, UsageTypeError,
                   "w2: Tensor, but should be Encoded"),
    "no w2": (Scheme.MXFP4, lambda one: {"w2": None}, UsageTypeError, "w2: NoneType, but should be Encoded"),
    "a scheme that encodes nothing": (Scheme.INT8, lambda one: {"scheme": Scheme.PLAIN}, UsageValueError,
                                      "scheme <Scheme.PLAIN: 'plain'>, but should be one of fp8tensor, fp8row"),
    "no input scales": (Scheme.FP8_TENSOR, lambda one: {"w2_input_scale_E": None}, UsageValueError,
                        r"w2_input_scale_E is missing, but should be \(5,\)"),
    "one input scale for all": (Scheme.FP8_TENSOR, lambda one: {"w13_input_scale_E": torch.ones(1)}, UsageValueError,
                                r"w13_input_scale_E: shape \(1,\), but should be \(5,\)"),
    "input scales in fp16": (Scheme.FP8_TENSOR, lambda one: {"w13_input_scale_E": torch.ones(5).half()}, UsageTypeError,
                             r"w13_input_scale_E: dtype torch\.float16, but should be torch\.float32"),
    "input scales of a scheme without": (Scheme.FP8_ROW, lambda one: {"w13_input_scale_E": torch.ones(5)},
                                         UsageValueError, "w13_input_scale_E is given, but there is no such parameter"),
    "a router of codes": (Scheme.FP8_ROW, lambda one: {"router_EH": torch.zeros(5, 96).to(torch.float8_e4m3fn)},
                          UsageTypeError, r"router_EH: dtype torch\.float8_e4m3fn, but should be torch\.float32 or"),
    "biases of one rank": (Scheme.AWQ, lambda one: {"w13_bias_EGI": torch.zeros(5, 2, 100)}, UsageValueError,
                           r"w13_bias_EGI: shape \(5, 2, 100\), but should be \(5, 2, 200\)"),
    "a router elsewhere": (Scheme.AWQ, lambda one: {"router_EH": torch.zeros(5, 96, device="meta")}, UsageTypeError,
                           r"router_EH: device meta, but should be cpu as w13\.codes"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_do_not_fit(name: str) -> None:
    scheme, change, kind, words = LAYERS[name]
    with pytest.raises(kind, match=words):
        check_held(changed_layer(scheme, change), SPEC, Parallel(), 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_whole_layer_on_one_of_two_ranks(scheme: Scheme) -> None:
    """Weights that nobody cut, and those of the other rank's shares."""
    weights = layer(scheme)
    with pytest.raises(UsageValueError, match=r"shape \(5, 2, 200.*\), but should be \(5, 2, 100"):
        check_quantised(weights, SPEC, Parallel(tp=2), 0)
    uneven = Parallel(tp=2, splits=(3, 1))
    with pytest.raises(UsageValueError, match=r"shape \(5, 2, 50.*\), but should be \(5, 2, 150"):
        check_quantised(weights.shard(uneven, 1), SPEC, uneven, 0)
    with pytest.raises(UsageValueError, match="rank=2, but should be an integer of at least 0 and below tp=2"):
        weights.shard(uneven, 2)
