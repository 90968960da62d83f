"""What a contiguous copy of weights costs where a transposed view would do: grouped products of torch on this machine.

Checkpoints store experts (E, out, in); a grouped product x @ w takes (E, in, out), which their transposed view is. Some
layers call .contiguous() on it first, in every call. Products of fp8 are the other way round: torch takes the view
alone, so that a layer which keeps (E, in, out) has to copy to (E, out, in). Both orders, one after the other, in one
process: ratios of one run mean something, times of two machines do not, and no test depends on either.

usage: python -m ci.layout_copies [--device cpu] [--rows N] [--experts N] [--shape NAME]
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import click
import torch
from torch.nn import functional

from moe_ref.bench.memory import free_bytes

LARGEST = 448.0
WARM_UP = 1


@dataclass(frozen=True)
class Sizes:
    """Experts of a released model on one device."""

    experts: int
    hidden: int
    intermediate: int

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """(out, in) of gate and up together, and of down."""
        return {"gate_up": (2 * self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}


SHAPES = {"mixtral.8x7b": Sizes(8, 4096, 14336), "qwen3.30b": Sizes(128, 2048, 768)}
"""As published: mistralai/Mixtral-8x7B-v0.1 and Qwen/Qwen3-30B-A3B."""


@dataclass(frozen=True)
class Measured:
    """Milliseconds, medians: of the product of a view, of a copy, and of the product of the copy.

    weight_bytes: of the matrices. product_bytes: read and written by a product that reads every expert once.
    """

    view: float
    copy: float
    copied: float
    weight_bytes: int
    product_bytes: int

    @property
    def share(self) -> float:
        """What of copy and product together is the copy."""
        return self.copy / (self.copy + self.copied)

    @property
    def ratio(self) -> float:
        """Copy and product over the product of a view."""
        return (self.copy + self.copied) / self.view


def even_ends(rows: int, experts: int, device: str) -> torch.Tensor:
    """Where each expert's rows end, if loads are even: int32, (E,)."""
    ends = [rows * (expert + 1) // experts for expert in range(experts)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def bf16_product(stored_ENK: torch.Tensor, rows_RK: torch.Tensor, ends_E: torch.Tensor) -> Measured:
    """Of weights stored (E, out, in), as a view, and copied to (E, in, out) first."""
    view_EKN, results = stored_ENK.transpose(1, 2), []

    def product(w_EKN: torch.Tensor) -> torch.Tensor:
        return functional.grouped_mm(rows_RK, w_EKN, offs=ends_E)

    copied_EKN = view_EKN.contiguous()
    times = [median(run, stored_ENK.device, results) for run in (
        lambda: product(view_EKN), lambda: view_EKN.contiguous(), lambda: product(copied_EKN))]
    # Each store errs by at most half a unit of bf16, 2^-9 of its number; what sums in fp32 lose is far below that.
    off, size = torch.dist(results[0].float(), results[2].float()), results[0].float().norm()
    assert off <= 2**-8 * size, "another product"
    return _measured(times, stored_ENK, rows_RK, results[0])


def fp8_product(stored_ENK: torch.Tensor, rows_RK: torch.Tensor, ends_E: torch.Tensor) -> Measured:
    """The same in e4m3 with a scale for each row of both: of weights stored (E, out, in), and (E, in, out) copied."""
    codes_ENK, scales_EN = in_fp8(stored_ENK)
    codes_RK, scales_R = in_fp8(rows_RK)
    other_EKN, results = codes_ENK.transpose(1, 2).contiguous(), []
    by_row = functional.ScalingType.RowWise

    def product(w_ENK: torch.Tensor) -> torch.Tensor:
        return functional.scaled_grouped_mm(
            codes_RK, w_ENK.transpose(1, 2), scales_R, by_row, scales_EN, by_row, offs=ends_E,
            output_dtype=torch.bfloat16)

    copied_ENK = other_EKN.transpose(1, 2).contiguous()
    times = [median(run, stored_ENK.device, results) for run in (
        lambda: product(codes_ENK), lambda: other_EKN.transpose(1, 2).contiguous(), lambda: product(copied_ENK))]
    assert torch.equal(results[0], results[2]), "another product"
    return _measured(times, codes_ENK, codes_RK, results[0])


def in_fp8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of e4m3, and the scale of each row in fp32."""
    scales = matrix.abs().amax(-1).float() / LARGEST
    return (matrix / scales[..., None]).to(torch.float8_e4m3fn), scales


def _measured(times: list[float], weights: torch.Tensor, rows: torch.Tensor, result: torch.Tensor) -> Measured:
    weight_bytes, rows_bytes, result_bytes = (one.numel() * one.element_size() for one in (weights, rows, result))
    view, copy, copied = times
    return Measured(view, copy, copied, weight_bytes, weight_bytes + rows_bytes + result_bytes)


def median(run: Callable[[], torch.Tensor], device: torch.device, results: list[torch.Tensor], repeats: int = 5,
           ) -> float:
    """Milliseconds of a call, until the device is done; the last result is appended."""
    times, result = [], torch.empty(0)
    for number in range(WARM_UP + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= WARM_UP:
            times.append(1000 * (time.perf_counter() - began))
    results.append(result)
    return statistics.median(times)


KINDS = {"bf16": bf16_product, "fp8": fp8_product}


def lines(name: str, sizes: Sizes, rows: int, device: str) -> Iterator[str]:
    """A row of the table for each product and format, or why it is not there."""
    for product, (out_features, in_features) in sizes.products.items():
        for kind, measure in KINDS.items():
            words = f"{name:13} {sizes.experts:7} {product:8} {kind:5} {rows:6}"
            needed = 2 * 3 * sizes.experts * out_features * in_features
            if kind == "fp8" and device != "cuda":
                yield f"{words}  not run: needs CUDA"
            elif needed > (free := free_bytes(device)):
                yield f"{words}  not run: needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
            else:
                generator = torch.Generator(device).manual_seed(1)
                stored_ENK = torch.empty(sizes.experts, out_features, in_features, dtype=torch.bfloat16, device=device)
                stored_ENK.uniform_(-1, 1, generator=generator)
                rows_RK = torch.empty(rows, in_features, dtype=torch.bfloat16, device=device)
                rows_RK.uniform_(-1, 1, generator=generator)
                found = measure(stored_ENK, rows_RK, even_ends(rows, sizes.experts, device))
                yield (f"{words} {found.view:9.3f} {found.copy:9.3f} {found.copied:9.3f} {found.ratio:7.2f} "
                       f"{found.share:6.1%} {found.product_bytes / 2**20:9.0f} {2 * found.weight_bytes / 2**20:9.0f}")


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rows", type=click.IntRange(1), multiple=True, default=(256,), show_default=True, help="Routed rows.")
@click.option("--experts", type=click.IntRange(1), help="No more than so many, as one rank of several holds.")
@click.option("--shape", "names", type=click.Choice(list(SHAPES)), multiple=True, default=tuple(SHAPES))
def main(device: str, rows: tuple[int, ...], experts: int | None, names: tuple[str, ...]) -> None:
    """Times in milliseconds; ratio: copy and its product over the view's product; share: of the two the copy."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    click.echo(f"torch {torch.__version__} on {where}; medians of 5")
    click.echo(f"{'model':13} {'experts':>7} {'product':8} {'kind':5} {'rows':>6} {'view ms':>9} {'copy ms':>9} "
               f"{'of copy':>9} {'ratio':>7} {'share':>6} {'MiB read':>9} {'MiB copy':>9}")
    for name in names:
        sizes = SHAPES[name]
        held = replace(sizes, experts=min(experts or sizes.experts, sizes.experts))
        for count in rows:
            for line in lines(name, held, count, device):
                click.echo(line)


if __name__ == "__main__":
    main()
