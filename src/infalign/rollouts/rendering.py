"""Chat messages as a template renders them: at one moment, whenever it is asked for.

Some chat templates write the date into the prompt (`strftime_now`). Rendered anew at every stage, reference rollouts
and training would see different prompts. A prompt of a run therefore carries the moment it was first rendered at
(`Prompt.rendered_at`), and the run's reward model is told the same one.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from infalign.errors import InputError
from infalign.rollouts.prompts import Message
from infalign.rollouts.template_errors import explaining

_CLOCK = "strftime_now"  # how a template asks for the time, in transformers
_CODES = "%a %A %w %d %b %B %m %y %Y %H %I %M %S %f %p %z %Z %j %U %W %c %x %X %G %u %V %e %D %F %T %R %-d %-m %-H %-I"


def moment_now() -> str:
    """The present, as `Prompt.rendered_at` holds it."""
    return datetime.datetime.now().isoformat(timespec="seconds")


def reads_the_clock(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template depends on when it is rendered."""
    return _CLOCK in str(getattr(tokenizer, "chat_template", None) or "")


def rendered_text(tokenizer: Any, messages: Sequence[Message], *, to_answer: bool, at: str | None = None) -> str:
    """Messages as text.

    Args:
        tokenizer: Has the chat template.
        messages: The messages.
        to_answer: Write the beginning of the assistant's turn behind them.
        at: The moment that the template is told; the present if None.

    Raises:
        InputError: There is no chat template, or it refuses the messages.
    """
    return _render(tokenizer, messages, to_answer, at, tokenize=False)


def rendered_ids(tokenizer: Any, messages: Sequence[Message], *, to_answer: bool, at: str | None = None) -> list[int]:
    """Messages as token ids; arguments and errors as for `rendered_text`."""
    return list(_render(tokenizer, messages, to_answer, at, tokenize=True, return_dict=True)["input_ids"])


def require_chat_template(tokenizer: Any) -> None:
    """Raise InputError unless the tokenizer can render chat messages."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("the prompts are chat messages, but the tokenizer has no chat template",
                         where=str(getattr(tokenizer, "name_or_path", "tokenizer")),
                         hint="Use a chat model, or give the prompts as text")  # fmt: skip


def _stopped_clock(moment: datetime.datetime) -> str:
    """A macro that stands in the clock's place; transformers hands a template values, but no functions."""
    tell = "".join(f" | replace({code!r}, {moment.strftime(code)!r})" for code in sorted(_CODES.split(), key=len)[::-1])
    percent = "| replace('%%', '\\x00')", "| replace('\\x00', '%')"
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format {percent[0]}{tell} {percent[1]} }}}}{{% endmacro %}}"


def _render(tokenizer: Any, messages: Sequence[Message], to_answer: bool, at: str | None, **how: Any) -> Any:
    require_chat_template(tokenizer)
    if at is not None and reads_the_clock(tokenizer):
        how["chat_template"] = _stopped_clock(datetime.datetime.fromisoformat(at)) + tokenizer.get_chat_template()
    with explaining(tokenizer):
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=to_answer, **how)
