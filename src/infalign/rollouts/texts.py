"""What a reward is shown: the text of a response, and the form of prompts and responses.

One form everywhere, TRL's: a text prompt is a string and so is its response; of chat messages the prompt is the list of
messages, and its response a list with one message of the assistant.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from infalign.rollouts.prompts import PromptContent, message_text

Ids = Sequence[int]


def response_texts(tokenizer: Any, prompt_ids_B: Sequence[Ids], response_ids_B: Sequence[Ids]) -> list[str]:
    """Text of each response: that of prompt and response less that of the prompt, without special tokens.

    Decoded alone, a response may lose what its tokens say: Llama-2's and BERT's decoders drop a leading space, so
    that `the` after `the cat` would read `the catthe`. Where the prompt's text is no beginning of the whole, because
    the decoder rewrites across the border, the response is decoded alone.

    Args:
        tokenizer: The policy's tokenizer.
        prompt_ids_B: Token ids of B prompts, as the policy read them.
        response_ids_B: Token ids of B responses, without the token that ended them.
    """
    if not response_ids_B:
        return []
    prompts = [tuple(ids) for ids in prompt_ids_B]
    different = list(dict.fromkeys(prompts))
    before = dict(zip(different, _decoded(tokenizer, different), strict=True))
    whole_B = _decoded(tokenizer, [(*p, *r) for p, r in zip(prompts, response_ids_B, strict=True)])
    texts: list[str] = []
    for prompt, response, whole in zip(prompts, response_ids_B, whole_B, strict=True):
        fits = whole.startswith(before[prompt])
        texts.append(whole[len(before[prompt]) :] if fits else _decoded(tokenizer, [response])[0])
    return texts


def shown(
    prompts: Sequence[PromptContent], completions: Sequence[PromptContent]
) -> tuple[list[PromptContent], list[PromptContent]]:
    """Prompts and responses in the form that rewards are shown, whichever form they come in.

    The reward gets copies: what it does to them changes nothing elsewhere.
    """
    pairs = zip(prompts, completions, strict=True)
    return list(copy.deepcopy(list(prompts))), [_completion(prompt, completion) for prompt, completion in pairs]


def completion_text(completion: PromptContent) -> str:
    """The text of a response in either form."""
    return completion if isinstance(completion, str) else "\n".join(message_text(one) for one in completion)


def _completion(prompt: PromptContent, completion: PromptContent) -> PromptContent:
    if isinstance(prompt, str):
        return completion_text(completion)
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return copy.deepcopy(completion)


def _decoded(tokenizer: Any, ids_B: Sequence[Ids]) -> list[str]:
    return tokenizer.batch_decode([list(ids) for ids in ids_B], skip_special_tokens=True)
