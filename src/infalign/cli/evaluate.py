"""`infalign evaluate`: the evaluation of a recipe's run, or of any models against a reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infalign.cli.console import ConsoleReporter, print_result, silence_libraries
from infalign.cli.options import Json, Set, refuse_idle
from infalign.cli.run import execute
from infalign.cli.sources import parse_procedure, told_duplicates
from infalign.errors import InputError

if TYPE_CHECKING:
    from infalign.rollouts.prompts import PromptSet
    from infalign.run.model_evaluation import Candidate
    from infalign.run.recipe import Recipe

_FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
_PANEL = "Any models, without a recipe"


def evaluate_command(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The experiment: a YAML file; or give --model or --run.")
    ] = None,
    set_: Set = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="[NAME=]MODEL", rich_help_panel=_PANEL,
                     help="A model folder, adapter folder or hub name. Can be repeated."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", rich_help_panel=_PANEL, help="What they are measured against.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option("--reward", rich_help_panel=_PANEL,
                     help="What procedures choose by: a reward model, or module:function."),
    ] = None,
    gold: Annotated[
        list[str] | None,
        typer.Option("--gold", metavar="[NAME=]REWARD", rich_help_panel=_PANEL,
                     help="A further reward that only judges. Can be repeated."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", rich_help_panel=_PANEL, help="Held-out prompts: JSONL or Parquet.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option("--column", rich_help_panel=_PANEL, help="Their column [default: prompt].", show_default=False),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="RUN", rich_help_panel=_PANEL,
                     help="Evaluate the models of this run; what is not given is taken from it."),
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", rich_help_panel=_PANEL, help="With --run: its kept checkpoints too.")
    ] = False,
    procedures: Annotated[
        str | None,
        typer.Option("--procedures", rich_help_panel=_PANEL,
                     help="Names with commas between, the one in use first [default: best-of-4,worst-of-4,standard]."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=2, rich_help_panel=_PANEL,
                                 help="Fresh rollouts of each prompt [default: 32].")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, rich_help_panel=_PANEL,
                                 help="Cap on a response [default: 128].")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, rich_help_panel=_PANEL, help="Only the first prompts.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", rich_help_panel=_PANEL, help="Seed of the rollouts.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, rich_help_panel=_PANEL, help="Rollouts drawn at a time.")
    ] = None,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", rich_help_panel=_PANEL,
                     help="Use prompts that a model was trained on; the numbers are then marked."),
    ] = False,
    trust_run: Annotated[
        bool,
        typer.Option("--trust-run", rich_help_panel=_PANEL,
                     help="With --run: import the functions and ask the servers that it names as rewards."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", rich_help_panel=_PANEL, help="Run code that comes with a model.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", rich_help_panel=_PANEL, help="Also accept weights not in safetensors.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder [default: runs/NAME, or runs/evaluation-MODEL].", show_default=False),
    ] = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Measure win rates and KL on held-out prompts with fresh rollouts, with intervals and the theoretical limit."""
    if recipe is not None:
        models = (model, run, reference, reward, gold, prompts, column)
        options = (procedures, samples, max_new_tokens, limit, seed, batch_size)
        if any((*models, *options, checkpoints, allow_overlap, trust_run, trust_remote_code, allow_pickle)):
            raise InputError(
                "a recipe says itself what is evaluated, and how",
                where="evaluate",
                hint="Give a recipe alone, or --model, or --run; --set evaluation.num_samples=… changes a recipe",
            )
        execute(recipe, set_, out, only="evaluate", as_json=json_)
        return
    if not model and run is None:
        raise InputError("there is nothing to evaluate", where="evaluate", hint="Give a recipe, or --model, or --run")
    if set_:
        raise InputError("--set changes a recipe, and there is none", where="evaluate")
    if checkpoints and run is None:
        raise InputError("--checkpoints are those of a run", where="evaluate", hint="Give --run RUN")
    if run is None:
        refuse_idle("evaluate", "without --run", {"--trust-run": trust_run or None})
    if prompts is None:
        refuse_idle("evaluate", "without --prompts", {"--column": column})
    chosen = [parse_procedure(name) for name in procedures.split(",")] if procedures else None
    reporter = ConsoleReporter()
    reporter.say("Loading libraries …")
    from infalign.report.table import text_table
    from infalign.rewards.rehearsal import rehearse
    from infalign.run.model_evaluation import Job, candidates_of_run, evaluate_models
    from infalign.run.stages.run import read_recipe
    from infalign.run.stages.trust import Trust, gold_sections, policy_sections, reward_sections

    silence_libraries()
    made = None if run is None else read_recipe(run)
    if run is not None and made is not None:
        used = [
            *(policy_sections(made) if reference is None else ()),
            *(reward_sections(made) if reward is None else ()),
            *(gold_sections(made) if not gold else ()),
        ]
        Trust(remote_code=trust_remote_code, pickle=allow_pickle, rewards=trust_run).require(used, run)
    candidates = [_candidate(given) for given in model or ()]
    if run is not None and (checkpoints or not candidates):
        candidates += candidates_of_run(run, checkpoints=checkpoints)
    weights = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    gold_rewards = [_reward_section(given, weights, gold=True) for given in gold or ()]
    names = [one.label for one in gold_rewards]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"two gold rewards are called {repeated}", where="--gold", hint="Write --gold NAME=REWARD")
    if not gold and made is not None:
        gold_rewards = list(made.evaluation.gold)
    from infalign.procedures import BestOfN, Standard, WorstOfN
    from infalign.run.rewards import open_reward

    if chosen is None:
        chosen = [BestOfN(4), WorstOfN(4), Standard()]
        if made is not None:
            first = made.target_procedure
            chosen = [first, *(one for one in made.evaluation_procedures if one != first)]
    job = Job(
        candidates=candidates,
        reference=_reference(reference, run, made),
        prompts=_prompts(prompts, column or "prompt", run, reporter)[:limit],
        reward=_reward(reward, run, made, weights),
        procedures=chosen,
        # Of its own for each run or model: another evaluation must not take this one's place.
        out=out or Path("runs") / f"evaluation-{candidates[0].label if run is None else Path(run).name}",
        gold={one.label: open_reward(one) for one in gold_rewards},
        num_samples=samples or (32 if made is None else made.evaluation.num_samples),
        max_new_tokens=max_new_tokens or (128 if made is None else made.rollouts.max_new_tokens),
        seed=seed,
        confidence=0.95 if made is None else made.evaluation.confidence,
        batch_size=batch_size,
        run=run,
        allow_overlap=allow_overlap,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    rehearse(job.reward, job.prompts, f"the reward {job.reward}")
    for name, source in job.gold.items():
        rehearse(source, job.prompts, f"--gold {name}")
    try:
        evaluation = evaluate_models(job, reporter)
    except KeyboardInterrupt:
        reporter.say("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    report = str(job.out / "report.html")
    text = text_table(
        *(evaluation.results, evaluation.comparisons, chosen[0].n, None),
        held_out=evaluation.held_out,
        predictability=evaluation.predictability,
    )
    text = "\n".join([text, *(f"Note: {warning}" for warning in evaluation.warnings), "", f"Report: {report}"])
    print_result({"text": text, **evaluation.to_dict(), "report": report}, json_)


def _named(given: str) -> tuple[str | None, str]:
    """`NAME=VALUE` apart; a path may hold an equals sign after a slash."""
    name, equals, value = given.partition("=")
    return (name, value) if equals and value and "/" not in name else (None, given)


def _candidate(given: str) -> Candidate:
    from infalign.run.model_evaluation import Candidate

    name, model = _named(given)
    path = Path(model)
    own = path.resolve().parent.name if path.name == "model" and path.is_dir() else path.name
    return Candidate(name or own, model)


def _reward_section(given: str, weights: Mapping[str, bool], *, gold: bool = False) -> Any:
    from pydantic import ValidationError

    from infalign.run.recipe import GoldReward, Reward

    name, source = _named(given) if gold else (None, given)
    kind = "function" if _FUNCTION.match(source) and not Path(source).exists() else "model"
    if kind == "function":
        weights = {}
    try:
        return (
            GoldReward.model_validate({"name": name, kind: source, **weights})
            if gold
            else Reward.model_validate({kind: source, **weights})
        )
    except ValidationError as error:
        raise InputError(error.errors()[0]["msg"], where=f"{'--gold' if gold else '--reward'} {given}") from error


def _reference(given: str | None, run: Path | None, made: Recipe | None) -> str:
    if given is not None:
        return given
    if run is None or made is None:
        raise InputError("there is no reference", where="evaluate", hint="Give --reference")
    return made.policy.model or str(run / "models" / "reference")


def _reward(given: str | None, run: Path | None, made: Recipe | None, weights: Mapping[str, bool]) -> Any:
    from infalign.run.rewards import open_reward

    if given is not None:
        return open_reward(_reward_section(given, weights))
    if run is None or made is None:
        raise InputError("there is no reward", where="evaluate", hint="Give --reward")
    if len(made.reward) > 1:
        raise InputError("the run combines several rewards", where=str(run), hint="Give --reward and --gold")
    return open_reward(made.reward[0], testbed_model=str(run / "models" / "reward"))


def _prompts(given: Path | None, column: str, run: Path | None, reporter: ConsoleReporter) -> PromptSet:
    from infalign.rollouts.prompts import load_prompts
    from infalign.run.stages.run import read_prompts

    if given is not None:
        loaded = load_prompts(given, column)
        if loaded.duplicates:
            reporter.say(told_duplicates(loaded, given))
        return loaded
    if run is None:
        raise InputError("there are no prompts", where="evaluate", hint="Give --prompts FILE")
    return read_prompts(run, "evaluation")
