"""The cross-compile gate: what it compiles is what a GPU would launch, and what it is there to catch, it catches."""

import ast
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import moe_fast
import moe_fast.launch
import tests.compile_kernels as wrong
from moe_fast.architecture import assuming
from moe_fast.compile import lanes as lanes_module
from moe_fast.compile.cases import CASES
from moe_fast.compile.combinations import Combination, combination_of, combinations_of
from moe_fast.compile.lanes import Observe, compile_all
from moe_fast.compile.own import own_combinations
from moe_fast.compile.recorder import META, Launch, record
from moe_fast.compile.resources import Resources, faults
from moe_fast.compile.table import compare, read_table, triton_series, write_table
from moe_fast.compile.targets import ARCHITECTURES
from moe_fast.kernels import align, route
from moe_fast.launch import launch, recording
from moe_ref import Router
from moe_ref.cli.compile_commands import compile_command
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.vocabulary import Direction
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_encoded_shards, build_shards

ROOT = Path(__file__).resolve().parents[1]
SMALL = "v1-T64.H128.I96.E4.K2-bf16-norm-bwd"
OLD = Resources(registers=100, spill_bytes=0, shared_bytes=4096, matrix=("HGMMA.64x128x16.F32",))


def combinations(architecture: str, kernel: object = wrong.product_kernel, **arguments: object) -> Combination:
    return combination_of(Launch(kernel, arguments), architecture)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


# What is compiled


def started() -> set[str]:
    """Names of the kernels that moe_fast starts, read from its sources; "kernel" is what `launch_grouped` was given."""
    names = ("launch", "launch_grouped")
    calls = [node for file in (ROOT / "moe_fast").rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names]
    return {ast.unparse(call.args[0]) for call in calls} - {"kernel"}


def test_every_kernel_is_compiled() -> None:
    """A kernel that no case of the gate launches would be compiled for the first time on a user's GPU."""
    assert {one.name for one in own_combinations(["sm_90"])} == started()


def test_every_dtype_and_tile_of_the_products_is_compiled() -> None:
    """Tiles follow the rows per expert: 16, 32, 64 and more; fp16, bf16 and fp32 are different code."""
    found = {(dict(one.types)["x"], dict(one.constants)["BLOCK_M"])
             for one in combinations_of(map(parse_case, CASES), ["sm_90"]) if one.name == "gate_up_kernel"}
    assert found == {("*bf16", 16), ("*bf16", 32), ("*bf16", 64), ("*bf16", 128), ("*fp16", 64), ("*fp32", 64)}


def test_the_gate_stays_small() -> None:
    """It runs with every change: 440 combinations are minutes, and each is there once."""
    keys = [one.key for one in own_combinations(ARCHITECTURES)]
    assert len(keys) == len(set(keys)) <= 440


@pytest.mark.nightly("too dear for the gate, and for the default run")
def test_a_router_of_256_experts_fits_into_registers() -> None:
    """The widest that selects beside its product, too dear for the gate: a whole layer would come with it."""
    router = Router(num_experts=256, top_k=8, score="sigmoid", selection_bias="score", num_groups=8, num_groups_kept=4,
                    group_score="top2_sum", renormalize=True)
    chosen = []
    for architecture in ARCHITECTURES:
        launches: list[Launch] = []
        with assuming(architecture), recording(lambda *one, found=launches: found.append(Launch(*one))):
            route.route(meta(8192, 7168), meta(256, 7168), None, None, meta(256), None, router)
        assert [one.kernel.fn.__name__ for one in launches] == ["route_kernel"]
        chosen.append(combination_of(launches[0], architecture))
    for one, found in zip(chosen, compile_all(chosen, 2), strict=True):
        assert not faults(one, found)


