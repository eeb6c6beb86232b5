"""Tokens and log-probabilities of rollouts that came without them, as those from servers do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from infalign.data import Prompt
from infalign.errors import InputError
from infalign.rollouts.logprobs import sequence_logprobs
from infalign.rollouts.progress import Progress, no_progress
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.tokens import prompt_token_ids
from infalign.wording import counted


def compute_logprobs(
    store: RolloutStore,
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
    chunk_size: int = 1024,
    progress: Progress | None = None,
) -> int:
    """Compute, by teacher forcing, what the store's rollouts of these prompts lack; it stays in the store.

    The text is tokenized anew, with the end token where the response ended by itself. A model may have written the same
    text in other tokens; then this is the log-probability of one way to write it, slightly below the text's own.

    Args:
        store: Rollouts, some without `logprob`.
        model: The policy that drew them. A server's store does not say which weights it served: be sure.
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
    table = store.table(["prompt_id", "index", "text", "finish_reason", "logprob"])
    lacking = [row for row in table.to_pylist() if row["logprob"] is None and row["prompt_id"] in prompt_ids_of]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    report(0, len(lacking), "")
    for start in range(0, len(lacking), chunk_size):
        rows = lacking[start : start + chunk_size]
        texts = [row["text"] for row in rows]
        token_ids = [list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        for row, ids in zip(rows, token_ids, strict=True):
            if row["finish_reason"] == "stop":
                ids.append(tokenizer.eos_token_id)
            length = len(prompt_ids_of[row["prompt_id"]]) + len(ids)
            if context is not None and length > context:
                raise InputError(
                    f"rollout {row['index']} of prompt {row['prompt_id']} has {counted(length, 'token')} with "
                    f"its prompt, the model's context is {context}",
                    where="compute_logprobs",
                    hint="Use the model and tokenizer that drew the rollouts",
                )
        given = [prompt_ids_of[row["prompt_id"]] for row in rows]
        logprobs = sequence_logprobs(model, tokenizer, given, token_ids, batch_size)
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
