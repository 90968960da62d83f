"""One combination compiled, with the tools of the Triton wheel, and what the result takes. Nothing is run."""

import re
import subprocess
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from io import StringIO
from pathlib import Path

import triton
from triton.backends.compiler import BaseBackend
from triton.compiler import ASTSource, CompiledKernel, make_backend

from moe_fast.compile.combinations import Combination
from moe_fast.compile.targets import ARCHITECTURES
from moe_fast.form import parse_form

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_SASS_MATRIX = re.compile(r"\b(?:HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|UTC[A-Z]*MMA)[.\w]*")
_AMD_MATRIX = re.compile(r"\bv_mfma_\w+")
_DOT = re.compile(r"tt\.dot\b.*: tensor<[^>]*x(\w+)>")
_NARROW = frozenset({"f16", "bf16", "f8E4M3FN"})


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes; error: why it did not compile, "" where it did.

    registers: per thread, vector registers on AMD. spill_bytes: spilled per thread (NVIDIA: stores that ptxas reports;
    AMD: scratch). shared_bytes: per block. dots: operand types of its matrix products, as in MLIR. matrix: the matrix
    instructions in the machine code, looked for where there are dots.
    """

    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    dots: tuple[str, ...] = ()
    matrix: tuple[str, ...] = ()
    error: str = ""
    seconds: float = field(default=0.0, compare=False)


def faults(combination: Combination, found: Resources) -> list[str]:
    """What is wrong whatever was accepted before: a sentence each. Only products must not spill."""
    if found.error:
        return [f"does not compile: {found.error}"]
    limit, reasons = ARCHITECTURES[combination.architecture].shared_memory, []
    if found.shared_bytes > limit:
        reasons.append(f"{found.shared_bytes} bytes of shared memory, but a block on {combination.architecture} has "
                       f"{limit}")
    if found.dots and found.spill_bytes:
        reasons.append(f"{found.spill_bytes} bytes spilled per thread, but a product should spill none")
    if _NARROW.intersection(found.dots) and not found.matrix:
        reasons.append(f"products of {', '.join(found.dots)} without a matrix instruction")
    return reasons


def compile_one(combination: Combination) -> Resources:
    """Compile and look; a failure of the compiler is a result with `error`."""
    start = time.perf_counter()
    target = ARCHITECTURES[combination.architecture].target
    # ptxas counts spills only in its log, which Triton prints on request.
    triton.knobs.nvidia.dump_ptxas_log = True
    try:
        with redirect_stdout(StringIO()) as log:
            compiled = triton.compile(_source(combination, make_backend(target)), target=target,
                                      options=dict(combination.options))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return Resources(error=f"{type(error).__name__}: {lines[0][:200]}", seconds=time.perf_counter() - start)
    dots = tuple(sorted(set(_DOT.findall(compiled.asm["ttir"]))))
    measure = _nvidia if ARCHITECTURES[combination.architecture].is_nvidia else _amd
    registers, spill_bytes, matrix = measure(compiled, log.getvalue(), bool(dots))
    return Resources(registers, spill_bytes, compiled.metadata.shared, dots, matrix,
                     seconds=time.perf_counter() - start)


def _source(combination: Combination, backend: BaseBackend) -> ASTSource:
    module, _, name = combination.kernel.partition(":")
    kernel = getattr(import_module(module), name)
    place = {argument: (index,) for index, argument in enumerate(kernel.arg_names)}
    constants = {place[name]: parse_form(str(value)) if name == "FORM" else value
                 for name, value in combination.constants}
    attributes = {place[name]: backend.parse_attr(hint) for name, hint in combination.hints}
    return ASTSource(kernel, dict(combination.types), constants, attributes)


def _nvidia(compiled: CompiledKernel, log: str, has_dots: bool) -> tuple[int, int, tuple[str, ...]]:
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    assert registers is not None, f"no log of ptxas, so this was in Triton's cache: {log!r}"
    assert spilled is not None
    matrix = _instructions(_SASS_MATRIX, _disassembled(compiled.asm["cubin"])) if has_dots else ()
    return int(registers[1]), int(spilled[1]), matrix


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def _amd(compiled: CompiledKernel, log: str, has_dots: bool) -> tuple[int, int, tuple[str, ...]]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, f"no {name} in the assembly's metadata"
        return int(found[1])

    return number("vgpr_count"), number("private_segment_fixed_size"), _instructions(_AMD_MATRIX, text)


def _instructions(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    """Names without the modifiers that follow shape and accumulator."""
    return tuple(sorted({".".join(name.split(".")[:3]) for name in pattern.findall(text)}))