def test_a_key_names_one_combination() -> None:
    """Two that differ in anything the compiler sees must not share a line of the table."""
    cases = [parse_case(text) for text in (*CASES, SMALL, "v1-T3.H128.I96.E4.K2-bf16-norm")]
    seen: dict[str, Combination] = {}
    for architecture in ("sm_80", "gfx942"):
        for case in cases:
            for one in (combination_of(found, architecture) for found in record(case, architecture)):
                assert seen.setdefault(one.key, one) == one


@pytest.mark.parametrize("text", [SMALL, "v1-T64.H128.I96.E4.K2-bf16-awq32-norm-sh33",
                                  "v1-T64.H128.I96.E4.K2-bf16-gptqorder32-norm", "v1-T64.H128.I96.E4.K2-fp16-int8-norm",
                                  "v1-T64.H128.I96.E4.K2-bf16-mxfp4-norm", "v1-T64.H128.I96.E4.K2-bf16-nvfp4-norm"])
def test_recorded_launches_are_those_of_a_real_call(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, dtypes, strides and sizes; a CPU has other tiles, so what follows from those is left out."""
    real: list[Launch] = []
    monkeypatch.setattr(moe_fast.launch, "interpret", lambda kernel, grid, arguments: _run(real, kernel, arguments))
    monkeypatch.setattr(align, "FEW_ROWS_INTERPRETED", align.FEW_ROWS)
    monkeypatch.setattr(route, "route_cut", _cut_of_a_gpu)
    case = parse_case(text)
    inputs = build_inputs(case.problem)
    if case.direction is Direction.FORWARD:
        moe_fast.moe(inputs.x_TH, build_encoded_shards(case.problem, case.parallel)[0], case.problem.spec)
    else:
        shard = build_shards(case.problem, case.parallel)[0]
        for _, tensor in shard.named_tensors():
            tensor.requires_grad_()
        y_TH = moe_fast.moe(inputs.x_TH.requires_grad_(), shard, case.problem.spec)
        y_TH.backward(torch.empty_like(y_TH))
    assert [_seen(one) for one in record(case, "sm_90")] == [_seen(one) for one in real]


def _cut_of_a_gpu(device: torch.device, *shapes: object, of: Callable[..., route.Cut] = route.route_cut) -> route.Cut:
    with assuming("sm_90"):
        return of(META, *shapes)


def _run(launches: list[Launch], kernel: object, arguments: dict[str, object]) -> None:
    """Nothing is run, so that the time of the interpreter is not spent; results stay as they were allocated."""
    launches.append(Launch(kernel, arguments))


def _seen(one: Launch) -> tuple[str, list[object]]:
    arguments = [(name, value.dtype, value.storage_offset()) if isinstance(value, torch.Tensor) else (name, value)
                 for name, value in one.arguments.items()
                 if isinstance(value, torch.Tensor) or name.startswith("stride_") or name.endswith("_size")]
    return one.kernel.fn.__name__, arguments


def test_constants_and_hints_follow_the_arguments() -> None:
    """As a launch on a GPU derives them: 1 is a constant, multiples of 16 and aligned addresses are known as such."""
    tensor = meta(64, 64)
    arguments = {"y": meta(64, dtype=torch.float32), "BLOCK": 64}

    def hints(x: torch.Tensor, size: int) -> tuple[str, str | None]:
        one = combinations("sm_90", wrong.one_branch_kernel, x=x, size=size, **arguments)
        return dict(one.hints)["x"], dict(one.hints).get("size")
    assert hints(tensor, 32) == ("D", "D")
    assert hints(tensor, 33) == ("D", "")
    assert hints(tensor.view(-1)[1:], 32) == ("", "D")
    assert hints(tensor.view(-1)[8:], 1) == ("D", None), "an offset of 16 bytes is aligned, 1 is a constant"


def test_tensors_of_2_gib_are_not_addressed_in_32_bits_on_amd() -> None:
    """The compiler may take 32-bit offsets of a tensor that it is told to be small."""
    arguments = {"y": meta(64, dtype=torch.float32), "size": 32, "BLOCK": 64}
    small, large = (dict(combinations("gfx942", wrong.one_branch_kernel, x=meta(size, 2**20), **arguments).hints)["x"]
                    for size in (1023, 1024))
    assert (small, large) == ("DS", "D")


def test_meta_tensors_are_refused_outside_of_a_recording() -> None:
    with pytest.raises(UsageTypeError, match=r"one_branch_kernel: tensors on meta, but should be on cpu or cuda"):
        launch(wrong.one_branch_kernel, (1,), META)


# What is found


@pytest.mark.nightly("products of 8 bits are looked at by default")
def test_products_in_bf16_run_on_matrix_units_and_fit() -> None:
    """The instructions that each architecture has for large tiles, no spill, shared memory within the limit."""
    wanted = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32_32x32x8_bf16"}
    chosen = [one for one in combinations_of([parse_case("v1-mixtral.8x7b.T4096-bf16-tp8")], ARCHITECTURES)
              if one.name == "gate_up_kernel"]
    found = dict(zip([one.architecture for one in chosen], compile_all(chosen, 2), strict=True))
    assert {name: {kind.partition(".")[0] for kind in what.matrix} for name, what in found.items()} == {
        name: {kind} for name, kind in wanted.items()}
    assert [reason for one in chosen for reason in faults(one, found[one.architecture])] == []


def test_products_of_8_bits_run_on_units_for_them() -> None:
    """Blocks of fp8 on sm_90 and sm_100; elsewhere codes are decoded to fp16, which holds every one."""
    wanted = {"sm_80": "HMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA", "gfx942": "v_mfma_f32_32x32x8_f16"}
    chosen = [one for one in combinations_of([parse_case("v1-mixtral.8x7b.T4096-bf16-fp8block-tp8")], ARCHITECTURES)
              if one.name == "scaled_gate_up_kernel"]
    for one, found in zip(chosen, compile_all(chosen, 2), strict=True):
        assert {kind.partition(".")[0] for kind in found.matrix} == {wanted[one.architecture]}
        assert faults(one, found) == []


@pytest.mark.nightly("other products of 8 bits are compiled by default")
def test_rows_under_one_scale_each_compile() -> None:
    """fp8row, which the gate leaves out: its products are those of fp8tensor but for where rows lie."""
    chosen = [one for one in combinations_of([parse_case("v1-mixtral.8x7b.T256-fp16-fp8row-tp8")], ARCHITECTURES)
              if one.name in ("round_rows_kernel", "scaled_gate_up_kernel", "scaled_down_kernel")]
    assert len(chosen) == 4 * len(ARCHITECTURES)
    for one, found in zip(chosen, compile_all(chosen, 2), strict=True):
        assert faults(one, found) == []


def test_what_the_interpreter_accepts_and_the_compiler_refuses_is_a_fault() -> None:
    one = combinations("sm_90", wrong.one_branch_kernel, x=meta(64), y=meta(64), size=32, BLOCK=64)
    [found] = compile_all([one], 1)
    assert found.registers == 0
    assert "does not compile: CompilationError" in faults(one, found)[0]


def test_a_spill_and_a_cast_before_the_product_are_seen() -> None:
    """Too few registers for the accumulators; and operands in fp32, which leave the matrix units."""
    arguments = {"x": meta(1, 32, 32), "y": meta(32, 32, dtype=torch.float32), "SIZE": 32, "COPIES": 1}
    narrow = combinations("sm_80", UPCAST=False, num_warps=1, maxnreg=32, **arguments)
    spilled, plain = compile_all([narrow, combinations("sm_80", UPCAST=True, **arguments)], 2)
    assert faults(narrow, spilled) == [f"{spilled.spill_bytes} bytes spilled per thread, but a product should spill "
                                       "none"]
    assert (plain.dots, plain.matrix) == (("f32",), ())


def test_more_shared_memory_than_a_block_may_have_is_a_fault() -> None:
    """The compiler reports it, and the launch would fail."""
    arguments = {"x": meta(1, 32, 32), "y": meta(32, 32), "SIZE": 32, "COPIES": 1, "UPCAST": False}
    for architecture, limit in (("sm_80", 166912), ("sm_90", 232448), ("sm_100", 232448), ("gfx942", 65536)):
        one = combinations(architecture, **arguments)
        assert faults(one, replace(OLD, shared_bytes=limit)) == []
        assert faults(one, replace(OLD, shared_bytes=limit + 1)) == [
            f"{limit + 1} bytes of shared memory, but a block on {architecture} has {limit}"]


def test_a_16_bit_product_without_matrix_instructions_is_a_fault() -> None:
    one = combinations("sm_90", x=meta(1, 32, 32), y=meta(32, 32), SIZE=32, COPIES=1, UPCAST=False)
    assert faults(one, Resources(registers=40, dots=("bf16",))) == [
        "products of bf16 without a matrix instruction"]
    assert faults(one, Resources(registers=40, dots=("f32",))) == [], "fp32 in full precision has none"


def test_a_compiler_that_hangs_or_dies_is_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next combination of its lane gets a new process."""
    first = combinations("sm_90", wrong.one_branch_kernel, x=meta(64), y=meta(64), size=32, BLOCK=64)
    second = combinations("sm_90", x=meta(1, 32, 32), y=meta(32, 32), SIZE=32, COPIES=1, UPCAST=False)
    monkeypatch.setattr(lanes_module, "TIME_LIMIT", 0.01)

    def observe(combination: Combination, found: Resources) -> None:
        monkeypatch.setattr(lanes_module, "TIME_LIMIT", 180.0)
    died, alive = compile_all([first, second], 1, observe)
    assert died.error.startswith("the compiler's process ended with code -9")
    assert alive.matrix == ("HMMA.16816.F32",)


@pytest.mark.nightly("the lane compile compares with an accepted table")
def test_the_same_combination_compiles_to_the_same_numbers() -> None:
    """Without this no table could be accepted."""
    one = combinations("sm_90", x=meta(2, 64, 64), y=meta(64, 64), SIZE=64, COPIES=2, UPCAST=False)
    first, second = compile_all([one], 1), compile_all([one], 1)
    assert first == second
    assert first[0].registers > 0


# The table


@pytest.mark.parametrize(("now", "reason"), [
    (replace(OLD, registers=111), "111 registers, accepted were 100"),
    (replace(OLD, spill_bytes=4), "4 bytes spilled per thread, accepted were none"),
    (replace(OLD, shared_bytes=4097), "4097 bytes of shared memory, accepted were 4096"),
    (replace(OLD, matrix=("HMMA.16816.F32",)), "no HGMMA any more, now HMMA"),
    (replace(OLD, matrix=()), "no HGMMA any more, now no matrix instruction"),
], ids=["registers", "spill", "shared", "kind", "none"])
def test_a_regression_is_named(now: Resources, reason: str) -> None:
    assert compare({"a kernel": OLD}, {"a kernel": now}).worse == [f"a kernel: {reason}"]


@pytest.mark.parametrize("now", [OLD, replace(OLD, registers=110), replace(OLD, registers=50, shared_bytes=0),
                                 replace(OLD, matrix=("HGMMA.64x256x16.F32", "HMMA.16816.F32"))])
def test_what_is_no_worse_passes(now: Resources) -> None:
    """A tenth more registers is within what the compiler moves by; other shapes of the same instruction are no loss."""
    assert compare({"a kernel": OLD}, {"a kernel": now}).worse == []


def test_what_is_gone_and_what_is_new_are_told_apart() -> None:
    found = compare({"gone": OLD, "both": OLD}, {"both": OLD, "new": OLD})
    assert (found.missing, found.new, found.num_compared) == (["gone"], ["new"], 1)


def test_a_table_is_read_as_written(tmp_path: Path) -> None:
    """One line per combination, so that a diff shows what changed."""
    path = tmp_path / "table.json"
    table = {"b": OLD, "a": replace(OLD, registers=7, matrix=())}
    write_table(path, table)
    assert read_table(path) == table
    assert [line[:3] for line in path.read_text().splitlines()[1:-1]] == ['"a"', '"b"']


def test_another_tritons_table_is_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_table(path, {"a": OLD})
    path.write_text(path.read_text().replace(f'"triton": "{triton_series()}"', '"triton": "2.1"'))
    assert read_table(path) is None
    assert read_table(tmp_path / "none.json") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"columns": []}', '{"columns": 3, "combinations": {}}'])
