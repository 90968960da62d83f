"""Protects what `bench --roofline` counts: programs and their order, bytes, padding, blocks that fit; a prediction is
never better than the limit, and says that it is one.
"""

import json
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from click.testing import CliRunner
from triton.tools.tensor_descriptor import TensorDescriptor

import moe_fast.compile
from moe_fast.compile.recorder import record
from moe_fast.compile.resources import Resources
from moe_fast.kernels.grouped import grouped_tile
from moe_fast.launch import launch
from moe_fast.roofline import DEVICES, predict_layer
from moe_fast.roofline.predict import blocks_per_multiprocessor, predict
from moe_fast.roofline.product import Product, product_of
from moe_fast.roofline.walk import order, waves
from moe_ref.bench.problem import Operation, rank_layer
from moe_ref.bench.work import Load, operation_work
from moe_ref.cli.main import cli
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.vocabulary import Dtype

H100 = DEVICES["H100"]
FOUND = Resources(registers=128, shared_bytes=100 * 1024, dots=("bf16",), matrix=("HGMMA.64x128x16.F32",))
PREFILL = "v1-mixtral.8x7b.T2048-bf16-tp8"


def products(case_id: str) -> dict[str, Product]:
    """Of a layer's launches on sm_90, by kernel."""
    case = parse_case(case_id)
    found = [product_of(one, case.problem.num_tokens) for one in record(case, "sm_90")]
    return {one.kernel: one for one in found if one}


