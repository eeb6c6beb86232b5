"""What a chat template says when it cannot show messages, as an error of the user's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infalign._io.wording import visible
from infalign.errors import InfalignError, InputError


@contextmanager
def explaining(tokenizer: Any) -> Iterator[None]:
    """While a tokenizer's chat template is rendered.

    A template is a program that came with the model: it may refuse on purpose (no system message, two user turns in a
    row), or fail in any way on messages that it was not written for.

    Raises:
        InputError: The template failed, with its own words.
    """
    try:
        yield
    except InfalignError:
        raise
    except Exception as error:
        said = " ".join(visible(str(error)).split())[:300]
        told = said if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {said}"
        raise InputError(
            f"the model's chat template refuses these messages ({told})",
            where=str(getattr(tokenizer, "name_or_path", "") or "messages"),
            hint="Write the messages as this model takes them; many take no system message, or want turns to alternate",
        ) from error
