"""moe_fast against a layer built on torch's grouped_mm, in one run: milliseconds, ratio, share of measured limits.

Both get the same bf16 weights, tokens and routing; the time is the median of the repetitions, measured with
CUDA events after a warm-up. The limits are what this machine reaches now: a device-to-device copy and
a square bf16 product. On a CPU, --device cpu runs a tiny shape to show that the script works; its numbers mean nothing.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import moe_fast
from moe_ref import MoEWeights, Routing
from moe_ref.contract.weights import parameter_shapes
from moe_ref.models.registry import find_model

SHAPES = (("mixtral.8x7b", (1, 16, 256, 4096)), ("qwen3.30b.a3b", (1, 16, 256, 4096)), ("olmoe.1b.7b", (1, 256, 8192)))
TINY = (("olmoe.1b.7b", (2,)),)
WARM_UP, REPETITIONS, MATRIX = 3, 15, 8192


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of one call."""
    for _ in range(WARM_UP if device.type == "cuda" else 1):
        call()
    times = []
    for _ in range(REPETITIONS if device.type == "cuda" else 1):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def torch_layer(x_TH: torch.Tensor, routing: Routing, weights: MoEWeights) -> torch.Tensor:
    """The layer as one would write it with torch alone: sort by expert, two grouped products, weighted scatter."""
    experts, top_k = len(weights.w2_EHI), routing.ids_TK.shape[1]
    order_R = routing.ids_TK.flatten().argsort(stable=True)
    ends_E = torch.bincount(routing.ids_TK.flatten(), minlength=experts).cumsum(0).int()
    rows_RH = x_TH[order_R // top_k]
    gate_up = torch._grouped_mm(rows_RH, weights.w13_EGIH.flatten(1, 2).transpose(1, 2), offs=ends_E)
    gate_RI, up_RI = gate_up.chunk(2, dim=-1)
    down_RH = torch._grouped_mm(F.silu(gate_RI) * up_RI, weights.w2_EHI.transpose(1, 2), offs=ends_E)
    weighted = down_RH * routing.weights_TK.flatten()[order_R, None]
    return torch.zeros_like(x_TH, dtype=torch.float32).index_add_(0, order_R // top_k, weighted).to(x_TH.dtype)


def limits(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy (read and written) and floating-point operations per second of a product."""
    if device.type != "cuda":
        return {}
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device)
    matrix = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device)
    product = milliseconds(lambda: matrix @ matrix, device)
    return {"copy_bytes_per_s": 2 * source.numel() / copy * 1e3, "product_flop_per_s": 2 * MATRIX**3 / product * 1e3}


def measure(model: str, tokens: tuple[int, ...], device: torch.device, deadline: float) -> list[dict]:
    """One row per number of tokens: both implementations on the same data."""
    spec = find_model(model).spec
    generator = torch.Generator(device).manual_seed(0)
    wanted = ("w13_EGIH", "w2_EHI", "router_EH")
    shapes = {name: shape for name, shape in parameter_shapes(spec).items() if name in wanted}
    weights = MoEWeights(**{name: torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
                            * shape[-1] ** -0.5 for name, shape in shapes.items()})
    rows = []
    for count in tokens:
        if time.monotonic() > deadline:
            break
        x_TH = torch.randn(count, spec.hidden_size, generator=generator, device=device, dtype=torch.bfloat16)
        routing = moe_fast.route(x_TH, weights, spec)
        ours = milliseconds(lambda: moe_fast.experts(x_TH, routing, weights, spec), device)  # noqa: B023
        theirs = milliseconds(lambda: torch_layer(x_TH, routing, weights), device)  # noqa: B023
        routed = milliseconds(lambda: moe_fast.moe(x_TH, weights, spec), device)  # noqa: B023
        per_row = 3 * spec.hidden_size * spec.intermediate_size
        visited = len(routing.ids_TK.unique())
        rows.append({"model": model, "tokens": count, "moe_fast_ms": ours, "torch_ms": theirs,
                     "with_router_ms": routed, "ratio": theirs / ours,
                     "flop_per_s": 2 * per_row * count * spec.top_k / ours * 1e3,
                     "weight_bytes_per_s": 2 * per_row * visited / ours * 1e3})
    return rows


@click.command()
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="JSON file for the numbers.")
@click.option("--seconds", type=float, default=120.0, help="No further shape is started after this time.")
def main(device: str, out: Path | None, seconds: float) -> None:
    """Print the table; shapes that the time did not allow are missing from it, and said so."""
    deadline, where = time.monotonic() + seconds, torch.device(device)
    torch.set_grad_enabled(False)
    shapes = SHAPES if device == "cuda" else TINY
    reached = limits(where)
    rows = [row for model, tokens in shapes for row in measure(model, tokens, where, deadline)]
    _print(rows, reached)
    missing = sum(len(tokens) for _, tokens in shapes) - len(rows)
    if missing:
        click.echo(f"{missing} shapes NOT RUN: the time was up")
    if out:
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        document = {"device": name, "torch": str(torch.__version__), "limits": reached, "rows": rows}
        out.write_text(json.dumps(document, indent=1))


def _print(rows: list[dict], reached: dict[str, float]) -> None:
    table = Table("model", "tokens", "moe_fast ms", "torch ms", "torch / moe_fast", "with router ms", "TFLOP/s",
                  "of product", "weights TB/s", "of copy", title="bf16, one rank, forward")
    for row in rows:
        product = f"{row['flop_per_s'] / reached['product_flop_per_s']:.0%}" if reached else "-"
        copy = f"{row['weight_bytes_per_s'] / reached['copy_bytes_per_s']:.0%}" if reached else "-"
        table.add_row(row["model"], str(row["tokens"]), f"{row['moe_fast_ms']:.3f}", f"{row['torch_ms']:.3f}",
                      f"{row['ratio']:.2f}", f"{row['with_router_ms']:.3f}", f"{row['flop_per_s'] / 1e12:.1f}", product,
                      f"{row['weight_bytes_per_s'] / 1e12:.2f}", copy)
    Console(width=140).print(table)
    for name, value in reached.items():
        click.echo(f"{name}: {value:.3e}")


if __name__ == "__main__":
    main()
