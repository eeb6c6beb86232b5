"""`infalign compare`: all methods of several runs on one frontier, and their differences at one KL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infalign.cli.console import print_result
from infalign.cli.options import Json
from infalign.cli.sources import parse_procedure


def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or of evaluations.")],
    procedure: Annotated[
        str | None,
        typer.Option("--procedure", help="best-of-4 or the like [default: the one that the first run is for]."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="Method to compare the others with [default: identity, or the first]."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the frontier: FILE.png, .svg, or .html for the whole page.")
    ] = None,
    json_: Json = False,
) -> None:
    """Set runs side by side: win rate against KL, under the theoretical limit, and differences at the same KL."""
    from infalign.evaluation.runs import compare_runs, read_runs
    from infalign.report.comparison import check_ending, comparison_text, draw_comparison

    if plot is not None:
        check_ending(plot)  # before the work, not after it
    label = None if procedure is None else parse_procedure(procedure).label
    evaluations = read_runs(runs)
    folders = {name: str(folder) for name, folder in zip(evaluations, runs, strict=True)}
    compared = compare_runs(evaluations, procedure=label, baseline=baseline, folders=folders)
    text = comparison_text(compared)
    if plot is not None:
        draw_comparison(compared, plot)
        text += f"\n\nFigure: {plot}"
    print_result({"text": text, **compared.to_dict()}, json_)
