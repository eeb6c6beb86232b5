"""How long stages tell the outside how far they are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (done, total, text); `text` is a short note such as `"18,200 tokens/s"`, or empty."""


def no_progress(done: int, total: int, text: str) -> None:
    """Say nothing."""
