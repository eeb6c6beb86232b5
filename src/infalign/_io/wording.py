"""Small parts of sentences that people read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What reorders text, breaks lines unseen, is invisible though it says something, or is half a character.
_UNSEEN = re.compile("[\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]")
_ESCAPED_IN_JSON = re.compile(f"[\\x7f-\\x9f]|{_UNSEEN.pattern}")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 prompt`, `12,000 prompts`.

    Args:
        count: How many.
        noun: The noun in the singular.
        plural: Its plural, where that is not the singular and an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def visible(text: str) -> str:
    r"""Text of a model, a file or a server with every character that commands or misleads written out.

    Control characters become `\x1b`, so that they cannot command a terminal; those that reorder text or are not seen
    become `⟨U+202E⟩`, so that what is read is what was written. Line feeds and tabs stay. The one function for
    terminals, Markdown and HTML; `page.js` does the same in a browser.
    """
    return _UNSEEN.sub(
        lambda found: f"⟨U+{ord(found[0]):04X}⟩", _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    )


def json_text(content: Any) -> str:
    """JSON for a stream that may be a terminal: readable, but with the characters of `visible` as JSON escapes."""
    return _ESCAPED_IN_JSON.sub(_json_escape, json.dumps(content, ensure_ascii=False))


def _json_escape(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1]


def distinct(names: Sequence[str]) -> list[str]:
    """The same names, each that comes again with a number: `judge`, `judge (2)`."""
    given: list[str] = []
    for name in names:
        number, other = 2, name
        while other in given:
            number, other = number + 1, f"{name} ({number})"
        given.append(other)
    return given


def first_line(error: Exception) -> str:
    """The first line of what an error says; libraries add pages."""
    return str(error).strip().split("\n", maxsplit=1)[0]
