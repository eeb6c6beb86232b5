"""Text that a server sent, as it may be shown, logged and stored: short, and without keys and addresses."""

from __future__ import annotations

import base64
import re
import reprlib
import urllib.parse
from collections.abc import Iterable
from typing import Any

_READ = 4096
_RUN = 8  # so many characters of a secret in a row are taken for a part of it
_SECRET = "[secret]"
_ADDRESS = "[address]"
_PATTERNS = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"',;]+"), rf"\1 {_SECRET}"),
    (
        re.compile(r"(?i)\b([\w-]*(?:key|token|secret|password|passwd|authorization))\b(\\*[\"']?\s*[=:]\s*\\*[\"']?)"
                   r"(?!(?:bearer|basic)\b)[^\s\"',;}\\]+"),
        rf"\1\2{_SECRET}",
    ),
    (re.compile(r"\b(?:sk|pk|hf|gsk|xai|ghp|gho|glpat|nvapi|github_pat|AKIA|AIza|eyJ)[-_A-Za-z0-9.*…]{12,}"), _SECRET),
    (re.compile(r"(?i)\b[a-z][a-z0-9+.-]*:\\?/\\?/[^\s\"'<>)]+"), _ADDRESS),
    (re.compile(r"\[[0-9a-fA-F:.]*:[0-9a-fA-F:.]*\](?::\d+)?"), _ADDRESS),
    (re.compile(r"(?i)\b(?:[0-9a-f]{1,4}:){3,7}[0-9a-f]{0,4}\b"), _ADDRESS),
    (re.compile(r"(?i)\bf[cde][0-9a-f]{2}:[0-9a-f:]*:[0-9a-f:]+"), _ADDRESS),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"), _ADDRESS),
    (re.compile(r"(?i)\b[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:internal|local|localdomain|lan|corp|intranet|svc|private)\b"
                r"(?::\d+)?"), _ADDRESS),
    (re.compile(r"(?i)\b(?=[a-z0-9.-]*[a-z])[a-z0-9][a-z0-9.-]*:\d{2,5}\b"), _ADDRESS),
)  # fmt: skip
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def outside_text(text: str | bytes, secrets: Iterable[str] = (), *, limit: int = 300) -> str:
    """The beginning of what a server sent, with secrets and addresses cut out.

    Args:
        text: What it sent.
        secrets: Keys that it may know, cut out in whole and in parts, also where they are encoded.
        limit: Characters.
    """
    if isinstance(text, bytes):
        text = text[: 4 * _READ].decode("utf-8", "replace")
    text = text[:_READ].encode("utf-8", "replace").decode("utf-8").strip()
    for secret in secrets:
        for form in _forms(secret):
            text = _without(text, form)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def in_short(value: Any, secrets: Iterable[str] = ()) -> str:
    """A value that a server sent, as Python writes it, but short; see `outside_text`."""
    return outside_text(_short.repr(value), secrets)


def _forms(secret: str) -> list[str]:
    raw = secret.encode()
    quoted = urllib.parse.quote(secret, safe="")
    encoded = base64.b64encode(raw).decode().rstrip("=")
    return list(dict.fromkeys([secret, quoted, encoded, raw.hex()]))


def _without(text: str, secret: str) -> str:
    """The text without every run of characters that is in the secret and long enough to tell."""
    length = min(_RUN, len(secret))
    if not length:
        return text
    low, secret = text.lower(), secret.lower()
    if len(low) != len(text):  # a few letters are longer in lower case
        low = text
    runs = {secret[start : start + length] for start in range(len(secret) - length + 1)}
    covered = [False] * len(text)
    for start in range(len(text) - length + 1):
        if low[start : start + length] in runs:
            covered[start : start + length] = [True] * length
    kept: list[str] = []
    for at, letter in enumerate(text):
        if not covered[at]:
            kept.append(letter)
        elif at == 0 or not covered[at - 1]:
            kept.append(_SECRET)
    return "".join(kept)
