"""What the oracle costs: its loop against its own upcasts and products, its gauges, and its memory.

Times are the fastest of the repetitions, ratios are within one run; run it on an idle machine. Memory is the high
water mark (VmHWM) of a fresh process, and its anonymous part at the end (RssAnon) where a file is mapped. A limit
that is missed makes the exit code 1.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import moe_ref
from moe_ref import ExpertWeights, MoELayer, MoESpec, MoEWeights, Router, Routing
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.weights import parameter_shapes
from moe_ref.inputs.build import build_inputs
from moe_ref.models.registry import find_model
from moe_ref.oracle.gauges import routed_with_gauges

MODEL, TOKENS, REPETITIONS = "mixtral.8x7b", (32, 256, 2048), 3
LONG_ENOUGH_S = 60.0
"""Calls this slow repeat well; no further turn is taken."""
LOOP_LIMIT, GAUGES_LIMIT, MANY_TOKENS = 1.3, 3.0, 2048
STREAMED, STREAM_TOKENS, STREAM_LIMIT_GIB = "deepseek.v3", 32, 6.0
GIB = 2.0**30


def seconds(call: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def balanced_routing(num_tokens: int, num_experts: int, top_k: int) -> Routing:
    """Every expert gets the same number of tokens."""
    ids_TK = (torch.arange(num_tokens * top_k) % num_experts).reshape(num_tokens, top_k)
    return Routing(ids_TK, torch.full(ids_TK.shape, 1.0 / top_k))


def mixtral_weights(spec: MoESpec) -> MoEWeights:
    """One expert's bf16 numbers behind all experts: larger than any cache, so reading it costs the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(spec)
    one = {name: torch.randn(shapes[name][1:], generator=generator).mul_(0.02).bfloat16()
           for name in ("w13_EGIH", "w2_EHI")}
    return MoEWeights(**{name: tensor.expand(spec.num_experts, *tensor.shape) for name, tensor in one.items()},
                      router_EH=torch.zeros(shapes["router_EH"], dtype=torch.bfloat16))


