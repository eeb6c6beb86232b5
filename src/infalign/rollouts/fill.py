"""Tokens and log-probabilities of rollouts that came without them, as those from servers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedModel

from infalign._io.progress import Progress, no_progress
from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.rollouts.policy import LocalPolicy, Policy
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.texts import response_texts
from infalign.rollouts.tokens import context_length, prompt_token_ids


def compute_logprobs(
    store: RolloutStore,
    model: PreTrainedModel | Policy,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
    chunk_size: int = 1024,
    progress: Progress | None = None,
) -> int:
    """Compute, by teacher forcing, what the store's rollouts of these prompts lack; it stays in the store.

    Where the tokens are not known either, the text is tokenized anew, with the end token where the response ended by
    itself. A model may have written the same text in other tokens; then this is the log-probability of one way to write
    it, slightly below the text's own.

    Args:
        store: Rollouts, some without `logprob`.
        model: The policy that drew them: a model, or a `MixturePolicy`. A server's store does not say which weights it
            served: be sure.
        tokenizer: Its tokenizer.
        prompts: Prompts of the rollouts.
        batch_size: Responses run at the same time.
        chunk_size: Responses between two writes; a call that is stopped loses at most these.
        progress: Called after each write.

    Returns:
        How many rollouts it was computed for.

    Raises:
        InputError: The tokenizer has no end token, or a rollout and its prompt are longer than the model's context.
        StorageError: The store cannot be written.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token", where="compute_logprobs", hint="Set tokenizer.eos_token")
    report = progress or no_progress
    prompt_ids_of = dict(zip([p.id for p in prompts], prompt_token_ids(tokenizer, prompts), strict=True))
    table = store.table(["prompt_id", "index", "text", "token_ids", "finish_reason", "logprob"])
    lacking = [row for row in table.to_pylist() if row["logprob"] is None and row["prompt_id"] in prompt_ids_of]
    policy = model if isinstance(model, Policy) else LocalPolicy(model, tokenizer)
    lengths = [context_length(one.model) for _, one in policy.components]
    context = min((length for length in lengths if length is not None), default=None)
    report(0, len(lacking), "")
    for start in range(0, len(lacking), chunk_size):
        rows = lacking[start : start + chunk_size]
        token_ids = response_token_ids(tokenizer, {name: [row[name] for row in rows] for name in rows[0]})
        for row, ids in zip(rows, token_ids, strict=True):
            length = len(prompt_ids_of[row["prompt_id"]]) + len(ids)
            if context is not None and length > context:
                raise InputError(
                    f"rollout {row['index']} of prompt {row['prompt_id']} has {counted(length, 'token')} with "
                    f"its prompt, the model's context is {context}",
                    where="compute_logprobs",
                    hint="Use the model and tokenizer that drew the rollouts",
                )
        given = [prompt_ids_of[row["prompt_id"]] for row in rows]
        logprobs = policy.logprobs(given, token_ids, batch_size)
        store.append_computed(
            {
                "prompt_id": [row["prompt_id"] for row in rows],
                "index": [row["index"] for row in rows],
                "token_ids": token_ids,
                "logprob": logprobs.tolist(),
                "num_tokens": [len(ids) for ids in token_ids],
            }
        )
        report(start + len(rows), len(lacking), "")
    return len(lacking)


def response_token_ids(tokenizer: Any, rows: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    """Responses as token ids: their own where they are known, else their text's, with the end token where they ended.

    Args:
        tokenizer: The tokenizer.
        rows: Columns `token_ids`, `text` and `finish_reason`.
    """
    unknown = [row for row, ids in enumerate(rows["token_ids"]) if ids is None]
    out = [[] if ids is None else list(ids) for ids in rows["token_ids"]]
    if unknown:
        texts = [rows["text"][row] for row in unknown]
        for row, ids in zip(unknown, encoded_responses(tokenizer, texts), strict=True):
            end = [tokenizer.eos_token_id] if rows["finish_reason"][row] == "stop" else []
            out[row] = [*ids, *end]
    return out


def encoded_responses(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids that read as these texts behind a prompt, as far as a plain way to tokenize them gives such."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    found = [tokens(text) for text in texts]
    before = next((ids for ids in found if ids), [])
    read = response_texts(tokenizer, [before] * len(texts), found)
    # Some tokenizers put a space before any text: one too many before each, whether or not it begins with its own.
    for row in [row for row, text in enumerate(texts) if read[row] != text]:
        with suppress(Exception):  # a tokenizer without a line break, and without a token for what it does not know
            text = texts[row]
            other = tokens(text[1:]) if text.startswith(" ") else tokens(f"\n{text}")[len(tokens("\n")) :]
            if response_texts(tokenizer, [before], [other])[0] == text:
                found[row] = other
    return found
