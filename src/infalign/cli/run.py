"""`infalign run` and its stages one by one: rollout, calibrate, train, evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infalign._io import processes
from infalign.cli.console import ConsoleReporter, print_result, silence_libraries
from infalign.cli.options import Json, Set

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The experiment: a YAML file, see recipes/.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder [default: runs/NAME].", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything that can be checked and print the plan.")]


def run_command(
    recipe: RecipeFile, set_: Set = None, out: Out = None, dry_run: DryRun = False, json_: Json = False
) -> None:
    """All stages of a recipe; stopped at any moment, the same command goes on from there."""
    execute(recipe, set_, out, only=None, dry_run=dry_run, as_json=json_)


def rollout_command(recipe: RecipeFile, set_: Set = None, out: Out = None, json_: Json = False) -> None:
    """Draw reference rollouts and score them (after training the testbed's models, where a recipe has them)."""
    execute(recipe, set_, out, only="rollout", as_json=json_)


def calibrate_command(recipe: RecipeFile, set_: Set = None, out: Out = None, json_: Json = False) -> None:
    """Fit the calibration to the scored rollouts and choose beta and transforms."""
    execute(recipe, set_, out, only="calibrate", as_json=json_)


def train_command(recipe: RecipeFile, set_: Set = None, out: Out = None, json_: Json = False) -> None:
    """Align the policy, once with each transform."""
    execute(recipe, set_, out, only="train", as_json=json_)


def execute(
    recipe_file: Path,
    overrides: list[str] | None,
    out: Path | None,
    *,
    only: str | None,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Run a recipe, or one group of its stages, and print what came out."""
    from infalign.run.recipe import load_recipe

    processes.join()
    recipe = load_recipe(recipe_file, overrides or [])
    out = out or Path("runs") / recipe.name
    reporter = ConsoleReporter(quiet=not processes.is_main())
    reporter.say("Loading libraries …")
    from infalign.rewards.user_code import look_in
    from infalign.run.pipeline import Pipeline

    look_in(recipe_file.parent)  # a reward given as module:function may lie beside the recipe
    silence_libraries()
    pipeline = Pipeline(recipe, out, reporter)
    if dry_run:
        if processes.is_main():
            print_result(pipeline.check(), as_json)
        processes.leave()
        return
    try:
        result = pipeline.run(only)
    except KeyboardInterrupt as stopped:
        reporter.say(str(stopped) or "Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    processes.leave()
    if processes.is_main():
        print_result(result, as_json)
