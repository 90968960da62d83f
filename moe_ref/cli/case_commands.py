"""`list` and `show`: what would run, and what a case or a model is, in words. `list` imports no torch."""

import json
from difflib import get_close_matches

import click

from moe_ref.cli.describe import describe_case, describe_model, model_document, model_row
from moe_ref.contract.case_id import PREFIX, parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.features import features_of
from moe_ref.models.registry import models
from moe_ref.tiers.tiers import MINIMUM_EXECUTED, tier


@click.command("list")
@click.option("--tier", "tier_name", default="smoke", show_default=True, type=click.Choice(list(MINIMUM_EXECUTED)))
@click.option("--models", "list_models", is_flag=True, help="List the named models instead.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def list_command(tier_name: str, list_models: bool, as_json: bool) -> None:
    """Case ids of a tier with their purpose, or the named models."""
    if list_models:
        _list_models(as_json)
        return
    chosen = tier(tier_name)
    cases = [{"case": one.case_id, "ranks": one.ranks.value, "purpose": one.purpose} for one in chosen.cases]
    if as_json:
        click.echo(json.dumps({"tier": chosen.name, "minimum_executed": chosen.minimum_executed,
                               "axis_pairs": [chosen.pairs_covered, chosen.pairs_possible], "cases": cases},
                              indent=1))
        return
    for case in cases:
        click.echo(f"{case['case']:64} {case['ranks']:5} {case['purpose']}")
    click.echo(f"{len(cases)} cases, at least {chosen.minimum_executed} must run, "
               f"{chosen.pairs_covered} of {chosen.pairs_possible} axis pairs covered")


def _list_models(as_json: bool) -> None:
    rows = [model_row(model) for model in models().values()]
    if as_json:
        click.echo(json.dumps({"models": rows}, indent=1))
        return
    for row, model in zip(rows, models().values(), strict=True):
        words = [*sorted(features_of(model.spec)), *["an injected routing"] * (model.routing == "injected")]
        click.echo(f"{row['model']:28} {row['family']:22} {'; '.join(words) or 'a plain layer'}")


@click.command("show")
@click.argument("case_or_model")
@click.option("--tp", type=click.IntRange(min=1), help="Shapes of a model on so many ranks; a case names its own.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def show_command(case_or_model: str, tp: int | None, as_json: bool) -> None:
    """A case (by id) or a model (by name) in words.

    A model: family, mathematics step by step, shapes per rank, released numerics, source. A case: shapes per stage
    and rank, placements, communication, bounds.
    """
    if model := models().get(case_or_model):
        lines, document = describe_model(model, tp or 1), model_document(model, tp or 1)
    else:
        if not case_or_model.startswith(PREFIX + "-"):
            near = get_close_matches(case_or_model, models(), n=3, cutoff=0.5)
            raise UsageValueError(f"{case_or_model!r} is neither a model, "
                                  + (f"the nearest being {', '.join(near)}, " if near else "see `list --models`, ")
                                  + f"nor a case id, which starts with {PREFIX}-")
        case = parse_case(case_or_model)
        if tp is not None:
            raise UsageValueError(f"--tp {tp}, but the case {case_or_model!r} says its own: add -tp{tp} to the id")
        lines = describe_case(case)
        document = dict(lines)
    click.echo(json.dumps(document, indent=1) if as_json
               else "\n".join(f"{key:16} {value}" for key, value in lines))