def small(blocks: int = 5, columns: int = 3, group: int = 2, **others: object) -> Product:
    """So many full blocks, two for each expert."""
    given = {"kernel": "down_kernel", "blocks": tuple((number // 2, 16) for number in range(blocks)),
             "out": 32 * columns, "inner": 256, "parts": 1, "itemsize": 2, "rows_bytes": blocks * 16 * 256 * 2,
             "block_m": 16, "block_n": 32, "block_k": 64, "group": group, "warps": 4, "stages": 3}
    return Product(**(given | others))


# Programs


@triton.jit
def order_kernel(found, num_blocks, num_columns, GROUP: tl.constexpr):
    block, column = grouped_tile(tl.program_id(0), num_blocks, num_columns, GROUP)
    tl.store(found + 2 * tl.program_id(0), block)
    tl.store(found + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize(("blocks", "columns", "group"), [(5, 3, 2), (4, 1, 8), (7, 4, 1), (1, 6, 8)])
def test_programs_come_in_the_order_of_the_kernels(blocks: int, columns: int, group: int) -> None:
    """Told by the function that the kernels themselves use."""
    found = torch.empty(blocks * columns, 2, dtype=torch.int32)
    launch(order_kernel, (blocks * columns,), found.device, found=found, num_blocks=blocks, num_columns=columns,
           GROUP=group)
    assert [tuple(pair) for pair in found.tolist()] == list(order(small(blocks, columns, group)))


def test_products_are_read_from_launches() -> None:
    """Mixtral's rank of 8 in prefill: 4096 rows in blocks of 128, none of them padded."""
    gate_up = products(PREFILL)["gate_up_kernel"]
    assert (gate_up.out, gate_up.inner, gate_up.parts, gate_up.rows) == (1792, 4096, 2, 4096)
    assert (gate_up.block_m, len(gate_up.blocks), gate_up.columns, gate_up.wasted_rows) == (128, 32, 14, 0)
    down = products(PREFILL)["down_kernel"]
    assert (down.out, down.inner, down.parts, down.block_m) == (4096, 1792, 1, 128)
    decode = products("v1-mixtral.8x7b.T1-bf16-tp8")["gate_up_kernel"]
    assert (decode.blocks, decode.wasted_rows) == (((0, 1), (1, 1)), 1 - 1 / 16)


def test_an_operand_behind_a_descriptor_is_its_tensor() -> None:
    """Kernels are handed descriptors of weights and of rows in expert order, here of three operands."""
    launches = [one for one in record(parse_case(PREFILL), "sm_90") if product_of(one, 2048)]
    plain = [replace(one, arguments={name: value.base if isinstance(value, TensorDescriptor) else value
                                     for name, value in one.arguments.items()}) for one in launches]
    assert sum(one.arguments[name] is not other.arguments[name] for one, other in zip(launches, plain, strict=True)
               for name in one.arguments) == 3
    assert [product_of(one, 2048) for one in plain] == [product_of(one, 2048) for one in launches]


def test_useful_work_is_that_of_a_benchmark() -> None:
    """The formulas of moe_ref.bench.work, which know nothing of tiles: here every expert is visited."""
    found = products(PREFILL)
    spec = rank_layer("mixtral.8x7b", 8, Dtype.BF16).spec
    work = operation_work(spec, Operation.EXPERTS, Load(2048, 4096, 8, 2))
    assert sum(found[name].flop for name in ("gate_up_kernel", "down_kernel")) == work.flop
    # Rows between the kernels go through memory: act twice, down once; the merge's tokens are no product's.
    between = 2 * (2 * 4096 * 1792 + 4096 * 4096) - 2 * 2048 * 4096
    least = sum(found[name].least_bytes for name in ("gate_up_kernel", "down_kernel"))
    assert least == work.num_bytes + between


# Bytes


def test_everything_comes_once_where_the_cache_holds_it() -> None:
    """And then the walk moves exactly the least."""
    product = small()
    walked = waves(product, 4, 2**30)
    assert sum(one.num_bytes for one in walked) == product.least_bytes
    assert [one.programs for one in walked] == [4, 4, 4, 3]


def test_weights_come_again_where_the_cache_is_small() -> None:
    """A group walks its columns together: its weights come once for its blocks, and rows once for each column."""
    product = small(blocks=4, columns=3, group=2)
    two_stripes = product.weight_stripe + 16 * 256 * 2
    assert sum(one.weights for one in waves(product, 1, two_stripes)) == 2 * 3 * product.weight_stripe
    alone = sum(one.weights for one in waves(replace(product, group=1), 1, two_stripes))
    assert alone == 4 * 3 * product.weight_stripe
    whole = small(blocks=4, columns=3, group=1)
    assert sum(one.weights for one in waves(whole, 1, 2**30)) == 2 * 3 * whole.weight_stripe


def test_tokens_that_several_experts_read_come_once() -> None:
    """rows_bytes is what x has; K experts read each of its rows."""
    shared = small(rows_bytes=5 * 16 * 256)
    assert sum(one.rows for one in waves(shared, 4, 2**30)) == shared.rows_bytes


# Times


@pytest.mark.parametrize(("found", "warps", "fits"), [
    (Resources(registers=128, shared_bytes=0), 4, 4), (Resources(registers=129, shared_bytes=0), 4, 3),
    (Resources(registers=32, shared_bytes=113 * 1024), 4, 2), (Resources(registers=32, shared_bytes=114 * 1024), 4, 1),
    (Resources(registers=16, shared_bytes=0), 8, 8), (Resources(registers=255, shared_bytes=227 * 1024), 8, 1)])
def test_blocks_that_fit(found: Resources, warps: int, fits: int) -> None:
    """Registers in units of 8, a kibibyte of shared memory for each block itself, 64 warps."""
    assert blocks_per_multiprocessor(warps, found, H100) == fits


@pytest.mark.parametrize("case_id", ["v1-mixtral.8x7b.T1-bf16-tp8", "v1-deepseek.v3.T64-bf16-tp8", PREFILL])
def test_no_prediction_beats_the_limit(case_id: str) -> None:
    """Least bytes and useful operations against the two limits of the device."""
    for product in products(case_id).values():
        time = predict(product, FOUND, H100)
        assert time.seconds > time.least
        assert time.padded_flop >= product.flop
        assert time.num_bytes >= product.least_bytes - product.rows_bytes


def test_what_slows_a_kernel_is_seen() -> None:
    """Half of the multiprocessors, a slower instruction, fewer bytes in flight, padding."""
    product = products(PREFILL)["gate_up_kernel"]
    ideal = replace(H100, l2=1e15, port=1e15, memory=1e15, latency=0.0, launch=0.0)
    time = predict(product, FOUND, ideal)
    assert time.bound == "matrix"
    # 448 programs on 132 multiprocessors are four rounds, the last of them for some alone.
    assert time.seconds == pytest.approx(product.flop / ideal.flop * 4 * 132 / 448)
    slow = predict(product, replace(FOUND, matrix=("HMMA.16816.F32",)), ideal)
    assert slow.seconds == pytest.approx(time.seconds / ideal.plain_matrix)
    waiting = predict(replace(product, stages=2), FOUND, replace(ideal, latency=1e-3))
    assert (waiting.bound, waiting.seconds) == ("latency", pytest.approx(1e-3 * (1 + 64 * waiting.waves)))


def test_every_kernel_of_a_layer_has_a_time() -> None:
    """The shared expert's kernels by name; those that are no product by their bytes."""
    asked = []

    def compiler(combinations: list) -> list[Resources]:
        asked.extend(combinations)
        return [FOUND for _ in combinations]
    layer = predict_layer(parse_case("v1-deepseek.v3.T64-bf16-tp8"), H100, compiler)
    assert [one.part for one in layer.kernels if one.time] == ["router", "gate_up", "down", "shared gate_up",
                                                               "shared down"]
    assert len(asked) == 5
    assert layer.kernels[-1].part == "combine"
    merged = 64 * 9 * 7168 * 2 + 64 * 7168 * 2
    assert layer.kernels[-1].seconds == pytest.approx(H100.launch + merged / H100.memory, rel=0.01)
    assert layer.seconds == sum(one.seconds for one in layer.kernels) > layer.least


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(moe_fast.compile, "compile_all", lambda combinations, lanes: [FOUND for _ in combinations])
    result = CliRunner().invoke(cli, ["bench", *arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_the_command_says_that_it_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(monkeypatch, "moe_fast", "--roofline", "H100", "--tp", "8", "--tokens", "1,64")
    assert text.count("of the limit") == 2
    short = run(monkeypatch, "moe_fast", "--roofline", "H100", "--tp", "8", "--tokens", "1,64", "--no-kernels")
    assert text.endswith(short)
    assert [line.split()[0] for line in short.splitlines()[1:3]] == [
        "v1-mixtral.8x7b.T1-bf16-tp8", "v1-mixtral.8x7b.T64-bf16-tp8"]
    assert text.splitlines()[-1].startswith("PREDICTION")
    assert "gate_up" in text


def test_the_document_has_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(monkeypatch, "moe_fast", "--roofline", "H100", "--tp", "8", "--tokens", "64", "--json")
    document = json.loads(text)
    assert (document["evidence"], document["device"]) == (False, "H100")
    [layer] = document["layers"]
    assert layer["seconds"] == pytest.approx(sum(one["seconds"] for one in layer["kernels"]))
    assert {"tile", "waves", "num_bytes", "wasted_rows", "bound", "of_limit"} <= layer["kernels"][0].keys()


@pytest.mark.parametrize(("arguments", "message"), [
    (("moe_fast", "--roofline", "H1000"), "--roofline 'H1000', but should be one of H100"),
    (("moe_fast", "moe_ref", "--roofline", "H100"), "--roofline with 2 implementations"),
    (("moe_ref", "--roofline", "H100"), "'moe_ref' has no moe_ref.roofline"),
    (("moe_fast", "--roofline", "H100", "--model", "nothing"), "unknown model")])
def test_wrong_use_is_refused(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageValueError) as error:
        run(monkeypatch, *arguments)
    assert message in str(error.value)
