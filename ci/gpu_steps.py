"""The steps of the GPU lane as data: what each runs, its share of nine minutes, and what it needs to run at all.

In the order of how scarce their evidence is: what a step leaves of its share goes to the next one.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from moe_ref.tiers.tiers import tier

TOTAL_SECONDS = 530.0


@dataclass(frozen=True)
class Place:
    """Where the lane runs; num_devices: GPUs, 0 in a rehearsal, which runs on a CPU; lanes: cases side by side."""

    folder: Path
    num_devices: int
    lanes: int

    @property
    def device(self) -> str:
        """As the verbs name it."""
        return "cuda" if self.num_devices else "cpu"

    @property
    def lane(self) -> str:
        """Of ci/lanes.yaml; "" in a rehearsal."""
        return "" if self.num_devices == 0 else "gpu1" if self.num_devices == 1 else "gpuN"


@dataclass(frozen=True)
class Command:
    """One Python process. under: a tool that starts it; stdout: a file in the step's folder for what it prints."""

    arguments: tuple[str, ...]
    under: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    stdout: str = ""


@dataclass(frozen=True)
class Step:
    """commands(place, seconds): run one after the other, all of them, in at most so many seconds.

    missing(place): why it cannot run here, "" where it can. required: whether the lane fails if it is not run. goes_on:
    whether its commands go on with what is in its folder, which is else begun anew. last: whether it is done again
    after any other step. least: seconds under which it is not begun.
    """

    name: str
    what: str
    seconds: float
    commands: Callable[[Place, float], list[Command]]
    missing: Callable[[Place], str] = lambda place: ""
    required: bool = True
    goes_on: bool = False
    last: bool = False
    least: float = 3.0


SETUP = {
    "v1-T33.H96.I160.E8.K2-fp32-norm":
        "one rank, one dtype, no extras: gate and up swapped, transposed weights, another activation or softmax order",
    "v1-T8.H64.I64.E8.K2-fp32-norm": "H = I, where transposed weights raise no error of shapes",
    "v1-T33.H96.I160.E8.K2-bf16-norm": "the model's dtype: accumulation or storage in another format than declared",
    "v1-T33.H96.I160.E8.K2-fp16-norm": "fp16: a conversion by way of bf16, or scaled too far",
    "v1-T0.H64.I96.E4.K2-bf16-norm": "no tokens: an empty grid, a launch of nothing",
    "v1-T1.H64.I96.E4.K2-bf16-norm": "one token: strides of a single row, another path of kernels",
    "v1-T33.H96.I160.E8.K2-bf16-norm-exact-s1": "integers, in which every order of sums gives the same bits",
    "v1-T33.H96.I160.E8.K2-bf16-norm-tp2": "two ranks: which half of gate, up and down a rank has, and one sum",
}
"""The smallest cases, by what a mistake of an adapter or of the installation would be; read them first."""

GROWTH = ("moe_fast:ieee", "moe_fast:bf16", "moe_fast:fp16", "torch:loop:bf16", "model:sm90:bf16")
"""Measured curves of the kernels and of torch beside the one that was predicted before a device was seen."""
MUTANTS = ("B*", "I*", "K*", "right.fast", "right.overlapped-sums")
"""What only a GPU can run and a few seconds judge, and right layers beside it; A* need the large shapes."""
LARGE = {"rows": "A01.down-offset-32-bits", "experts": "A02.expert-offset-32-bits", "act": "A04.act-index-32-bits",
         "tokens": "A05.merge-mask-32-bits"}
"""Shapes of ci/large_shapes.py, each with a defect that it must show."""
SMALL = {"experts": "A02.expert-offset-16-bits"}
"""The same for the rehearsal, whose tensors are past 2^15 elements."""
LAYERS = ("mixtral.8x7b.T32", "mixtral.8x7b.T1024.E2", "qwen3.30b.a3b.T256", "deepseek.v3.T64.E16", "olmoe.1b.7b.T1")
"""Published widths: a whole Mixtral layer, a prefill, many experts, DeepSeek-V3's widths, a decode step."""
BENCH_TOKENS = (1, 16, 256, 4096)
HANG = ("--time-limit", "120")
"""For small cases, whose kernels may have to be compiled first, while as many others compile."""
REHEARSED = ("v1-T33.H128.I256.E8.K2-bf16-norm", "v1-T33.H128.I256.E8.K2-fp32-norm-exact")
"""Of the tier conformance."""
WORLD_OF_ONE = ("v1-T33.H96.I160.E8.K2-fp32-norm", "v1-T33.H96.I160.E8.K2-bf16-norm")


