"""`infalign plan`: what the best alignment for a procedure reaches, before any model is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infalign._io.wording import visible
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
    predictability: Annotated[
        float | None,
        typer.Option(
            "--predictability",
            help="How well the model can tell the reward from its own text: a correlation. Small models: 0.5 to 0.7.",
        ),
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
        predictability=1.0 if predictability is None else predictability,
    )
    if save is not None:
        about = {"procedure": chosen.to_dict(), "beta": result.best.beta, "kl": result.best.kl}
        result.best.transform.save(save, about=about)
    if plot is not None:
        from infalign.report.theory_figures import draw_plan

        draw_plan(result, plot)
    if as_json:
        content = result.to_dict(with_transforms=False)
        if predictability is None and result.usual is not None:
            content["usual"] = result.usual
        typer.echo(json.dumps(content))
    else:
        _print(result, hint=predictability is None)
        for path, what in ((save, "transform"), (plot, "figure")):
            if path is not None:
                Console(stderr=True, highlight=False, emoji=False).print(
                    f"{what} written to {path}", markup=False, soft_wrap=True
                )


def _print(result: Plan, *, hint: bool) -> None:
    """The plan as readable tables on stdout, in 80 columns."""
    console = Console(highlight=False, emoji=False)
    label, best = result.procedure.label, result.best
    against = label if result.opponent is None else result.opponent.label
    console.print(visible(f"{label} on the aligned model against {against} on the reference"), markup=False)
    spent = f"{best.kl:.4f}" if best.kl >= 0.01 else f"{best.kl:.4g}"
    console.print(f"Spend {spent} nats of KL on the optimal transform with beta {best.beta:.5g}", markup=False)
    _print_levels(console, result)
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
        console.print(visible(f"{name} is left out: {reason}"), markup=False)
    console.print("\nThe limit at other KLs:")
    curve = result.frontier
    kls = [share * best.kl for share in (0.125, 0.25, 0.5, 1.0, 1.5, 2.0) if share * best.kl <= curve.kl[-1]]
    rates = [f"{rate:.4f}" for rate in curve.at(kls)]
    _print_table(console, ("KL, nats", *(f"{kl:.4g}" for kl in kls)), [["win rate", *rates]])
    if result.finite_k:
        exact = result.predictability < 1.0
        how = "" if exact else " (simulated ± standard error)"
        console.print(f"\nWith K reference rollouts per prompt, same KL{how}:", markup=False)
        for prediction in result.finite_k:
            error = "" if exact else f" ± {prediction.win_rate_standard_error:.4f}"
            console.print(
                f"  K = {prediction.num_ref:<5d} win rate {prediction.win_rate:.4f}{error}, "
                f"lost {100 * prediction.win_rate_lost:.2f} pt, "
                f"beta {prediction.beta:.5g}",
                markup=False,
            )
    if result.by_n:
        _print_gains(console, result)
    if hint and result.usual is not None:
        _print_hint(console, result.usual)


def _print_levels(console: Console, result: Plan) -> None:
    """Both limits: the model's, and the idealised one."""
    if result.predictability == 1.0:
        return
    ideal = "out of reach" if result.idealised is None else f"{result.idealised.win_rate:.4f}"
    console.print(
        f"Limit {result.best.win_rate:.4f} at a predictability of {result.predictability:g} (Gaussian model);\n"
        f"{ideal} for a policy that could tilt the reward's rank itself",
        markup=False,
    )


def _print_gains(console: Console, result: Plan) -> None:
    """Which N is worth aligning for, and which K is enough."""
    kl, rho = result.best.kl, result.predictability
    console.print(f"\nWhich N is worth aligning for, at {kl:.4g} nats and predictability {rho:g}:", markup=False)
    _print_table(
        console,
        ("procedure", "limit", "identity", "gain", "in %", "idealised", "K enough"),
        [
            [
                gain.procedure,
                f"{gain.limit:.3f}",
                f"{gain.identity:.3f}",
                f"{100 * gain.gain:.1f} pt",
                f"{100 * gain.gain / gain.identity:.1f}",
                "" if gain.ideal_limit is None else f"{gain.ideal_limit:.3f}",
                "> 512" if gain.num_ref is None else str(gain.num_ref),
            ]
            for gain in result.by_n
        ],
    )
    console.print(
        "Gain is over identity at the same KL. K is enough if it loses at most half a point.\n"
        "Levels are a Gaussian model's: off by up to .05 where noise is heavy-tailed,\n"
        "by up to .19 where tails are one-sided. The choice of transform holds.",
        markup=False,
    )


def _print_hint(console: Console, usual: Mapping[str, float]) -> None:
    """What a small model can expect, for who did not ask."""
    gain = 100 * (usual["limit"] - usual["identity"])
    console.print(
        f"\nHint: this is for a policy that can tilt the reward's rank itself. A small model\n"
        f"rarely has a predictability above 0.7. At {usual['predictability']:g} the limit here is "
        f"{usual['limit']:.3f} and\nidentity reaches {usual['identity']:.3f} ({gain:+.1f} points): add "
        f"--predictability {usual['predictability']:g}",
        markup=False,
    )


def _print_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Numbers are never cut short: only the notes in a column "what it is" wrap."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        first, note = title == titles[0], title == "what it is"
        table.add_column(Text(visible(title)), justify="left" if first or note else "right", no_wrap=not note)
    for index, row in enumerate(rows):
        table.add_row(
            *(Text(visible(cell)) for cell in row), style="bold" if index == 0 and titles[0] == "transform" else None
        )
    console.print(table)
