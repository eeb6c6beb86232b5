"""`infalign plan`: what the best alignment for a procedure reaches, before any model is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infalign.cli.options import Json
from infalign.cli.sources import PROCEDURE, parse_procedure
from infalign.errors import InputError

if TYPE_CHECKING:
    from infalign.theory.plan import Plan


def plan_command(
    procedure: Annotated[str, typer.Argument(help=f"How the model will be used: {PROCEDURE}.")],
    n: Annotated[int | None, typer.Option("--n", help="Responses drawn, for best-of-n and the like.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Which response from the worst, for order-statistic.")] = None,
    beta: Annotated[float | None, typer.Option("--beta", help="KL coefficient, in win rate per nat.")] = None,
    kl: Annotated[float | None, typer.Option("--kl", help="KL budget in nats per response, instead of --beta.")] = None,
    opponent: Annotated[
        str | None, typer.Option("--opponent", help="What the reference does; the same procedure if not given.")
    ] = None,
    num_ref: Annotated[
        list[int] | None,
        typer.Option("--num-ref", help="Predict what K reference rollouts per prompt cost. Can be repeated."),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option("--also", help="Another procedure to give win rates for. Can be repeated.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the plan: FILE.png, .svg or .html.")] = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write the optimal transform as JSON, for a recipe.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the reward transform that a KL budget is best spent on, beside the usual choices at the same KL."""
    from infalign.theory.plan import plan  # here, so that `infalign --help` stays quick

    if plot is not None:
        from infalign.report.theory_figures import check_ending

        check_ending(plot)  # before the work, not after it
        if save is not None and save.resolve() == plot.resolve():
            raise InputError(f"--save and --plot both name {str(plot)!r}", where="plan", hint="Give two files")
    chosen = parse_procedure(procedure, n, k)
    result = plan(
        chosen,
        beta=beta,
        kl_budget=kl,
        opponent=None if opponent is None else parse_procedure(opponent),
        num_ref=num_ref or (),
        others=[parse_procedure(other) for other in also or ()],
    )
    if save is not None:
        about = {"procedure": chosen.to_dict(), "beta": result.best.beta, "kl": result.best.kl}
        result.best.transform.save(save, about=about)
    if plot is not None:
        from infalign.report.theory_figures import draw_plan

        draw_plan(result, plot)
    if as_json:
        typer.echo(json.dumps(result.to_dict(with_transforms=False)))
    else:
        _print(result)
        for path, what in ((save, "transform"), (plot, "figure")):
            if path is not None:
                Console(stderr=True, highlight=False, emoji=False).print(
                    f"{what} written to {path}", markup=False, soft_wrap=True
                )


def _print(result: Plan) -> None:
    """The plan as readable tables on stdout, in 80 columns."""
    console = Console(highlight=False, emoji=False)
    label, best = result.procedure.label, result.best
    against = label if result.opponent is None else result.opponent.label
    console.print(f"{label} on the aligned model against {against} on the reference", markup=False)
    console.print(f"Spend {best.kl:.4f} nats of KL on the optimal transform with beta {best.beta:.5g}", markup=False)
    options = (best, *result.alternatives)
    rows: list[list[str]] = []
    for option in options:
        lost = "" if option is best else f"{100 * (best.win_rate - option.win_rate):.2f} pt"
        cells = [option.label, f"{option.beta:.5g}", f"{option.win_rate:.4f}", lost, f"{option.standard_win_rate:.4f}"]
        rows.append([*cells, option.note])
    _print_table(console, ("transform", "beta", "win rate", "lost", "standard", "what it is"), rows)
    if best.other_win_rates:
        console.print("\nUnder other procedures, each against itself:")
        others = list(best.other_win_rates)
        _print_table(
            console,
            ("procedure", *(option.label.removeprefix("exponential, ") for option in options)),
            [[other, *(f"{option.other_win_rates[other]:.4f}" for option in options)] for other in others],
        )
    for name, reason in result.left_out.items():
        console.print(f"{name} is left out: {reason}", markup=False)
    console.print("\nThe limit at other KLs:")
    curve = result.frontier
    kls = [share * best.kl for share in (0.125, 0.25, 0.5, 1.0, 1.5, 2.0) if share * best.kl <= curve.kl[-1]]
    rates = [f"{rate:.4f}" for rate in curve.at(kls)]
    _print_table(console, ("KL, nats", *(f"{kl:.4g}" for kl in kls)), [["win rate", *rates]])
    if result.finite_k:
        console.print("\nWith K reference rollouts per prompt, same KL (simulated ± standard error):")
        for prediction in result.finite_k:
            console.print(
                f"  K = {prediction.num_ref:<5d} win rate {prediction.win_rate:.4f} ± "
                f"{prediction.win_rate_standard_error:.4f}, lost {100 * prediction.win_rate_lost:.2f} pt, "
                f"beta {prediction.beta:.5g}",
                markup=False,
            )


def _print_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Numbers are never cut short: only the notes in a column "what it is" wrap."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        first, note = title == titles[0], title == "what it is"
        table.add_column(Text(title), justify="left" if first or note else "right", no_wrap=not note)
    for index, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style="bold" if index == 0 and titles[0] == "transform" else None)
    console.print(table)
