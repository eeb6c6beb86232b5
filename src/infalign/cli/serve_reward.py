"""`infalign serve-reward`: a run's transformed reward as a server, for trainers elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infalign._io.wording import counted
from infalign.cli import options
from infalign.cli.console import ConsoleReporter, silence_libraries


def serve_reward_command(
    context: typer.Context,
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="A run with a finished calibration.")],
    policy: Annotated[
        str | None, typer.Option("--policy", help="Name of the transform, as in plan.json [default: the recipe's own].")
    ] = None,
    beta: Annotated[float | None, typer.Option("--beta", help="KL coefficient [default: the planned one].")] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; anyone who reaches it can ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 5000,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Most requests under way; more are told to wait.")
    ] = 4096,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds a request may take.")] = 170.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Most requests scored together.")] = 64,
    allowed_host: options.AllowedHost = None,
    api_key_variable: options.ApiKeyVariable = None,
    trust_run: options.TrustRun = False,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Serve the reward of a run over OpenRLHF's remote reward protocol, as POST /get_reward, until stopped."""
    key = options.read_key(api_key_variable)
    reporter = ConsoleReporter()
    reporter.say("Loading libraries …")
    from infalign.integrations.reward_app import make_reward_app
    from infalign.integrations.trl import TrainerReward
    from infalign.run.stages.trust import Trust
    from infalign.select.serving.web import check_host, listen, require_key, run_app

    silence_libraries()
    listener = context.with_resource(listen(host, port))
    trust = Trust(remote_code=trust_remote_code, pickle=allow_pickle, rewards=trust_run)
    reward = TrainerReward(run_folder, policy, beta=beta, trust=trust)
    app, batcher = make_reward_app(reward, capacity=queue, timeout=timeout, batch_size=batch_size)
    if key is not None:
        require_key(app, key, under="/get_reward")
    check_host(app, host, allowed_host or ())
    transformed = reward.transformed
    reporter.say(
        f"Rewards in nats ({transformed.transform.label} transform, beta {transformed.beta:.4g}) of responses to "
        f"{counted(len(reward.prompts), 'prompt')}"
    )
    address = f"http://{host}:{listener.getsockname()[1]}/get_reward"
    run_app(app, listener, grace=timeout, on_start=lambda: reporter.say(f"Serving on {address}"), on_stop=batcher.stop)
    reporter.say("Stopped.")