def products(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights, upcast: bool) -> float:
    """Seconds of the loop's two fp64 products per expert and nothing else; upcast=False reuses one fp64 copy."""
    w13, w2 = weights.w13_EGIH[0].flatten(0, 1), weights.w2_EHI[0]
    intermediate, num_experts = w2.shape[1], len(weights.w2_EHI)
    copies = None if upcast else (w13.double(), w2.double())
    rows = x_TH[:routing.ids_TK.numel() // num_experts].double()
    began = time.perf_counter()
    for _ in range(num_experts):
        act = (rows @ (copies[0] if copies else w13.double()).T)[:, :intermediate].contiguous()
        act @ (copies[1] if copies else w2.double()).T
    return time.perf_counter() - began


def time_loop(num_tokens: int, repetitions: int) -> dict[str, float]:
    """Seconds of the loop, of upcasts and products, of products alone, and of the loop with gauges."""
    spec = find_model(MODEL).spec
    assert spec.router is not None
    weights, routing = mixtral_weights(spec), balanced_routing(num_tokens, spec.num_experts, spec.top_k)
    x_TH = torch.randn(num_tokens, spec.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    times: dict[str, list[float]] = {"loop": [], "upcasts": [], "products": [], "gauges": []}
    calls = {"loop": lambda: seconds(lambda: moe_ref.experts(x_TH, routing, weights, spec)),
             "upcasts": lambda: products(x_TH, routing, weights, upcast=True),
             "products": lambda: products(x_TH, routing, weights, upcast=False),
             "gauges": lambda: seconds(lambda: routed_with_gauges(x_TH, routing, weights, spec))}
    # In turns, so that a slow moment of the machine does not fall on one of them; the gauges apart, since the memory
    # they give back slows down whoever comes next.
    for names in (("loop", "upcasts", "products"), ("gauges",)):
        began = time.perf_counter()
        for turn in range(repetitions):
            if turn and time.perf_counter() - began > LONG_ENOUGH_S:
                break
            for name in names:
                times[name].append(calls[name]())
    return {name: min(values) for name, values in times.items()}


def memory(field: str) -> float:
    """GiB of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / GIB
    raise KeyError(field)


def every_expert(x_TH: torch.Tensor, weights: moe_ref.WeightSource, spec: MoESpec) -> Routing:
    """The layer routes, which costs memory too; then the slots are dealt out, so that every expert is read."""
    moe_ref.route(x_TH, weights, spec)
    return balanced_routing(len(x_TH), spec.num_experts, spec.top_k)


def stream_generated() -> dict[str, float | int]:
    """A layer of DeepSeek-V3, its experts drawn one after the other by the input generator."""
    inputs = build_inputs(parse_case(f"v1-{STREAMED}.T{STREAM_TOKENS}-bf16").problem)
    spec, began = inputs.problem.spec, time.perf_counter()
    routing = every_expert(inputs.x_TH, inputs.weights, spec)
    y_TH = moe_ref.moe(inputs.x_TH, inputs.weights, spec, routing=routing)
    assert bool(torch.isfinite(y_TH).all())
    return {"GiB": memory("VmHWM"), "experts": len(routing.ids_TK.unique()), "seconds": time.perf_counter() - began}


class MappedExperts:
    """Experts in a file of raw bf16 numbers, mapped; the other parameters from the generator."""

    def __init__(self, path: Path, like: moe_ref.WeightSource, spec: MoESpec) -> None:
        self._like, shapes = like, parameter_shapes(spec)
        self._shapes = (shapes["w13_EGIH"][1:], shapes["w2_EHI"][1:])
        self._sizes = [torch.Size(shape).numel() for shape in self._shapes]
        self._all = torch.from_file(str(path), shared=True, size=sum(self._sizes) * spec.num_experts,
                                    dtype=torch.bfloat16).view(spec.num_experts, -1)

    def __getattr__(self, name: str) -> object:
        return getattr(self._like, name)

    def expert(self, e: int) -> ExpertWeights:
        return ExpertWeights(*(part.view(shape) for part, shape in
                               zip(self._all[e].split(self._sizes), self._shapes, strict=True)))

    def shared_expert(self) -> ExpertWeights | None:
        return self._like.shared_expert()


def stream_mapped() -> dict[str, float | int]:
    """The same layer from a memory-mapped file (sparse: zeros where nothing was written; expert 0 is written)."""
    inputs = build_inputs(parse_case(f"v1-{STREAMED}.T{STREAM_TOKENS}-bf16").problem)
    spec = inputs.problem.spec
    numbers = torch.cat([tensor.flatten() for tensor in inputs.weights.expert(0)[:2] if tensor is not None])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experts.bf16"
        with path.open("wb") as file:
            file.write(numbers.view(torch.uint8).numpy().data)
            file.truncate(2 * numbers.numel() * spec.num_experts)
        began = time.perf_counter()
        source = MappedExperts(path, inputs.weights, spec)
        routing = every_expert(inputs.x_TH, source, spec)
        moe_ref.moe(inputs.x_TH, source, spec, routing=routing)
        return {"GiB": memory("VmHWM"), "anonymous GiB": memory("RssAnon"), "experts": len(routing.ids_TK.unique()),
                "seconds": time.perf_counter() - began}


class OneOfEight:
    """A group of eight ranks as rank 3 sees it while layers are built: all build the same."""

    rank, size, device = 3, 8, torch.device("cpu")

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor] * self.size


def build_shard() -> dict[str, float | int]:
    """A 256-expert layer for one rank of eight: on the meta device, then its shard alone, written once."""
    spec = MoESpec(hidden_size=2048, intermediate_size=1024, router=Router(num_experts=256, top_k=8))
    groups, before = moe_ref.Groups(tp=OneOfEight()), memory("VmRSS")  # pyrefly: ignore
    layer = MoELayer(spec, Parallel(tp=8), groups, dtype=torch.bfloat16, device="meta")
    after_meta = memory("VmHWM")
    layer.to_empty(device="cpu")
    shard = 0
    for parameter in layer.parameters():
        parameter.data.fill_(0.5)
        shard += parameter.numel() * parameter.element_size()
    return {"before GiB": before, "meta GiB": after_meta - before, "shard GiB": shard / GIB,
            "peak GiB": memory("VmHWM") - before}


MEMORY = {"generated": stream_generated, "mapped": stream_mapped, "shard": build_shard}


def in_fresh_process(*arguments: str) -> dict[str, float]:
    """What a section measures in a process of its own, with large pages as the harness uses them."""
    result = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True,
                            env={**os.environ, "THP_MEM_ALLOC_ENABLE": "1"})
    return json.loads(result.stdout.splitlines()[-1])


def loop_rows(tokens: tuple[int, ...], repetitions: int) -> list[tuple[str, str, str, bool]]:
    rows = []
    for num_tokens in track(tokens, description="loop", console=Console(stderr=True)):
        took = in_fresh_process("--section", "loop", "--tokens", str(num_tokens), "--repetitions", str(repetitions))
        checks = [("loop / its upcasts and products", took["loop"] / took["upcasts"], LOOP_LIMIT)]
        if num_tokens >= MANY_TOKENS:
            checks.append(("loop / products alone", took["loop"] / took["products"], LOOP_LIMIT))
        checks.append(("gauges on top / loop", (took["gauges"] - took["loop"]) / took["loop"], GAUGES_LIMIT))
        rows += [(f"{MODEL}, {num_tokens} tokens: {label} ({took['loop']:.2f} s)", f"{value:.2f}", f"{limit:g}",
                  value <= limit) for label, value, limit in checks]
    return rows


def memory_rows() -> list[tuple[str, str, str, bool]]:
    rows = []
    for section in track(("generated", "mapped"), description="memory", console=Console(stderr=True)):
        got = in_fresh_process("--section", section)
        peak = got["GiB"] if section == "generated" else got["anonymous GiB"]
        what = "peak" if section == "generated" else f"anonymous memory (peak with mapped pages {got['GiB']:.2f} GiB)"
        rows.append((f"{STREAMED} {section}, {got['experts']:.0f} of 256 experts hit, {got['seconds']:.0f} s: {what}",
                     f"{peak:.2f} GiB", f"{STREAM_LIMIT_GIB:g} GiB", peak <= STREAM_LIMIT_GIB))
    got = in_fresh_process("--section", "shard")
    limit = got["shard GiB"] + 0.05
    rows.append((f"256 experts on one rank of eight: meta device {1024 * got['meta GiB']:.1f} MiB, then its shard of "
                 f"{got['shard GiB']:.3f} GiB: peak", f"{got['peak GiB']:.3f} GiB", f"{limit:.3f} GiB",
                 got["peak GiB"] <= limit))
    return rows


@click.command(help=__doc__)
@click.option("--tokens", default=",".join(map(str, TOKENS)), help="Token counts, separated by commas.")
@click.option("--repetitions", default=REPETITIONS, show_default=True)
@click.option("--section", type=click.Choice(["loop", *MEMORY]), help="Measure in this process and print JSON.")
def main(tokens: str, repetitions: int, section: str | None) -> None:
    counts = tuple(int(part) for part in tokens.split(","))
    if section:
        print(json.dumps(time_loop(counts[0], repetitions) if section == "loop" else MEMORY[section]()))
        return
    rows = loop_rows(counts, repetitions) + memory_rows()
    title = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    table = Table("what", "measured", "limit", "", title=title)
    for what, measured, limit, good in rows:
        table.add_row(what, measured, limit, "ok" if good else "MISSED")
    Console(width=150).print(table)
    sys.exit(0 if all(row[-1] for row in rows) else 1)


if __name__ == "__main__":
    main()
