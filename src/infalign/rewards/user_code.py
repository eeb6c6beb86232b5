"""Where a function that a user names as `module:function` is looked for: after everything that is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

_folders: list[str] = []


def look_in(*folders: Path) -> None:
    """Let functions be imported from these folders too, once one is named; they replace those given before."""
    _folders[:] = [str(folder.resolve()) for folder in folders]


def extend_path() -> None:
    """Make modules of the user's folders importable, in the order in which they were given and the current one last.

    They come last on the path: a file of the user's that is called like a library never takes its place.
    """
    for folder in (*_folders, str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)


def in_the_way(module: ModuleType) -> str | None:
    """What a user's file of the same name is hidden by, as a sentence; None if there is no such file."""
    top = module.__name__.partition(".")[0]
    origin = getattr(module, "__file__", None) or "built into Python"
    for folder in (*_folders, str(Path.cwd())):
        beside = [Path(folder) / f"{top}.py", Path(folder) / top / "__init__.py"]
        found = [path for path in beside if path.is_file()]
        if found and not Path(origin).resolve().is_relative_to(folder):
            return f"{found[0]} is hidden by the installed module {top} ({origin}); rename it"
    return None
