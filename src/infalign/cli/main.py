"""The command line: one file per verb, errors as one plain message.

Exit codes: 0 success, 1 a fault of this library, 2 something the user can fix, 130 stopped by the user.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

import infalign
from infalign._io import processes
from infalign._io.files import HINT, disk_failure
from infalign._io.wording import visible
from infalign.cli.audit import audit_command
from infalign.cli.compare import compare_command
from infalign.cli.decode import decode_command
from infalign.cli.evaluate import evaluate_command
from infalign.cli.plan import plan_command
from infalign.cli.quickstart import quickstart_command
from infalign.cli.report import report_command
from infalign.cli.reshape import reshape_command
from infalign.cli.run import (
    calibrate_command,
    rollout_command,
    run_command,
    train_command,
)
from infalign.cli.serve import serve_command
from infalign.cli.serve_reward import serve_reward_command
from infalign.errors import InfalignError, StorageError

STOPPED = 130


class _Verbs(TyperGroup):
    """The verbs; one that is stopped where it has nothing more to say ends in one word."""

    def invoke(self, ctx: Any) -> Any:
        """As the base class."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Stopped.", err=True)
            raise typer.Exit(STOPPED) from None


app = typer.Typer(
    name="infalign",
    cls=_Verbs,
    help="Align a language model for the way it will be used: Best-of-N, Worst-of-N, or any inference-time procedure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quickstart")(quickstart_command)
app.command("plan")(plan_command)
app.command("run")(run_command)
app.command("rollout")(rollout_command)
app.command("calibrate")(calibrate_command)
app.command("train")(train_command)
app.command("reshape")(reshape_command)
app.command("evaluate")(evaluate_command)
app.command("report")(report_command)
app.command("decode")(decode_command)
app.command("serve")(serve_command)
app.command("serve-reward")(serve_reward_command)
app.command("audit")(audit_command)
app.command("compare")(compare_command)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        typer.echo(infalign.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `infalign` command."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == STOPPED:
            # All is written, and nobody waits while the libraries are taken down, which takes seconds.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STOPPED)
        raise
    except InfalignError as error:
        if not processes.first_to_fail():
            sys.exit(2)
        _refuse(error)
    except Exception as error:
        if not processes.first_to_fail():
            sys.exit(1)  # the end of this process is a consequence, and the cause has been shown
        reason = disk_failure(error)
        if reason is None:
            raise
        _refuse(StorageError(f"a file could not be written ({reason})", hint=HINT))


def _refuse(error: InfalignError) -> NoReturn:
    """One plain message, and the exit status of what a user can put right."""
    console = Console(stderr=True, highlight=False, emoji=False)
    console.print("[bold red]error:[/] ", end="")
    console.print(visible(str(error)), markup=False, soft_wrap=True)
    sys.exit(2)
