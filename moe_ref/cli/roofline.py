"""`bench --roofline`: what an implementation's kernels would take on a device, predicted; nothing is timed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moe_ref.cli.parts import part_of
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.models.registry import find_model

PREDICTION = "PREDICTION: from compiled kernels and assumptions, not measured; to be confirmed on the device"
_WIDTH = 150


def show_roofline(implementation: str, device_name: str, models: Sequence[str], degrees: Sequence[int],
                  tokens: Sequence[int], dtype: str, kernels: bool, as_json: bool) -> int:
    """A table of kernels for each layer, if asked for, and one of all layers; or one JSON document."""
    roofline = part_of(implementation, "roofline", "its times cannot be predicted")
    gate = part_of(implementation, "compile", "its kernels cannot be cross-compiled")
    if device_name not in roofline.DEVICES:
        raise UsageValueError(f"--roofline {device_name!r}, but should be one of {', '.join(roofline.DEVICES)}")
    device, compiler = roofline.DEVICES[device_name], _Compiler(gate)
    cases = [f"v1-{find_model(model).name}.T{count}-{dtype}-tp{tp}"
             for model in models for tp in degrees for count in tokens]
    console = Console(stderr=True)
    found = {text: roofline.predict_layer(parse_case(text), device, compiler)
             for text in track(cases, "predict", console=console, transient=True, disable=not console.is_terminal)}
    if as_json:
        click.echo(json.dumps({"evidence": False, "note": PREDICTION, "device": device_name, "layers": [
            {"case": text, "seconds": layer.seconds, "least": layer.least, "kernels": list(_rows(layer))}
            for text, layer in found.items()]}, indent=1))
        return 0
    shown = Console(width=_WIDTH, emoji=False)
    for text, layer in found.items() if kernels else ():
        shown.print(_table(text, layer))
    shown.print(_summary(found))
    shown.print(PREDICTION, highlight=False, markup=False)
    return 0


class _Compiler:
    """Resources of combinations: of the accepted table where it has them, else compiled, each once."""

    def __init__(self, gate: Any) -> None:
        path = gate.BASELINES / f"compile-triton-{gate.triton_series()}.json"
        self._gate, self._known = gate, dict(gate.read_table(path) or {})

    def __call__(self, combinations: Sequence[Any]) -> list[Any]:
        todo = {one.key: one for one in combinations if one.key not in self._known}
        self._known.update(zip(todo, self._gate.compile_all(list(todo.values()), 2), strict=True))
        for one in combinations:
            if error := self._known[one.key].error:
                raise UsageValueError(f"{one.key} does not compile: {error}")
        return [self._known[one.key] for one in combinations]


def _rows(layer: Any) -> Iterator[dict[str, Any]]:
    """A row per kernel; of those that are no product only the time."""
    for one in layer.kernels:
        row: dict[str, Any] = {"part": one.part, "seconds": one.seconds}
        if one.time is not None:
            shape, time = one.product, one.time
            row |= {"tile": f"{shape.block_m}x{shape.block_n}x{shape.block_k}", "warps": shape.warps,
                    "stages": shape.stages, "programs": time.programs, "per_multiprocessor": time.per_multiprocessor,
                    "waves": time.waves, "num_bytes": time.num_bytes, "flop": shape.flop,
                    "padded_flop": time.padded_flop, "wasted_rows": shape.wasted_rows, "bound": time.bound,
                    "of_limit": time.of_limit}
        yield row


def _summary(found: Mapping[str, Any]) -> Table:
    """A line per layer; of the routed products their share of the limit and what bounds them."""
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "us", "of limit", "gate_up", "", "down", "", "shared", "router", "others", "wasted rows"):
        table.add_column(name, justify="left" if name in ("layer", "") else "right")
    for text, layer in found.items():
        by_part = {one.part: one for one in layer.kernels}
        products = [by_part["gate_up"], by_part["down"]]
        named = [cell for one in products
                 for cell in (f"{1e6 * one.seconds:.1f}", f"{one.time.of_limit:.0%} {one.time.bound}")]
        shared = sum(one.seconds for one in layer.kernels if one.part.startswith("shared"))
        others = sum(one.seconds for one in layer.kernels if one.time is None)
        router = by_part["router"].seconds if "router" in by_part else 0.0
        table.add_row(text, f"{1e6 * layer.seconds:.1f}", f"{layer.least / layer.seconds:.0%}", *named,
                      *(f"{1e6 * seconds:.1f}" for seconds in (shared, router, others)),
                      f"{products[0].product.wasted_rows:.0%}")
    return table


def _table(text: str, layer: Any) -> Table:
    table = Table(title=f"{text}: {1e6 * layer.seconds:.1f} us, {layer.least / layer.seconds:.0%} of the limit",
                  title_justify="left", box=None, pad_edge=False)
    for name in ("kernel", "us", "of limit", "bound", "tile", "programs", "per SM", "waves", "MB", "GFLOP", "padded",
                 "wasted rows"):
        table.add_column(name, justify="left" if name in ("kernel", "bound", "tile") else "right")
    others = [one.seconds for one in layer.kernels if one.time is None]
    for row in _rows(layer):
        if "tile" in row:
            table.add_row(row["part"], f"{1e6 * row['seconds']:.1f}", f"{row['of_limit']:.0%}", row["bound"],
                          f"{row['tile']} {row['warps']}w {row['stages']}s", str(row["programs"]),
                          str(row["per_multiprocessor"]), str(row["waves"]), f"{row['num_bytes'] / 1e6:.1f}",
                          f"{row['flop'] / 1e9:.2f}", f"{row['padded_flop'] / 1e9:.2f}", f"{row['wasted_rows']:.0%}")
    table.add_row(f"{len(others)} others", f"{1e6 * sum(others):.1f}")
    return table
