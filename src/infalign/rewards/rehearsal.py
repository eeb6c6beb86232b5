"""Call a reward once on two made-up responses: was it written for the form of prompts that it will be shown?

A function that expects strings may not fail on chat messages but quietly score all alike: `len(completion)` is 1 for a
list with one message. So the messages of the call also tell whether anybody has read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infalign._io.http import EndpointError, RequestRefusedError
from infalign.errors import InputError, RewardError
from infalign.rewards.score import column_names, columns_of
from infalign.rewards.source import FunctionReward, HTTPReward, RewardSource, check_scores, rewards_in
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.texts import shown

_RESPONSES = ("Yes.", "No: I have thought about it, and 42 is not what you are looking for.\n\nHere is why.")
# What code meant for another form runs into; other errors may be about these responses, and a response that a function
# cannot score is no fault.
_OF_THE_FORM = (TypeError, AttributeError, KeyError, IndexError)
_PATIENCE = 20.0  # seconds
_STATED = {
    True: "The prompts are chat messages, so a prompt is a list of messages and a completion "
    "[{'role': 'assistant', 'content': …}], as in TRL; completion[-1]['content'] is its text",
    False: "The prompts are text, so prompts and completions are strings, as in TRL",
}


class _Watched(dict[str, Any]):
    """A message that remembers whether its content was looked at."""

    seen = False

    def __getitem__(self, key: str) -> Any:
        self.seen |= key == "content"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen |= key == "content"
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.seen |= key == "content"
        return super().pop(key, *default)

    def items(self) -> Any:
        self.seen = True
        return super().items()

    def values(self) -> Any:
        self.seen = True
        return super().values()

    def keys(self) -> Any:  # `dict(message)` and `{**message}` begin with it
        self.seen = True
        return super().keys()

    def copy(self) -> dict[str, Any]:
        self.seen = True
        return super().copy()

    def __iter__(self) -> Iterator[str]:
        self.seen = True
        return super().__iter__()

    def __repr__(self) -> str:
        self.seen = True
        return super().__repr__()

    __hash__ = None  # type: ignore[assignment]  # as a dict


def rehearse(source: RewardSource, prompts: Sequence[Prompt], where: str) -> None:
    """Call a function or server once on two responses to the first prompt; other sources are left alone.

    Args:
        source: What scores.
        prompts: The prompts that it will be shown, with their columns.
        where: What to call it in a message.

    Raises:
        InputError: It fails on their form, or gives both responses one score without reading either.
        RewardError: It does not return one number per response.
    """
    if not prompts or not isinstance(source, FunctionReward | HTTPReward):
        return
    first = prompts[0]
    rows, chat = [first, first], not isinstance(first.prompt, str)
    columns = columns_of(rows, column_names(prompts))
    contents, completions = shown([first.prompt, first.prompt], _RESPONSES)
    if isinstance(source, HTTPReward):
        _rehearse_server(source, contents, completions, chat, where)
        return
    messages = [_Watched(one[0]) for one in completions if not isinstance(one, str)]
    given: list[Any] = [[one] for one in messages] if chat else list(completions)
    try:
        scores = source.call_once(contents, given, columns)
    except _OF_THE_FORM as error:
        raise InputError(
            f"it fails on two sample responses ({type(error).__name__}: {error})", where=where, hint=_STATED[chat]
        ) from error
    except (RewardError, InputError):
        raise
    except Exception:  # about what these responses say
        return
    alike = np.array_equal(scores.rewards[:1], scores.rewards[1:], equal_nan=True)
    if chat and alike and not any(one.seen for one in messages):
        raise InputError(
            "it scores a response without reading what it says: two different ones get the same score",
            where=where,
            hint=_STATED[chat],
        )


def _rehearse_server(source: HTTPReward, prompts: Any, completions: Any, chat: bool, where: str) -> None:
    once = replace(source.endpoint, retries=0, timeout=min(source.endpoint.timeout, _PATIENCE))
    try:
        answer = once.post("", {"prompts": prompts, "completions": completions})
    except RequestRefusedError as error:
        raise InputError(f"it refuses two sample responses ({error.what})", where=where, hint=_STATED[chat]) from error
    except EndpointError:  # it need not run yet
        return
    check_scores(rewards_in(answer), len(completions), 0, where)
