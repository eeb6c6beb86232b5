"""`infalign run` and its stages one by one: rollout, calibrate, train, evaluate, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from infalign import processes
from infalign.cli.console import ConsoleReporter
from infalign.wording import visible

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The experiment: a YAML file, see recipes/.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a setting; may be repeated.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder [default: runs/NAME].", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")]
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
    from infalign.recipe import load_recipe

    processes.join()
    recipe = load_recipe(recipe_file, overrides or [])
    # A reward given as module:function may lie where the user stands or beside the recipe.
    allow_local_rewards(recipe_file.resolve().parent, Path.cwd())
    out = out or Path("runs") / recipe.name
    reporter = ConsoleReporter(quiet=not processes.is_main())
    reporter.say("Loading libraries …")
    from infalign.pipeline import Pipeline

    silence_libraries()
    pipeline = Pipeline(recipe, out, reporter)
    if dry_run:
        if processes.is_main():
            print_result(pipeline.check(), as_json)
        processes.leave()
        return
    try:
        result = pipeline.run(only)
    except KeyboardInterrupt:
        reporter.say("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    processes.leave()
    if processes.is_main():
        print_result(result, as_json)


def print_result(result: dict[str, object], as_json: bool) -> None:
    """JSON alone, or the text meant for a person, on stdout."""
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        typer.echo(visible(str(result["text"])))


def allow_local_rewards(*folders: Path) -> None:
    """Let module:function be imported from these folders."""
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def silence_libraries() -> None:
    """The pipeline shows its own progress; the libraries' bars and notes to their own developers would drown it."""
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|torch|peft)\.")
