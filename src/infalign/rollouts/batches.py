"""What a store lacks, cut into batches, and drawing one batch: shared by one process and by a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from infalign._io.wording import counted
from infalign.errors import InputError, MismatchError
from infalign.rollouts.decode import Continuation, DrawingStopped, decode, uniforms
from infalign.rollouts.embeddings import embedding_rows, require_embeddings
from infalign.rollouts.key import RolloutKey, tokenizer_fingerprint
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.texts import response_texts
from infalign.rollouts.tokens import context_length, excerpt

# On a CPU, throughput is best with a few hundred rows: the cache of more does not fit the processor's own.
ROWS_ON_CPU = 512
_MOST_ROWS = 4096
_SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Missing:
    """Rollouts of one prompt that are to be drawn.

    Attributes:
        prompt_id: The prompt.
        tokens: Its token ids.
        indices: Which of its rollouts.
        stream: They are decided by (seed, stream, index); the prompt's id if not given.
        prompt: The prompt itself, for a policy behind a server.
    """

    prompt_id: str
    tokens: list[int]
    indices: list[int]
    stream: str | None = None
    prompt: Prompt | None = None

    @property
    def decided_by(self) -> str:
        """The stream, or what stands for it."""
        return self.prompt_id if self.stream is None else self.stream


def missing_rollouts(
    store: RolloutStore, prompts: Sequence[Prompt], tokens: Sequence[list[int]], num_samples: int
) -> list[Missing]:
    """For each prompt, once, the rollouts that the store lacks; longest prompts first.

    What does not fit in memory shows at once then, and the time left is never underestimated.
    """
    present = store.present()
    found: dict[str, Missing] = {}
    for prompt, ids in zip(prompts, tokens, strict=True):
        there = present.get(prompt.id, set())
        lacking = [index for index in range(num_samples) if index not in there]
        if lacking:
            found.setdefault(prompt.id, Missing(prompt.id, list(ids), lacking))
    return sorted(found.values(), key=lambda one: (-len(one.tokens), one.prompt_id))


def take_batch(pending: deque[Missing], rows: int) -> list[Missing]:
    """Remove the next `rows` rollouts from `pending`; a prompt with more than that is spread over batches."""
    batch: list[Missing] = []
    while pending and rows > 0:
        one = pending.popleft()
        batch.append(replace(one, indices=one.indices[:rows]))
        if len(one.indices) > rows:
            pending.appendleft(replace(one, indices=one.indices[rows:]))
        rows -= min(rows, len(one.indices))
    return batch


def draw_all(
    model: PreTrainedModel,
    tokenizer: Any,
    missing: Sequence[Missing],
    end_tokens: Sequence[int],
    key: RolloutKey,
    batch_size: int | None = None,
    active: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[dict[str, list[Any]]]:
    """Draw all of `missing` in batches that fit in memory; yields each batch as rows for the store.

    Stopped by Ctrl-C within a batch, it still yields the rows that had ended.

    Args:
        model: The policy, in evaluation mode.
        tokenizer: Its tokenizer.
        missing: What to draw, the longest prompts first.
        end_tokens: Tokens that end a response.
        key: Seed, length, temperature and top_p.
        batch_size: Rollouts drawn at the same time; by default as many as fit.
        active: Entered around each batch, for a model that others use between batches.
    """
    rows = batch_size or rows_in_memory(
        model, max((len(one.tokens) for one in missing), default=1) + key.max_new_tokens
    )
    pending = deque(missing)
    while pending:
        batch = take_batch(pending, rows)
        try:
            with active():
                new = draw_batch(model, tokenizer, batch, end_tokens, key)
        except _BatchStopped as stopped:
            yield stopped.rows
            raise KeyboardInterrupt from None
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows = max(1, min(rows, sum(len(one.indices) for one in batch)) // 2)
            pending.extendleft(reversed(batch))
            torch.cuda.empty_cache()
            continue
        yield new


def rows_in_memory(model: PreTrainedModel, longest: int) -> int:
    """How many rollouts fit in the free memory: their keys and values, and the logits of one token."""
    if model.device.type != "cuda":
        return ROWS_ON_CPU
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * longest * model.dtype.itemsize
    logits = config.vocab_size * (model.dtype.itemsize + 4 * 4)  # as they come, and four float32 copies on the way
    free, _ = torch.cuda.mem_get_info(model.device)
    # Dropping ended rows copies the cache once.
    return int(np.clip(_SHARE_OF_MEMORY * free / (2 * cache + logits), 1, _MOST_ROWS))


def draw_batch(
    model: PreTrainedModel, tokenizer: Any, batch: Sequence[Missing], end_tokens: Sequence[int], key: RolloutKey
) -> dict[str, list[Any]]:
    """Draw a batch: rows for the store, decided by (seed, prompt, index) whoever draws them."""
    pairs = [(one, index) for one in batch for index in one.indices]
    try:
        drawn_B = decode(
            model,
            [one.tokens for one in batch],
            np.repeat(np.arange(len(batch)), [len(one.indices) for one in batch]),
            np.stack([uniforms(key.seed, one.decided_by, index, key.max_new_tokens) for one, index in pairs]),
            end_tokens=end_tokens,
            temperature=key.temperature,
            top_p=key.top_p,
        )
    except DrawingStopped as stopped:
        finished = stopped.finished
        if not finished:
            raise
        raise _BatchStopped(_as_rows(tokenizer, [pairs[b] for b in finished], list(finished.values()))) from None
    return _as_rows(tokenizer, pairs, drawn_B)


class _BatchStopped(KeyboardInterrupt):
    """Ctrl-C while a batch was drawn, of which some rows had ended."""

    def __init__(self, rows: dict[str, list[Any]]) -> None:
        super().__init__()
        self.rows = rows


def _as_rows(
    tokenizer: Any, pairs: Sequence[tuple[Missing, int]], drawn_B: Sequence[Continuation]
) -> dict[str, list[Any]]:
    # The end token is no text, whether or not the tokenizer counts it among its special ones.
    shown = [one.token_ids[:-1] if one.ended else one.token_ids for one in drawn_B]
    return {
        "prompt_id": [one.prompt_id for one, _ in pairs],
        "index": [index for _, index in pairs],
        "text": response_texts(tokenizer, [one.tokens for one, _ in pairs], shown),
        "token_ids": [one.token_ids for one in drawn_B],
        "logprob": [one.logprob for one in drawn_B],
        "num_tokens": [len(one.token_ids) for one in drawn_B],
        "finish_reason": ["stop" if one.ended else "length" for one in drawn_B],
    }


def require_key(
    store: RolloutStore,
    tokenizer: Any,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    sampler: str = "transformers",
) -> None:
    """Raise MismatchError unless the store is for this tokenizer, length and seed, and drawn by this sampler."""
    now = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    asked = {"tokenizer": now, "max_new_tokens": max_new_tokens, "seed": seed, "sampler": sampler}
    there = store.key.to_dict()
    different = [f"{name} is {value!r}, the store's is {there[name]!r}"
                 for name, value in asked.items() if value is not None and value != there[name]]  # fmt: skip
    if different:
        raise MismatchError("these rollouts would not belong here: " + "; ".join(different), where=str(store.path),
                            hint="Open a store with the matching key")  # fmt: skip


def require_fit(model: Any, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise InputError where a prompt leaves no room or has an unknown token; `model` is anything with a `config`."""
    require_embeddings(tokens, embedding_rows(model), "prompts", what="prompt")
    context = context_length(model)
    if context is None:
        return
    too_long = [p for p, ids in enumerate(tokens) if len(ids) > context - max_new_tokens]
    if too_long:
        p = too_long[0]
        raise InputError(
            f"{counted(len(too_long), 'prompt leaves', 'prompts leave')} no room for "
            f"{counted(max_new_tokens, 'new token')} in a context of {context}; "
            f"the first is prompt {p} ({prompts[p].id}) with {counted(len(tokens[p]), 'token')}: "
            f"{excerpt(prompts[p].prompt)}",
            where="prompts",
            hint="Leave them out, shorten them, or lower max_new_tokens",
        )