def _ref(*arguments: str, stdout: str = "") -> list[Command]:
    return [Command(("-m", "moe_ref", *arguments), stdout=stdout)]


def _deadline(seconds: float, reserve: float) -> tuple[str, str]:
    """For a verb that finishes what it has begun, which takes up to `reserve`."""
    return "--deadline", f"{max(1.0, seconds - reserve):.0f}"


def _verify(place: Place, name: str, seconds: float, *chosen: str, reserve: float = 20.0,
            implementation: str = "moe_fast") -> list[Command]:
    return _ref("verify", implementation, "--device", place.device, "--lanes", str(place.lanes), *chosen,
                *_deadline(seconds, reserve), "--record", str(place.folder / name), "--resume")


def _cases(names: tuple[str, ...]) -> list[str]:
    return [option for name in names for option in ("--case", name)]


def _environment(place: Place, seconds: float) -> list[Command]:
    file = place.folder / "environment" / "environment.json"
    return [Command(("-m", "ci.gpu_environment", str(file), "--device", place.device))]


def _fingerprint(place: Place, seconds: float) -> list[Command]:
    return _ref("fingerprint", "--device", place.device, "--json", stdout="fingerprint.json")


def _setup(place: Place, seconds: float) -> list[Command]:
    return _verify(place, "setup", seconds, *_cases(tuple(SETUP)), *HANG)


def _compile(place: Place, seconds: float) -> list[Command]:
    return [Command(("-m", "ci.gpu_warm"))]


def _matrix(place: Place, seconds: float) -> list[Command]:
    chosen = ("--tier", "quick") if place.num_devices else ("--tier", "smoke", "--shard", "1/25")
    return _verify(place, "matrix", seconds, *chosen, *HANG)


def _fp8(place: Place, seconds: float) -> list[Command]:
    chosen = ("--tier", "smoke") if place.num_devices else ("--tier", "smoke", "--shard", "1/25")
    return _verify(place, "fp8", seconds, *chosen, *HANG, reserve=10.0, implementation="moe_fast.fp8_training")


def _growth(place: Place, seconds: float) -> list[Command]:
    subjects, lengths = (GROWTH, "64:16384") if place.num_devices else (GROWTH[3:], "64:256")
    plot = ("--plot", str(place.folder / "growth" / "growth.svg")) if _installed("matplotlib") else ()
    return _ref("diverge", *subjects, "--k", lengths, "--device", place.device, "--record",
                str(place.folder / "growth"), *plot)


def _mutants(place: Place, seconds: float) -> list[Command]:
    chosen = ("--gpu-only", *(option for one in MUTANTS for option in ("--only", one)))
    if not place.num_devices:
        chosen = ("--only", "B05.*", "--only", "A02.expert-offset-16-bits")
    return _ref("score", *chosen, "--device", place.device, "--lanes", str(place.lanes), "--seconds", "150",
                *_deadline(seconds, 30), "--record", str(place.folder / "mutants"))


def _large(place: Place, seconds: float) -> list[Command]:
    common = ("--device", place.device, "--elements", str(2**31 if place.num_devices else 2**15),
              "--record", str(place.folder / "large"))
    wrong = [Command(("-m", "ci.large_shapes", name, *common, "--mutant", mutant))
             for name, mutant in (LARGE if place.num_devices else SMALL).items()]
    if not place.num_devices:
        return [Command(("-m", "ci.large_shapes", *LARGE, *common)), *wrong]
    # A process for each: none survives a fault of its device.
    return [*(Command(("-m", "ci.large_shapes", name, *common)) for name in LARGE), *wrong]


def _layers(place: Place, seconds: float) -> list[Command]:
    if not place.num_devices:
        return _verify(place, "layers", seconds, *_cases(("v1-granite3.1b.a400m.T1.E8-bf16",)))
    named = tuple(f"v1-{name}-bf16" for name in LAYERS)
    return _verify(place, "layers", seconds, *_cases(named), "--tp", "1,8", reserve=40.0)


