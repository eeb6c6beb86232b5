"""`infalign report`: what an evaluation found, as a page, as Markdown or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from infalign.cli.console import print_result
from infalign.cli.options import Json, Set
from infalign.cli.run import execute
from infalign.errors import InputError


def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run or of an evaluation, or a recipe.")],
    set_: Set = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="With a recipe: its run folder [default: runs/NAME].", show_default=False),
    ] = None,
    format_: Annotated[
        Literal["html", "md", "json"],
        typer.Option("--format", help="One page with everything in it, or text, or data."),
    ] = "html",
    json_: Json = False,
) -> None:
    """Write the report of a finished evaluation into its folder."""
    if not run.exists():
        raise InputError(
            "there is no run folder and no recipe of this name",
            where=str(run),
            hint="Give the folder that `infalign run` or `infalign evaluate` wrote, or the recipe",
        )
    if not run.is_dir():
        if format_ == "html":
            execute(run, set_, out, only="report", as_json=json_)
            return
        from infalign.run.recipe import load_recipe

        run = out or Path("runs") / load_recipe(run, set_ or []).name
    elif set_ or out is not None:
        raise InputError("--set and --out go with a recipe", where="report", hint="Give the recipe, or leave them out")
    from infalign.report.build import build_report

    path, content = build_report(run, format_)
    print_result({"text": f"Report: {path}", "report": str(path), **(content if json_ else {})}, json_)
