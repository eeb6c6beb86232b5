"""`infalign serve`: a procedure behind the OpenAI protocol, in front of a model or of another server."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infalign._io.wording import counted
from infalign.cli import options
from infalign.cli.console import ConsoleReporter, silence_libraries
from infalign.cli.sources import Blend, open_calibration, open_model, open_named_reward, parse_procedure, served_sampler
from infalign.errors import InputError

if TYPE_CHECKING:
    from infalign.rewards.source import RewardSource
    from infalign.rollouts.prompts import Prompt
    from infalign.select.candidates import CandidateSampler


def serve_command(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", help="Folder, adapter or hub name of a model to run here.")
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option("--upstream", help="Instead: an OpenAI-compatible server, such as http://host:8000/v1."),
    ] = None,
    model_name: Annotated[str | None, typer.Option("--model-name", help="The model's name upstream.")] = None,
    aligned: options.Aligned = None,
    aligned_weight: options.AlignedWeight = None,
    aligned_count: options.AlignedCount = None,
    reward: options.Reward = None,
    procedure: options.Procedure = "best-of-n",
    n: options.N = None,
    k: options.K = None,
    calibration: options.Calibration = None,
    stop_reward: Annotated[
        float | None,
        typer.Option(
            "--stop-reward", help="Best-of-N: draw no more once one has this reward; the greatest costs nothing."
        ),
    ] = None,
    block: options.Block = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Makes a session's answers repeatable [default: fresh].")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option("--served-name", help="The model's name for clients [default: its own].")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Most requests under way; more get 429.")] = 128,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds until a request gets 503.")] = 120.0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Most requests decoded together, with --model [default: 16].",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            min=1,
            help="Requests upstream at the same time, with --upstream [default: 16].",
            show_default=False,
        ),
    ] = None,
    allowed_host: options.AllowedHost = None,
    api_key_variable: options.ApiKeyVariable = None,
    upstream_key_variable: Annotated[
        str | None, typer.Option("--upstream-key-variable", help="Environment variable with the upstream's key.")
    ] = None,
    trust_run: options.TrustRun = False,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Serve a procedure's answers at /v1/chat/completions and /v1/completions, until stopped."""
    reporter = ConsoleReporter()
    if (model is None) == (upstream is None):
        raise InputError(
            "one model is served", where="serve", hint="Give either --model, or --upstream and --model-name"
        )
    if (upstream is None) != (model_name is None):
        raise InputError("a model upstream has a name there", where="serve", hint="Give --upstream and --model-name")
    if upstream is None:
        options.refuse_idle(
            *("serve", "without --upstream"),
            {
                "--concurrency": concurrency,
                "--upstream-key-variable": upstream_key_variable,
            },
        )
    else:
        options.refuse_idle("serve", "with --upstream", {"--batch-size": batch_size})
    if calibration is None:
        options.refuse_idle("serve", "without --calibration", {"--trust-run": trust_run or None})
    batch_size, concurrency = batch_size or 16, concurrency or 16
    if block is not None and stop_reward is None:
        raise InputError("--block goes with --stop-reward", where="serve", hint="Leave it out")
    chosen = parse_procedure(procedure, n, k)
    blend = Blend.of(aligned, aligned_weight, aligned_count, chosen)
    if blend is not None and stop_reward is not None:
        blend.require_all_drawn("serve")
    key = options.read_key(api_key_variable)
    options.read_key(upstream_key_variable, "--upstream-key-variable")
    reporter.say("Loading libraries …")
    from infalign.select.decoder import Decoder
    from infalign.select.serving.app import ProcedureServer, Served
    from infalign.select.serving.web import check_host, listen, run_app

    # Before models are loaded, so that an address that cannot be had is said at once.
    listener = context.with_resource(listen(host, port))
    weights: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    count_prompt = None
    sampler: CandidateSampler
    if upstream is not None:
        from infalign._io.http import Endpoint

        assert model_name is not None, "checked above"
        endpoint = Endpoint(upstream, upstream_key_variable, timeout=timeout, retries=1, first_wait=0.2)
        sampler, _ = served_sampler(endpoint, model_name, blend, concurrency, settings)
    else:
        assert model is not None, "checked above"
        sampler, count_prompt = _local(model, blend, weights, settings)
    # Somebody waits: better a quick error than a patient answer.
    patience: dict[str, Any] = {"timeout": timeout, "retries": 1, "first_wait": 0.2}
    source = None if reward is None else open_named_reward(reward, **weights, **patience)
    found = None if calibration is None else open_calibration(calibration, source, trust_run=trust_run, **weights)
    source = source if found is None else found.reward
    _require_no_columns(source)
    served = Served(
        Decoder(
            sampler,
            source,
            chosen,
            calibrator=None if found is None else found.calibrator,
            prompt_ids=None if found is None else found.prompt_ids,
            stop_reward=stop_reward,
            block=block or 1,
            seed=secrets.randbits(31) if seed is None else seed,
        ),
        served_name or model_name or Path(str(model)).name,
        count_prompt=count_prompt,
        known={} if found is None else {prompt.id: prompt for prompt in found.prompts},
        capacity=queue,
        max_batch=1 if upstream is not None else batch_size,
        workers=concurrency if upstream is not None else 1,
        timeout=timeout,
        key=key,
        **settings,
    )
    for kind, error in _unfit(source).items():
        reporter.say(f"The reward is not written for {kind} requests: {error}")
    server = ProcedureServer(served)
    check_host(server.app, host, allowed_host or ())
    reporter.say(
        f"{chosen.label} of {served.name!r} by {source or 'no reward'}, up to {counted(queue, 'request')} at a time"
    )
    if key is None and host not in ("127.0.0.1", "::1", "localhost"):
        reporter.say(f"Anyone who can reach {host} can ask: --api-key-variable names a key to ask for.")
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
    run_app(
        server.app,
        listener,
        grace=timeout,
        on_start=lambda: reporter.say(f"Serving on {address}"),
        on_stop=server.stop,
    )
    if server.num_open:  # a request that outlived its grace is still being worked on by a thread that nothing can stop
        reporter.say(f"Stopped with {counted(server.num_open, 'request')} unfinished.")
        os._exit(1)
    reporter.say("Stopped.")