def _bench(place: Place, seconds: float) -> list[Command]:
    tokens = ",".join(map(str, BENCH_TOKENS))
    shapes = ("--tp", "8,1", "--tokens", tokens, "--against", "torch:loop,torch:grouped,peers")
    if not place.num_devices:
        shapes = ("--tokens", "1", "--no-kernels", "--against", "torch:loop")
    return _ref("bench", "moe_fast", "--device", place.device, *shapes, "--operations", "experts",
                *_deadline(seconds, 20), "--record", str(place.folder / "bench"))


def _graphs(place: Place, seconds: float) -> list[Command]:
    return [Command(("-m", "ci.graphs", *_deadline(seconds, 15)))]


def _nccl(place: Place, seconds: float) -> list[Command]:
    if place.num_devices == 1:
        return _verify(place, "nccl", seconds, *_cases(WORLD_OF_ONE), "--ranks", "nccl", reserve=5.0)
    return _verify(place, "nccl", seconds, "--tier", "ranks", "--ranks", "nccl", "--minimum", "1", reserve=5.0)


def _sanitizer(place: Place, seconds: float) -> list[Command]:
    # A tensor in an allocation of its own has borders that the tool knows.
    under = (compute_sanitizer(), "--tool", "memcheck", "--error-exitcode", "1", "--target-processes",
             "application-only")
    return [Command(("-m", "ci.graphs", "--eager", *_deadline(seconds, seconds * 2 / 3)), under,
                    {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})]


def _adapters(place: Place, seconds: float) -> list[Command]:
    chosen = () if place.num_devices else ("--only", "torch.grouped_mm", *_cases(REHEARSED))
    return _ref("adapters", "run", "--device", place.device, "--lanes", str(place.lanes), *chosen,
                *_deadline(seconds, 20), "--record", str(place.folder / "adapters"))


def _report(place: Place, seconds: float) -> list[Command]:
    return _ref("report", str(place.folder), "--out", str(place.folder / "report"))


def compute_sanitizer() -> str:
    """Its path, "" where it is not installed."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer") or ""


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def _needs_gpu(place: Place) -> str:
    return "" if place.num_devices else "no GPU here"


def _needs_sanitizer(place: Place) -> str:
    return _needs_gpu(place) or ("" if compute_sanitizer() else "no compute-sanitizer here")


def _needs_pages(place: Place) -> str:
    absent = [name for name in ("jinja2", "matplotlib") if not _installed(name)]
    return f"{' and '.join(absent)} not installed: records alone, of which pages can be made elsewhere" * bool(absent)


def nccl_words(num_devices: int) -> str:
    """What the NCCL step leaves out on so many devices, counted."""
    larger = [one for one in tier("ranks").cases if one.case.parallel.size > num_devices]
    return f"{len(larger)} of {len(tier('ranks').cases)} cases want a device for each of more than {num_devices} ranks"


STEPS = (
    Step("environment", "versions, GPUs, driver, clocks", 15, _environment),
    Step("fingerprint", "how the device's matrix products round", 15, _fingerprint),
    Step("setup", "the smallest cases: where these fail, distrust all others", 35, _setup, goes_on=True),
    Step("compile", "kernels of later steps, side by side", 20, _compile, _needs_gpu, required=False),
    Step("matrix", "tier quick, tp 1 to 8 on virtual ranks", 110, _matrix, goes_on=True),
    Step("fp8", "training in 8 bits, tier smoke", 25, _fp8, required=False, goes_on=True),
    Step("growth", "error against the length of sums", 30, _growth),
    Step("mutants", "defects that only a GPU can show", 40, _mutants, goes_on=True),
    Step("large", "tensors past 2^31 elements, forward and backward", 60, _large, goes_on=True),
    Step("layers", "whole layers of published models", 55, _layers, goes_on=True),
    Step("bench", "times beside torch and installed peers", 30, _bench, required=False),
    Step("adapters", "installed implementations of other projects", 30, _adapters, required=False, goes_on=True),
    Step("graphs", "CUDA graphs against eager calls", 25, _graphs, _needs_gpu, required=False),
    Step("nccl", "process ranks over NCCL", 15, _nccl, _needs_gpu, required=False, goes_on=True),
    Step("sanitizer", "small layers under compute-sanitizer", 15, _sanitizer, _needs_sanitizer, required=False,
         least=40),
    Step("report", "pages of all records", 10, _report, _needs_pages, required=False, last=True),
)
