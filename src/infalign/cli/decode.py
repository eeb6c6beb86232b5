"""`infalign decode`: answer prompts through a procedure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from infalign._io.wording import counted, json_text, visible
from infalign.cli import options
from infalign.cli.console import ConsoleReporter, silence_libraries
from infalign.cli.sources import (
    Blend,
    as_message,
    open_calibration,
    open_model,
    open_named_reward,
    parse_procedure,
    served_sampler,
    told_duplicates,
)
from infalign.errors import InfalignError, InputError, RewardError
from infalign.procedures import BestOfN, InferenceProcedure

if TYPE_CHECKING:
    from infalign.rollouts.prompts import Prompt
    from infalign.select.candidates import CandidateSampler
    from infalign.select.decoder import Decoded, Decoder

_ROWS_AT_ONCE = 512


class _NoAnswerError(Exception):
    """Ends a stage in which every prompt failed, so that nobody is told that it is done."""


def decode_command(
    prompt: Annotated[str | None, typer.Argument(help="One prompt.", show_default=False)] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Instead: JSONL, JSONL.gz, Parquet, or a data set's name.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option("--column", help="The column with the prompt [default: prompt].", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first so many prompts only.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send text as a user's message, through the chat template.")
    ] = False,
    model: Annotated[str | None, typer.Option("--model", help="Folder, adapter or hub name of a model.")] = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="Instead: an OpenAI-compatible server, http://host:8000/v1.")
    ] = None,
    model_name: Annotated[str | None, typer.Option("--model-name", help="The model's name there.")] = None,
    aligned: options.Aligned = None,
    aligned_weight: options.AlignedWeight = None,
    aligned_count: options.AlignedCount = None,
    api_key_variable: Annotated[
        str | None, typer.Option("--api-key-variable", help="Environment variable that holds the server's key.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", min=1, help="Requests to it at the same time [default: 16].", show_default=False),
    ] = None,
    reward: options.Reward = None,
    procedure: options.Procedure = "best-of-n",
    n: options.N = None,
    k: options.K = None,
    calibration: options.Calibration = None,
    stop_at: Annotated[
        float | None,
        typer.Option("--stop-at", help="Best-of-N: draw no more once one has this calibrated reward, as 0.95."),
    ] = None,
    stop_reward: Annotated[
        float | None,
        typer.Option("--stop-reward", help="… or this reward: at the greatest there is, nothing is lost."),
    ] = None,
    block: options.Block = None,
    prune_every: Annotated[
        int | None,
        typer.Option("--prune-every", min=1, help="Best-of-N, --model: look at beginnings every so many tokens …"),
    ] = None,
    prune_keep: Annotated[
        float | None,
        typer.Option(
            "--prune-keep",
            help="… and go on with this upper share of them: a heuristic [default: 0.5].",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write answers as JSONL; the same command goes on from there.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Decides what is drawn.")] = 0,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Prompts answered, and written, together.", show_default=False)
    ] = None,
    trust_run: options.TrustRun = False,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    as_json: options.Json = False,
) -> None:
    """Draw candidates, rank them by the reward, and give the one that the procedure picks."""
    if block is not None and stop_at is None and stop_reward is None:
        raise InputError("--block goes with --stop-at or --stop-reward", where="decode", hint="Leave it out")
    if prune_keep is not None and prune_every is None:
        raise InputError("--prune-keep goes with --prune-every", where="decode", hint="Give both, or leave it out")
    block, prune_keep = block or 1, 0.5 if prune_keep is None else prune_keep
    chosen = _procedure(procedure, n, k, stop_at, block)
    if (prompt is None) == (prompts is None):
        raise InputError("nothing to answer, or twice", where="decode", hint="Give one prompt, or --prompts FILE")
    if (model is None) == (endpoint is None):
        raise InputError("one model is needed", where="decode", hint="Give --model, or --endpoint and --model-name")
    if (endpoint is None) != (model_name is None):
        raise InputError("a model behind an endpoint has a name there", where="decode",
                         hint="Give --endpoint and --model-name")  # fmt: skip
    if prompts is None:
        options.refuse_idle("decode", "without --prompts", {"--column": column, "--limit": limit})
    if endpoint is None:
        options.refuse_idle(
            *("decode", "without --endpoint"),
            {
                "--concurrency": concurrency,
                "--api-key-variable": api_key_variable,
            },
        )
    if calibration is None:
        options.refuse_idle("decode", "without --calibration", {"--trust-run": trust_run or None})
    concurrency = concurrency or 16
    blend = Blend.of(aligned, aligned_weight, aligned_count, chosen)
    if blend is not None and stop_reward is not None:
        blend.require_all_drawn("decode")
    reporter = ConsoleReporter()
    reporter.say("Loading libraries …")
    from infalign._io.http import Endpoint
    from infalign.rewards.rehearsal import rehearse
    from infalign.rewards.score import FunctionReward, column_names
    from infalign.rollouts.prompts import Prompt, load_prompts
    from infalign.rollouts.rendering import moment_now
    from infalign.select.answers import AnswerFile
    from infalign.select.decoder import Decoder

    wanted = [Prompt(prompt)] if prompt is not None else []
    if prompts is not None:
        loaded = load_prompts(prompts, column or "prompt", limit=limit)
        if loaded.duplicates:
            reporter.say(told_duplicates(loaded, prompts))
        wanted = list(loaded)
    if chat:
        wanted = [as_message(one) for one in wanted]
    if any(isinstance(one.prompt, str) != isinstance(wanted[0].prompt, str) for one in wanted):
        raise InputError("some prompts are text and some are chat messages", where=str(prompts),
                         hint="Give one kind, or --chat")  # fmt: skip
    weights: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    source = None if reward is None else open_named_reward(reward, **weights)
    if isinstance(source, FunctionReward):
        source.require_columns([*column_names(wanted), "prompt_id"])
    found = None if calibration is None else open_calibration(calibration, source, trust_run=trust_run, **weights)
    # Policy and reward are told one moment by chat templates with a date in them: the calibration's, if there is one.
    moment = moment_now() if found is None else found.prompts[0].rendered_at
    wanted = [replace(one, rendered_at=moment) for one in wanted]
    if source is not None:
        source.render_at(moment)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    if endpoint is None:
        sampler, identity = _local(str(model), blend, settings, weights, wanted)
    else:
        server = Endpoint(endpoint, api_key_variable)
        sampler, identity = served_sampler(server, str(model_name), blend, concurrency, settings)
    if source is not None:
        rehearse(source, wanted, f"--reward {reward}")
    ranked_by = source if found is None else found.reward
    decoding: dict[str, Any] = {
        "calibrator": None if found is None else found.calibrator,
        "prompt_ids": None if found is None else found.prompt_ids,
        "stop_reward": stop_reward,
        "block": block,
        "seed": seed,
    }
    if prune_every is None:
        decoder = Decoder(sampler, ranked_by, chosen, **decoding)
    else:
        from infalign.select.pruning import Pruning, PruningDecoder

        decoder = PruningDecoder(sampler, ranked_by, chosen, Pruning(prune_every, prune_keep), **decoding)
    made_by = {
        "model": identity,
        **settings,
        "seed": seed,
        "reward": None if decoder.reward is None else decoder.reward.key,
        "calibration": None if found is None else found.fingerprint,
        "procedure": chosen.to_dict(),
        "stop_reward": stop_reward,
        "block": block if stop_reward is not None else None,
        "prune": None if prune_every is None else [prune_every, prune_keep],
    }
    at_once = batch or (4 * concurrency if endpoint is not None else max(1, _ROWS_AT_ONCE // (chosen.n or 1)))
    file = None if out is None else AnswerFile(out, made_by)
    todo: list[Prompt] = []
    answers: list[Decoded] = []
    failures: list[InfalignError] = []
    with _answered(file) as done, suppress(_NoAnswerError), reporter.stage(chosen.label) as progress:
        todo = [one for one in wanted if one.id not in done]
        progress(len(wanted) - len(todo), len(wanted), "")
        try:
            for start in range(0, len(todo), at_once):
                new = decoder.decode_each(todo[start : start + at_once], call=0)
                good = [one for one in new if not isinstance(one, InfalignError)]
                bad = [one for one in new if isinstance(one, InfalignError)]
                if file is not None:
                    file.append(good)
                answers += good
                failures += bad
                progress(
                    len(wanted) - len(todo) + start + len(new), len(wanted), f"{len(failures)} failed" * bool(failures)
                )
                if not good:
                    break  # what fails for every prompt of a batch will fail for the next one
            if failures and not answers:
                raise _NoAnswerError
        except KeyboardInterrupt:
            reporter.say("Stopped" + ("." if out is None else "; the same command goes on from here."))
            raise typer.Exit(130) from None
    _show(decoder, answers, len(wanted) - len(todo), failures, out, as_json)
    if len(failures) == 1 and len(wanted) == 1:
        raise failures[0]
    if failures:
        raise RewardError(
            f"{len(failures)} of {counted(len(todo), 'prompt')} {'has' if len(failures) == 1 else 'have'} no answer; "
            f"the first: {failures[0]}",
            hint=None if out is None else "What is answered is kept; start again to try the others",
        )


def _procedure(text: str, n: int | None, k: int | None, stop_at: float | None, block: int) -> InferenceProcedure:
    chosen = parse_procedure(text, n, k)
    if stop_at is None:
        return chosen
    if not isinstance(chosen, BestOfN):
        raise InputError(f"--stop-at is for Best-of-N, not for {chosen.label}", where="decode", hint="Leave it out")
    from infalign.procedures import EarlyStopping

    return EarlyStopping(chosen.n, stop_at, block)


def _local(
    model: str, blend: Blend | None, settings: dict[str, Any], weights: dict[str, Any], prompts: Sequence[Prompt]
) -> tuple[CandidateSampler, str]:
    """What draws from a policy of this machine, and its identity for the record."""
    from infalign.rollouts.rendering import require_chat_template
    from infalign.select.local import sampler_of

    silence_libraries()
    policy = open_model(model, blend, weights)
    if any(not isinstance(one.prompt, str) for one in prompts):
        require_chat_template(policy.tokenizer)
    return sampler_of(policy, **settings), policy.fingerprint


@contextmanager
def _answered(file: Any) -> Iterator[set[str]]:
    if file is None:
        yield set()
    else:
        with file.writing() as done:
            yield done


def _show(
    decoder: Decoder,
    answers: Sequence[Decoded],
    before: int,
    failures: Sequence[InfalignError],
    out: Path | None,
    as_json: bool,
) -> None:
    """What came out, for a program or for a person."""
    from infalign.select.answers import answer_row

    known = [one.num_tokens for one in answers if one.num_tokens is not None]
    drawn = sum(len(one.candidates) for one in answers)
    if as_json:
        summary = {
            "procedure": decoder.procedure.to_dict(),
            "answered": len(answers),
            "answered_before": before,
            "failed": [str(error) for error in failures],
            "candidates": drawn,
            "num_tokens": sum(known) if len(known) == len(answers) else None,
            "out": None if out is None else str(out),
            "answers": [answer_row(one) for one in answers] if out is None else None,
        }
        typer.echo(json_text(summary))
        return
    console = Console(highlight=False, emoji=False)
    if out is None:
        for one in answers:
            if len(answers) > 1:
                console.rule(characters="─")
                console.print(visible(one.prompt.text), style="dim", markup=False, soft_wrap=True)
            console.print(visible(one.chosen.text), markup=False, soft_wrap=True)
            console.print(visible(_line(one)), style="cyan", markup=False, soft_wrap=True)
    else:
        there = f"; {before} {'was' if before == 1 else 'were'} there" if before else ""
        console.print(
            visible(f"{counted(len(answers), 'prompt')} answered{there}: {out}"), markup=False, soft_wrap=True
        )
    if len(answers) > 1:
        n = decoder.procedure.n or 1
        saved = f" of at most {n * len(answers):,}" if drawn < n * len(answers) else ""
        tokens = f", {counted(sum(known), 'token')}" if known else ""
        console.print(f"{counted(drawn, 'candidate')}{saved}{tokens}", markup=False)


def _line(answer: Decoded) -> str:
    """Reward and cost of one answer."""
    chosen, parts = answer.chosen, [f"{answer.procedure.label}"]
    if chosen.reward is not None:
        parts.append(f"reward {chosen.reward:.4g}")
        others = [one.reward for one in answer.candidates if one.reward is not None]
        if len(others) > 1:
            parts[-1] += f" of {min(others):.4g} … {max(others):.4g}"
    if chosen.calibrated_reward is not None:
        parts.append(f"calibrated {chosen.calibrated_reward:.3f}")
    parts.append(counted(len(answer.candidates), "candidate"))
    if answer.num_tokens is not None:
        parts.append(counted(answer.num_tokens, "token"))
    return " · ".join([*parts, f"{answer.seconds:.1f} s"])
