"""`infalign quickstart`: the whole method on a tiny model, with no network, no download and no configuration."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from infalign.cli.options import Json, Set
from infalign.cli.run import execute

Out = Annotated[Path, typer.Option("--out", help="Run folder.")]


def quickstart_command(out: Out = Path("runs/quickstart"), set_: Set = None, json_: Json = False) -> None:
    """Train a tiny model on Python's own docstrings, align it for Best-of-16, and prove whether it helped."""
    with resources.as_file(resources.files("infalign") / "run" / "recipe" / "builtin" / "quickstart.yaml") as recipe:
        execute(recipe, set_, out, only=None, as_json=json_)