def _local(model: str, blend: Blend | None, weights: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Any]:
    """A sampler for a model in this process, and what counts its prompts' tokens."""
    from infalign.rollouts.tokens import prompt_token_ids
    from infalign.select.local import sampler_of

    silence_libraries()
    policy = open_model(model, blend, weights)

    def count(prompt: Prompt) -> int:
        return len(prompt_token_ids(policy.tokenizer, [prompt])[0])

    return sampler_of(policy, **settings), count


def _require_no_columns(source: RewardSource | None) -> None:
    """Refuse a function that needs more of a prompt's row than a request can bring."""
    from infalign.rewards.source import FunctionReward

    if isinstance(source, FunctionReward):
        source.require_columns(["prompt_id"])


def _unfit(source: RewardSource | None) -> dict[str, InputError]:
    """The kinds of requests whose form a reward was not written for.

    Raises:
        InputError: It is fit for neither.
    """
    from infalign.rewards.rehearsal import rehearse
    from infalign.rewards.source import FunctionReward
    from infalign.rollouts.prompts import Prompt

    if not isinstance(source, FunctionReward):
        return {}
    found: dict[str, InputError] = {}
    asked = "What is on the mat?"
    for kind, prompt in (("text", asked), ("chat", [{"role": "user", "content": asked}])):
        try:
            rehearse(source, [Prompt(prompt)], f"--reward {source}")
        except InputError as error:
            found[kind] = error
    if len(found) == 2:
        raise found["chat"]
    return found
