"""`infalign reshape`: the best policy within what an aligned model knows, for any procedure and budget, afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infalign.cli.console import ConsoleReporter, print_result, silence_libraries
from infalign.cli.options import AllowPickle, Json, TrustRemoteCode, TrustRun
from infalign.cli.sources import parse_procedure
from infalign.errors import InputError

KINDS = ("auto", "mixture", "reshaped")


def reshape_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run with aligned models.")],
    procedure: Annotated[
        str | None,
        typer.Option("--procedure", help="How it will be used: best-of-16 … [default: the run's own procedure]."),
    ] = None,
    kl: Annotated[
        float | None, typer.Option("--kl", help="KL budget in nats [default: the run's own].", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Which aligned model of the run [default: its first].")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help=f"One of {', '.join(KINDS)}.")] = "auto",
    samples: Annotated[
        int, typer.Option("--samples", min=2, help="Rollouts of the aligned model per calibration prompt.")
    ] = 32,
    split: Annotated[
        bool, typer.Option("--split", help="Say how to split the candidates between reference and aligned model.")
    ] = False,
    distil: Annotated[
        bool,
        typer.Option("--distil", help="Also train one model on samples of the policy, and measure what that loses."),
    ] = False,
    distil_samples: Annotated[
        int | None,
        typer.Option("--distil-samples", min=1, help="Samples per training prompt [default: 64].", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the policy [default: RUN/reshaped/METHOD-PROCEDURE-KL].",
                     show_default=False),
    ] = None,
    trust_run: TrustRun = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json_: Json = False,
) -> None:  # fmt: skip
    """Fit a mixture or a reshaped policy to a finished run, and say what it will do before anything is drawn from it.

    The policy is a folder that evaluate, decode, serve and audit take as a model.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}", where="--kind", hint=f"Use one of {', '.join(KINDS)}")
    if kl is not None and not kl > 0:
        raise InputError(f"a KL budget of {kl} nats", where="--kl", hint="Give nats above 0")
    if distil_samples is not None and not distil:
        raise InputError("--distil-samples goes with --distil", where="reshape", hint="Give both, or leave it out")
    chosen = None if procedure is None else parse_procedure(procedure)
    silence_libraries()
    from infalign.run.stages.distil import Distillation
    from infalign.run.stages.reshape_run import ReshapeRequest, reshape_run
    from infalign.run.stages.trust import Trust

    wanted = ReshapeRequest(
        method=method,
        procedure=chosen,
        kl_budget=kl,
        kinds=("mixture", "reshaped") if kind == "auto" else (kind,),
        num_samples=samples,
        split=split,
        out=out,
        distil=Distillation(num_samples=distil_samples or 64) if distil else None,
        trust=Trust(remote_code=trust_remote_code, pickle=allow_pickle, rewards=trust_run),
    )
    reporter = ConsoleReporter(quiet=False)
    try:
        result = reshape_run(run, wanted, reporter)
    except KeyboardInterrupt:
        reporter.say("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    print_result(result, json_)
