"""Prompts as token ids, and the tokens that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infalign.errors import InputError
from infalign.rollouts.prompts import Prompt, PromptContent, message_text
from infalign.rollouts.rendering import rendered_ids


def prompt_token_ids(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts: text as the tokenizer takes it, messages through the chat template, ready to be answered.

    Raises:
        InputError: A prompt has no tokens, or there are messages and the tokenizer has no chat template.
    """
    out: list[list[int]] = [[] for _ in prompts]
    texts = {i: prompt.prompt for i, prompt in enumerate(prompts) if isinstance(prompt.prompt, str)}
    if texts:
        encoded = tokenizer(list(texts.values()), padding=False, truncation=False, verbose=False)["input_ids"]
        for i, ids in zip(texts, encoded, strict=True):
            out[i] = list(ids)
    for i, prompt in enumerate(prompts):
        if i in texts:
            continue
        assert not isinstance(prompt.prompt, str), "told apart above"
        out[i] = rendered_ids(tokenizer, prompt.prompt, to_answer=True, at=prompt.rendered_at)
    for i, ids in enumerate(out):
        if not ids:
            raise InputError(f"prompt {i} has no tokens: {excerpt(prompts[i].prompt)}", where="prompts",
                             hint="Give a prompt, or a tokenizer that knows its words")  # fmt: skip
    return out


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: those of the model's generation settings and the tokenizer's own.

    Raises:
        InputError: There is none.
    """
    found: set[int] = set()
    settings = getattr(model, "generation_config", None)
    for end in (getattr(settings, "eos_token_id", None), tokenizer.eos_token_id):
        if end is not None:
            found.update([end] if isinstance(end, int) else end)
    if not found:
        raise InputError("neither model nor tokenizer has an end-of-sequence token", where="tokenizer",
                         hint="Set eos_token")  # fmt: skip
    return sorted(found)


def context_length(model: Any) -> int | None:
    """How many tokens the model can hold; None where nothing limits it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def excerpt(prompt: PromptContent, length: int = 60) -> str:
    """The beginning of a prompt, for a message."""
    text = prompt if isinstance(prompt, str) else " / ".join(message_text(message) for message in prompt)
    return repr(text if len(text) <= length else text[:length] + "…")
