"""`list` and `show`: what would run, and what a case or a model is, in words. Neither imports torch."""

import json

import click

from moe_ref.cli.describe import describe_case, describe_model
from moe_ref.contract.case_id import parse_case
from moe_ref.models.registry import models
from moe_ref.tiers.tiers import MINIMUM_EXECUTED, tier


@click.command("list")
@click.option("--tier", "tier_name", default="smoke", show_default=True, type=click.Choice(list(MINIMUM_EXECUTED)))
@click.option("--models", "list_models", is_flag=True, help="List the named models instead.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def list_command(tier_name: str, list_models: bool, as_json: bool) -> None:
    """Case ids of a tier with their purpose, or the named models."""
    if list_models:
        rows = [{"model": name, "title": model.title, "source": model.source} for name, model in models().items()]
        click.echo(json.dumps({"models": rows}, indent=1) if as_json
                   else "\n".join(f"{row['model']:24} {row['title']}" for row in rows))
        return
    chosen = tier(tier_name)
    cases = [{"case": one.case_id, "ranks": one.ranks.value, "purpose": one.purpose} for one in chosen.cases]
    if as_json:
        click.echo(json.dumps({"tier": chosen.name, "minimum_executed": chosen.minimum_executed,
                               "axis_pairs": [chosen.pairs_covered, chosen.pairs_possible], "cases": cases}, indent=1))
        return
    for case in cases:
        click.echo(f"{case['case']:64} {case['ranks']:5} {case['purpose']}")
    click.echo(f"{len(cases)} cases, at least {chosen.minimum_executed} must run, "
               f"{chosen.pairs_covered} of {chosen.pairs_possible} axis pairs covered")


@click.command("show")
@click.argument("case_or_model")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def show_command(case_or_model: str, as_json: bool) -> None:
    """A case (by id) or a model (by name) in words: shapes per stage and rank, placements, communication, bounds."""
    if case_or_model in models():
        lines = describe_model(models()[case_or_model])
    else:
        lines = describe_case(parse_case(case_or_model))
    click.echo(json.dumps(dict(lines), indent=1) if as_json
               else "\n".join(f"{key:14} {value}" for key, value in lines))
