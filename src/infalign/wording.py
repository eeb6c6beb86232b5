"""Small parts of sentences that people read."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 prompt`, `12,000 prompts`.

    Args:
        count: How many.
        noun: The noun in the singular.
        plural: Its plural, where that is not the singular and an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def visible(text: str) -> str:
    """Text of a model, a file or a server with control characters written out, so that it cannot command a terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def distinct(names: Sequence[str]) -> list[str]:
    """The same names, each that comes again with a number: `judge`, `judge (2)`."""
    given: list[str] = []
    for name in names:
        number, other = 2, name
        while other in given:
            number, other = number + 1, f"{name} ({number})"
        given.append(other)
    return given
