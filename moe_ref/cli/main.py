"""The group of verbs, and the one place where wrong use becomes a line and exit code 2."""

import os
import sys
import traceback
from importlib import import_module

import click

from moe_ref import __version__
from moe_ref.contract.errors import UsageError

_VERBS = {
    "list": "moe_ref.cli.case_commands:list_command", "show": "moe_ref.cli.case_commands:show_command",
    "setup": "moe_ref.cli.setup_commands:setup_command",
    "verify": "moe_ref.cli.verify_commands:verify_command", "replay": "moe_ref.cli.verify_commands:replay_command",
    "diverge": "moe_ref.cli.diverge_commands:diverge_command",
    "bench": "moe_ref.cli.bench_commands:bench_command",
    "report": "moe_ref.cli.report_commands:report_command", "accept": "moe_ref.cli.report_commands:accept_command",
    "history": "moe_ref.cli.history_commands:history_command",
    "score": "moe_ref.cli.score_commands:score_command",
    "compile": "moe_ref.cli.compile_commands:compile_command",
    "tune": "moe_ref.cli.tune_commands:tune_command",
    "adapters": "moe_ref.cli.adapter_commands:adapters_command",
    "lanes": "moe_ref.cli.lane_commands:lanes_command",
    "fingerprint": "moe_ref.cli.hardware_commands:fingerprint_command",
}


class _LazyGroup(click.Group):
    """Loads a verb's module when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module, _, attribute = _VERBS[cmd_name].partition(":")
        return getattr(import_module(module), attribute)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moe-ref")
def cli() -> None:
    """Verify mixture-of-experts layers against an fp64 oracle.

    Exit codes: 0 all as expected, 1 mismatch, 2 wrong use, 3 harness error, 4 fewer cases executed than the minimum,
    or cut short.
    """


def main() -> None:
    """Entry point; wrong use prints one line to standard error and ends with code 2."""
    # Read when torch first allocates: fp64 copies of whole experts otherwise spend their time in page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # An installed script has its own folder on the path where `python -m` has the current one.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        code = cli.main(standalone_mode=False)
    except UsageError as error:
        click.echo(f"moe-ref: {error}", err=True)
        code = 2
    except click.ClickException as error:
        click.echo(f"moe-ref: {error.format_message()}", err=True)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("moe-ref: interrupted; recorded cases are kept, --resume goes on", err=True)
        code = 130
    except Exception:
        # Ours, or the machine's: Python's own code for it, 1, would say that an implementation is wrong.
        traceback.print_exc()
        code = 3
    sys.exit(code if isinstance(code, int) else 0)
