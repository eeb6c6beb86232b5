"""Options that several verbs take, and take in the same sense."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from infalign.cli.sources import REWARD
from infalign.errors import InputError

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a setting; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]

# --- a procedure, and what it chooses by ---

Procedure = Annotated[
    str,
    typer.Option("--procedure", help="best-of-n, worst-of-n, order-statistic, standard, best-of-8 … or FILE.json."),
]
N = Annotated[int | None, typer.Option("--n", help="Candidates per answer.")]
K = Annotated[int | None, typer.Option("--k", help="Which from the worst, for order-statistic.")]
Reward = Annotated[
    str | None, typer.Option("--reward", help=f"What ranks candidates: {REWARD} [default: the calibration's].")
]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", help="A calibrated run: gives its prompts' answers quantiles.")
]
Block = Annotated[
    int | None,
    typer.Option("--block", min=1, help="Candidates drawn together until it stops [default: 1].", show_default=False),
]

# --- what a model draws, and how it is loaded ---

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest candidate.")]
Temperature = Annotated[float, typer.Option("--temperature", help="1 samples the model itself.")]
TopP = Annotated[float, typer.Option("--top-p", help="1 samples the model itself.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model.")]
TrustRun = Annotated[
    bool,
    typer.Option("--trust-run", help="Import the functions and ask the servers that the run folder names as rewards."),
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also accept weights that are not safetensors.")]
Aligned = Annotated[
    str | None,
    typer.Option(
        "--aligned",
        help="A second model, as the first is given (a folder, or a name at the server): a mixture of both …",
    ),
]
AlignedWeight = Annotated[
    float | None,
    typer.Option(
        "--aligned-weight",
        min=0.0,
        max=1.0,
        help="… with this share of the candidates from the aligned one,",
        show_default=False,
    ),
]
AlignedCount = Annotated[
    int | None,
    typer.Option(
        "--aligned-count", min=0, help="… or with exactly so many of the procedure's n candidates.", show_default=False
    ),
]


# --- a server of ours ---

AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        help="On a loopback address: a further name that requests may come under, as a proxy's. Can be repeated.",
    ),
]
ApiKeyVariable = Annotated[
    str | None, typer.Option("--api-key-variable", help="Environment variable with the key clients must send.")
]


def read_key(variable: str | None, option: str = "--api-key-variable") -> str | None:
    """The key in an environment variable; None without one.

    Raises:
        InputError: It is not set, or cannot be sent in a header.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"the environment variable {variable} is not set", where=option, hint="Put the key into it")
    if not key.isascii() or not key.isprintable():
        raise InputError(
            f"the key in {variable} holds a line break or another character that no header can carry",
            where=option,
            hint="Put one line of ASCII into it",
        )
    return key


def refuse_idle(verb: str, how: str, options: Mapping[str, object]) -> None:
    """Refuse options that would silently do nothing.

    Args:
        verb: The command.
        how: Why they would do nothing, such as `without --prompts`.
        options: Their values by name; None where one is not given.

    Raises:
        InputError: One is given.
    """
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} does nothing {how}", where=verb, hint="Leave it out")
