"""`setup` runs the set-up cases of one implementation."""

import json
from typing import Any

import click

from moe_ref.contract.errors import UsageError, UsageValueError
from moe_ref.setup_cases.ladder import SetupResult, StepResult, run_setup
from moe_ref.verify.run.run import EXIT_MISMATCH, EXIT_OK, EXIT_TOO_FEW, end_on_terminate
from moe_ref.verify.run.session import Session


@click.command("setup")
@click.argument("implementation")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def setup_command(implementation: str, device: str, as_json: bool) -> int:
    """Ask IMPLEMENTATION for tiny layers, one more thing at a step, and name a mistaken mapping; run it first."""
    end_on_terminate()
    try:
        session = Session.start(implementation, device)
    except UsageError as error:
        raise UsageValueError(f"setup 1 fails (loads): {error}") from error
    try:
        result = run_setup(session.settings, session.pool)
    finally:
        session.close()
    code = EXIT_MISMATCH if result.failure else EXIT_OK if result.num_passed > 1 else EXIT_TOO_FEW
    click.echo(json.dumps(_document(result, code), indent=1) if as_json else _text(result))
    return code


def _text(result: SetupResult) -> str:
    """A line per step, the message of the case that fails, the verdict."""
    lines = [f"setup of {result.implementation} on {result.device}"]
    lines += [f"{step.number:2}  {step.name:16} {step.outcome:12}  {step.words}" for step in result.steps]
    failure = result.failure
    if failure is not None and failure.line is not None:
        lines += ["", failure.line.message, ""]
    return "\n".join([*lines, result.verdict])


def _document(result: SetupResult, code: int) -> dict[str, Any]:
    failure = result.failure
    return {"implementation": result.implementation, "device": result.device, "exit_code": code,
            "fails": failure.number if failure else None, "verdict": result.verdict,
            "steps": [_step(step) for step in result.steps]}


def _step(step: StepResult) -> dict[str, Any]:
    found, line = step.explained, step.line
    mistake = {"fault": found.fault, "whose": found.whose, "share": found.share, "left": found.left} if found else None
    return {"step": step.number, "name": step.name, "outcome": step.outcome, "words": step.words, "mistake": mistake,
            "case": line.case if line else None, "replay": line.replay if line else None}
