"""policy.json: a folder that says of which models a mixture or a reshaped policy is made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infalign._io.files import write_json
from infalign.errors import InputError
from infalign.rollouts.moved import found_after_move

NAME = "policy.json"
MIXTURE, RESHAPED = "mixture", "reshaped"


@dataclass(frozen=True)
class PolicyFile:
    """What a policy.json says.

    Attributes:
        kind: "mixture" or "reshaped".
        base: The base: a folder, or a hub name.
        aligned: The aligned policies.
        settings: What else decides the rollouts: the weights of a mixture, or the reshaping.
    """

    kind: str
    base: str
    aligned: tuple[str, ...]
    settings: Mapping[str, Any]


def read_policy_file(folder: str | Path) -> PolicyFile | None:
    """The policy.json of a folder, with paths that can be opened; None where there is none.

    Raises:
        InputError: It cannot be read, or is no description of a policy.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, named = content["kind"], content["aligned"]
        aligned = [named] if isinstance(named, str) else list(named)
        if kind == MIXTURE:
            settings = {"weights": _weights(content)}
        elif kind == RESHAPED:
            settings = {"reshaping": dict(content["reshaping"])}
        else:
            raise InputError(f"the policy is of the unknown kind {kind!r}", where=str(path),
                             hint=f'Use "{MIXTURE}" or "{RESHAPED}"')  # fmt: skip
        base, *others = (_found(path.parent, one) for one in [content["base"], *aligned])
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(
            f"this is not a description of a policy ({type(error).__name__}: {error})",
            where=str(path),
            hint="It needs kind, base, aligned, and weights or reshaping",
        ) from error
    return PolicyFile(kind, base, tuple(others), settings)


def write_policy_file(folder: str | Path, file: PolicyFile, reshaping: Mapping[str, Any] | None = None) -> None:
    """Write a policy.json; the paths of folders become relative to it.

    Args:
        folder: Made if it is not there.
        file: What to say.
        reshaping: Of a mixture, what its fit predicted; kept, but not read.

    Raises:
        StorageError: It cannot be written.
    """
    target = Path(folder)
    base, *aligned = (_relative(target, one) for one in (file.base, *file.aligned))
    content = {"kind": file.kind, "base": base, "aligned": aligned[0] if len(aligned) == 1 else aligned}
    content |= dict(file.settings)
    if reshaping is not None:
        content["reshaping"] = dict(reshaping)
    write_json(target / NAME, content)


def _weights(content: Mapping[str, Any]) -> list[float]:
    """A mixture's weights, of its own or of the reshaping that it comes from."""
    described = content.get("reshaping") or {}
    for name in ("weights", "weight", "mixture_weight"):
        for where in (content, described):
            if (found := where.get(name)) is not None:
                return [float(one) for one in found] if isinstance(found, list) else [float(found)]
    raise KeyError("weights")


def _found(folder: Path, named: object) -> str:
    """A path relative to the file's folder, or where it is since a move, if such a folder is there; else the name."""
    if not isinstance(named, str) or not named.strip() or not named.isprintable():
        raise ValueError(f"{named!r} names no model")
    there = folder / named
    if not there.is_dir():
        return found_after_move(folder, named)
    if (there / NAME).is_file():  # perhaps this very folder, without end
        raise ValueError(f"{named!r} is a policy of several models itself")
    return str(there.resolve())


def _relative(folder: Path, named: str) -> str:
    return os.path.relpath(Path(named).resolve(), folder.resolve()) if Path(named).is_dir() else named
