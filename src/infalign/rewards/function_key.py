"""The key of a reward function, and what is told of its exceptions."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from infalign._io.http import known_keys
from infalign._io.outside import outside_text
from infalign.errors import InputError
from infalign.rewards.identity import UnknownStateError, digest_of, innermost, name_of

__all__ = ["function_digest", "name_of", "told"]


def told(error: Exception) -> str:
    """An exception in words; it may quote a server, and is stored."""
    return outside_text(f"{type(error).__name__}: {error}", known_keys(), limit=1000)


_digest_of_name: dict[str, tuple[Callable[..., Any], str]] = {}


def function_digest(named: str | Callable[..., Any], function: Callable[..., Any], key: str | None) -> str:
    """What tells a function from others of its name; with a key of its own, that of its source alone."""
    if key is not None:
        try:
            return hashlib.sha256(inspect.getsource(innermost(function)).encode()).hexdigest()[:12]
        except (OSError, TypeError):
            return ""
    # One that is named was just imported: what its calls change later, such as a cache, is not what it is.
    if isinstance(named, str) and named in _digest_of_name and _is_same(_digest_of_name[named][0], function):
        return _digest_of_name[named][1]
    try:
        digest = digest_of(function)[:12]
    except UnknownStateError as error:
        raise InputError(
            f"it cannot be told from others like it, since part of its state has no lasting form ({error})",
            where=f"reward function {name_of(function) if callable(named) else named}",
            hint="Give key=…, a name to change with what it scores; in a recipe, name a plain function that calls it",
        ) from error
    if isinstance(named, str):
        _digest_of_name[named] = function, digest
    return digest


def _is_same(one: Any, other: Any) -> bool:
    """Whether two names of a callable, such as a method, which is made anew each time, mean the same."""
    if isinstance(one, MethodType) and isinstance(other, MethodType):
        return one.__self__ is other.__self__ and one.__func__ is other.__func__
    return one is other
