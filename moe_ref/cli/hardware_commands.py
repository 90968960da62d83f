"""`fingerprint`: what small products reveal of a device's matrix products, and which hardware class that is."""

import json
from dataclasses import asdict

import click

from moe_ref.numerics.fingerprint import Fingerprint
from moe_ref.verify.hardware import Hardware, hardware_class, simulated_class
from moe_ref.verify.run.environment import default_device


@click.command("fingerprint")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--simulate", default=None, help="The simulated tensor core of a hardware class instead, as sm90.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def fingerprint_command(device: str, simulate: str | None, as_json: bool) -> None:
    """What a device's matrix products do: accumulator width, rounding or cutting, products at once, tf32 operands."""
    found = simulated_class(simulate) if simulate else hardware_class(default_device() if device == "auto" else device)
    if as_json:
        click.echo(json.dumps({"class": found.name, "reason": found.reason, "simulated": simulate is not None,
                               "fingerprints": [_document(one) for one in found.fingerprints]}, indent=1))
        return
    _print(found)


def _document(one: Fingerprint) -> dict[str, object]:
    return {**asdict(one), "operand": one.operand.value, "accumulator": one.accumulator}


def _print(found: Hardware) -> None:
    click.echo(f"{'operands':9} {'their bits':18} {'sum':17} {'rounding':9} {'bits kept':10} products at once")
    for one in found.fingerprints:
        bits = f"{one.operand_bits}" + f" ({one.operand_rounding})" * (one.operand_rounding != "none")
        total = one.accumulator + f" ({one.significand_bits} bits)" * (one.accumulator.startswith(("fp", "bf")))
        click.echo(f"{one.operand.value:9} {bits:18} {total:17} {one.rounding:9} "
                   f"{one.kept_bits or 'not shown':<10} {one.products_per_step or 'not shown'}")
    click.echo(f"class     {found.name}: {found.reason}")