def test_a_file_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UsageValueError, match=r"but should be a table that `moe-ref compile --accept` wrote"):
        read_table(path)


def test_the_accepted_table_is_of_the_gates_own_combinations() -> None:
    """One that is neither compared nor missed would be no evidence."""
    table = read_table(ROOT / f"ci/baselines/compile-triton-{triton_series()}.json")
    if table is None:
        pytest.skip(f"no table of Triton {triton_series()} is accepted")
    assert table.keys() == {one.key for one in own_combinations(ARCHITECTURES)}


# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """`moe-ref compile` with a compiler that is asked once per combination and has learnt its answers."""
    def compile_all(combinations: list[Combination], lanes: int, observe: Observe) -> list[Resources]:
        for one in combinations:
            observe(one, OLD)
        return [OLD for _ in combinations]

    monkeypatch.setattr(moe_fast.compile, "compile_all", compile_all)

    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(compile_command, list(arguments), standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result.return_value, result.stdout
    return call


def test_the_command_passes_and_fails_by_the_table(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Exit code 0 against what was accepted, 1 with a sentence where that was better or held more."""
    path = tmp_path / "table.json"
    code, text = run("--accept", "--baseline", str(path))
    assert (code, text.splitlines()[-1].split()[0]) == (0, "PASS")
    path.write_text(path.read_text().replace("[100,", "[90,", 1))
    code, text = run("--baseline", str(path))
    assert code == 1
    assert "100 registers, accepted were 90" in text
    write_table(path, {**(read_table(path) or {}), "sm_90 lost_kernel | | ": OLD})
    code, text = run("--baseline", str(path), "--json", "--arch", "sm_90")
    assert "sm_90 lost_kernel | | : accepted, but no longer launched" in json.loads(text)["failures"]
    code, text = run("--baseline", str(path), "--arch", "sm_100")
    assert code == 0, "a row of another architecture is not missed"


def test_without_a_table_nothing_is_compared(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, text = run("--arch", "sm_90", "--case", SMALL, "--baseline", str(tmp_path / "none.json"))
    assert code == 0
    assert "printed, not compared" in text
    assert Counter(line.split()[0] for line in text.splitlines())["sm_90"] == len(started_by(SMALL))


def started_by(case_id: str) -> set[str]:
    return {one.kernel.fn.__name__ for one in record(parse_case(case_id), "sm_90")}


@pytest.mark.parametrize(("arguments", "message"), [
    (("--arch", "sm_91"), "--arch sm_91, but should be of sm_80, sm_90, sm_100, gfx942"),
    (("--case", SMALL, "--models"), "--case, --models and --tiles exclude each other"),
    (("--tiles", "--models"), "--case, --models and --tiles exclude each other"),
    (("--accept", "--tiles"), "the table is of the gate's own cases"),
    (("--accept", "--arch", "sm_90"), "the table is of the gate's own cases"),
    (("moe_ref",), "'moe_ref' has no moe_ref.compile"),
    (("no_such_layer",), "unknown implementation"),
])
def test_wrong_use_is_refused(run: Callable[..., tuple[int, str]], arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageValueError) as error:
        run(*arguments)
    assert message in str(error.value)
