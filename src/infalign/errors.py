"""One exception family: what was wrong, where, and a hint for what to do about it.

Everything a user can cause is an `InfalignError`; the command line prints its message alone and exits with 2.
Any other exception is a fault of this library.
"""

from __future__ import annotations


class InfalignError(Exception):
    """Base class of every error that a user can cause and put right.

    Args:
        what: What was wrong, as a sentence without a trailing full stop.
        where: The file, setting or argument it was found in.
        hint: What to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what, where, hint)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.hint}" if self.hint else text


class InputError(InfalignError, ValueError):
    """An argument, setting or file content is not usable."""


class MismatchError(InfalignError):
    """Stored results were made with other settings, another model or another reward than those now asked for."""


class RewardError(InfalignError):
    """A reward source returned something that is not one finite number per response."""


class StorageError(InfalignError, OSError):
    """A file or folder cannot be read or written (missing, no space, no permission)."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the work; the message says what the same command goes on from."""


class TrainingError(InfalignError, RuntimeError):
    """Training cannot go on (loss not finite, KL out of control, constant reward, out of memory)."""
