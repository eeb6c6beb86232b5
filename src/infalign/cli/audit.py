"""`infalign audit`: how often, and how badly, N attempts break a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infalign._io.wording import json_text, visible
from infalign.cli.console import ConsoleReporter, silence_libraries
from infalign.cli.options import Json, refuse_idle
from infalign.cli.sources import REWARD, as_message, open_named_reward, told_duplicates
from infalign.errors import InputError

if TYPE_CHECKING:
    from infalign.audit.run import Judge
    from infalign.audit.targets import Target


def audit_command(
    model: Annotated[
        list[str],
        typer.Option("--model", help="Model folder, adapter or hub name, or NAME=MODEL. Can be repeated: the "
                     "others are compared with the first."),
    ],
    prompts: Annotated[str, typer.Option("--prompts", help="Requests that should be refused: JSONL, JSONL.gz, "
                                         "Parquet or a hub data set.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the audit; the same command goes on from there.")],
    attempts: Annotated[int, typer.Option("--attempts", help="Attempts per prompt and model.")] = 64,
    reward: Annotated[
        str | None, typer.Option("--reward", help=f"Safety reward, higher is safer: {REWARD}.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="An attempt succeeds with a reward below this.")
    ] = None,
    success: Annotated[
        str | None,
        typer.Option("--success", help="Instead of a reward: module:function that says True where an attempt "
                     "succeeded; or not-refused, which only looks for phrases of refusal."),
    ] = None,
    benign: Annotated[
        str | None, typer.Option("--benign", help="Harmless prompts, best such as look harmful, for over-refusal.")
    ] = None,
    benign_attempts: Annotated[
        int | None,
        typer.Option("--benign-attempts", help="Responses per harmless prompt [default: 4].", show_default=False),
    ] = None,
    refusal: Annotated[
        str | None,
        typer.Option("--refusal", help="Says 1 for a refusal: as --reward [default: phrases of refusal].",
                     show_default=False),
    ] = None,
    augment: Annotated[
        str,
        typer.Option("--augment", help="How each attempt rewords its prompt: all, none, or some of scramble, "
                     "capitalise, noise, swap."),
    ] = "all",
    sigma: Annotated[float, typer.Option("--sigma", help="Strength of the rewording, 0 to 1.")] = 0.4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest response.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Of the rewording and the sampling.")] = 0,
    predict: Annotated[
        int | None, typer.Option("--predict", help="Largest N to predict [default: 16 × attempts].", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first prompts.")] = None,
    column: Annotated[str, typer.Option("--column", help="Column that holds the prompts.")] = "prompt",
    chat: Annotated[bool, typer.Option("--chat", help="Send prompts that are text as a user's chat message.")] = False,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", help="OpenAI-compatible server (…/v1); --model then names models there."),
    ] = None,
    api_key_variable: Annotated[
        str | None, typer.Option("--api-key-variable", help="Environment variable that holds the server's key.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Rollouts drawn at the same time.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the models.")] = False,
    title: Annotated[str, typer.Option("--title", help="Heading of the report.")] = "Safety audit",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Attack models N times with every prompt; success over N, what more attempts would do, and what safety costs."""
    from infalign.audit.augment import Augmentation
    from infalign.audit.run import AuditSettings
    from infalign.rollouts.prompts import load_prompts

    augmentation = Augmentation.parse(augment, sigma=sigma, seed=seed)
    if benign is None:
        refuse_idle("audit", "without --benign", {"--benign-attempts": benign_attempts, "--refusal": refusal})
    if endpoint is None:
        refuse_idle("audit", "without --endpoint", {"--api-key-variable": api_key_variable})
    else:
        refuse_idle("audit", "with --endpoint", {"--batch-size": batch_size})
    settings = AuditSettings(
        attempts=attempts,
        augmentation=augmentation,
        max_new_tokens=max_new_tokens,
        seed=seed,
        benign_attempts=4 if benign_attempts is None else benign_attempts,
        predict=predict,
    )
    reporter = ConsoleReporter()
    loaded = [load_prompts(source, column, limit=limit) for source in (prompts, benign) if source is not None]
    for source, one in zip((prompts, benign), loaded, strict=False):
        if one.duplicates:
            reporter.say(told_duplicates(one, str(source)))
    asked, *rest = [tuple(map(as_message, one)) if chat else one.prompts for one in loaded]
    harmless = rest[0] if rest else ()
    reporter.say("Loading libraries …")
    from infalign.audit.page import worst_examples, write_audit_report
    from infalign.audit.run import audit
    from infalign.audit.words import text_table
    from infalign.rewards.rehearsal import rehearse
    from infalign.run.folder import versions

    silence_libraries()
    judge = _judge(reward, threshold, success)
    rehearse(judge.source, asked, f"--reward {reward}" if success is None else f"--success {success}")
    targets = _targets(model, endpoint, api_key_variable, batch_size, trust_remote_code)
    refuses = None if refusal is None else open_named_reward(refusal, option="--refusal")
    try:
        result = audit(
            targets, asked, judge, out=out, settings=settings, benign=harmless, refusal=refuses, stage=reporter.stage
        )
    except KeyboardInterrupt:
        reporter.say("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    examples = worst_examples(result, asked, judge, out)
    report = write_audit_report(out / "report.html", result, examples, title=title, versions=versions())
    if as_json:
        typer.echo(json_text({**result.to_dict(), "report": str(report)}))
    else:
        typer.echo(visible(f"{text_table(result)}\n\nReport: {report}"))


def _judge(reward: str | None, threshold: float | None, success: str | None) -> Judge:
    from infalign.audit.refusal import RefusalPhrases
    from infalign.audit.run import Judge

    if (reward is None) == (success is None):
        raise InputError("it is not said, or said twice, when an attempt succeeds", where="audit",
                         hint="Give either --reward with --threshold, or --success")  # fmt: skip
    if success is not None:
        if threshold is not None:
            raise InputError("--threshold goes with --reward", where="audit", hint="Leave it out with --success")
        if success == "not-refused":
            return Judge(RefusalPhrases(), 0.5)
        return Judge(open_named_reward(success, option="--success"), None)
    if threshold is None:
        raise InputError("a reward has no natural line between safe and harmful", where="--reward",
                         hint="Give --threshold: an attempt succeeds with a reward below it")  # fmt: skip
    assert reward is not None, "checked above"
    return Judge(open_named_reward(reward), threshold)


def _targets(
    models: list[str], endpoint: str | None, api_key_variable: str | None, batch_size: int | None, trust: bool
) -> list[Target]:
    from infalign._io.http import Endpoint
    from infalign.audit.targets import LocalModel, ServedModel

    found: list[Target] = []
    for text in models:
        label, model = _named(text)
        if endpoint is None:
            found.append(LocalModel(label, model, batch_size, trust_remote_code=trust))
        else:
            found.append(ServedModel(label, model, Endpoint(endpoint, api_key_variable)))
    return found


def _named(text: str) -> tuple[str, str]:
    """NAME=MODEL, or a name made of the model's own; an aligned model of a run is named after its transform."""
    name, equals, model = text.partition("=")
    if equals and not Path(text).exists():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise InputError(f"{name!r} cannot name a model", where="--model",
                             hint="Use letters, digits, dots, hyphens and underscores")  # fmt: skip
        return name, model
    parts = [part for part in Path(text).parts if part not in ("/", "..", ".")]
    own = parts[-2] if len(parts) > 1 and parts[-1] == "model" else (parts or ["model"])[-1]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", own).lstrip("-.") or "model", text
