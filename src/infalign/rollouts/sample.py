"""Draw rollouts with a transformers model: exactly what a store is missing, in batches sorted by length."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infalign.data import Prompt
from infalign.errors import InputError, MismatchError
from infalign.rollouts.decode import Continuation, decode, uniforms
from infalign.rollouts.key import RolloutKey, tokenizer_fingerprint
from infalign.rollouts.progress import Progress, no_progress
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.tokens import context_length, end_tokens, excerpt, prompt_token_ids

# On a CPU, throughput is best with a few hundred rows: the cache of more does not fit the processor's own.
_ROWS_ON_CPU = 512
_MOST_ROWS = 4096
_SHARE_OF_MEMORY = 0.5


_Wanted = tuple[int, list[int]]  # a prompt, by its position, and which of its rollouts


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_samples: int,
    *,
    store: RolloutStore | str | Path,
    model_name: str | Path | None = None,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Draw rollouts 0..num_samples−1 of every prompt, as far as the store does not have them.

    Rollout `index` of a prompt is decided by (seed, prompt, index): an interrupted run that is started again, another
    batch size or another order of prompts give the same rollouts, but for rounding in the model's own arithmetic.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: Text is tokenised as it is, messages go through the chat template.
        num_samples: Rollouts per prompt.
        store: Where they go: an open store, whose key says temperature, top_p, length and seed; or a folder.
        model_name: With a folder: where the model was loaded from (folder or hub name), for the store's key.
        max_new_tokens: Longest response. With an open store it may be left out, and must be the store's if given.
        seed: As `max_new_tokens`.
        batch_size: Rollouts drawn at the same time; by default as many as fit in memory.
        progress: Called after each batch with the rollouts there are, those wanted, and the speed.

    Returns:
        How many rollouts were drawn.

    Raises:
        InputError: A prompt is longer than the model's context minus the response.
        MismatchError: The tokenizer, length or seed are not those of the store.
        StorageError: The store cannot be written, or somebody else is writing to it.
    """
    if not isinstance(store, RolloutStore):
        if model_name is None or max_new_tokens is None or seed is None:
            raise InputError("a new store needs model_name, max_new_tokens and seed", where="sample")
        key = RolloutKey.of(model_name, tokenizer, max_new_tokens=max_new_tokens, seed=seed)
        store = RolloutStore.open(store, key)
    key = store.key
    _require_key(store, tokenizer, max_new_tokens, seed)
    if num_samples < 1 or (batch_size is not None and batch_size < 1):
        raise InputError(f"num_samples is {num_samples} and batch_size {batch_size}", where="sample",
                         mend="Both must be at least 1")  # fmt: skip
    tokens = prompt_token_ids(tokenizer, prompts)
    _require_fit(model, prompts, tokens, key.max_new_tokens)
    ends = end_tokens(model, tokenizer)
    report = progress or no_progress
    total = len({prompt.id for prompt in prompts}) * num_samples
    was_training = model.training
    model.eval()
    try:
        with store.writing():
            missing = _missing(store, prompts, num_samples)
            drawn, done = 0, total - sum(len(indices) for _, indices in missing)
            num_tokens, started = 0, time.monotonic()
            report(done, total, "")
            longest = max((len(tokens[p]) for p, _ in missing), default=1) + key.max_new_tokens
            rows = batch_size or _rows_in_memory(model, longest)
            # Longest first: what does not fit in memory shows at once, and the time left is never underestimated.
            pending = deque(sorted(missing, key=lambda item: (-len(tokens[item[0]]), prompts[item[0]].id)))
            while pending:
                batch = _take(pending, rows)
                try:
                    drawn_B = _draw(model, batch, prompts, tokens, ends, store.key)
                except torch.OutOfMemoryError:
                    if rows == 1:
                        raise
                    rows = max(1, min(rows, sum(len(indices) for _, indices in batch)) // 2)
                    pending.extendleft(reversed(batch))
                    torch.cuda.empty_cache()
                    continue
                store.append(_rows(tokenizer, batch, prompts, drawn_B))
                drawn += len(drawn_B)
                num_tokens += sum(len(one.token_ids) for one in drawn_B)
                speed = num_tokens / max(time.monotonic() - started, 1e-9)
                report(done + drawn, total, f"{speed:,.0f} tokens/s")
    finally:
        model.train(was_training)
    return drawn


def _require_key(store: RolloutStore, tokenizer: Any, max_new_tokens: int | None, seed: int | None) -> None:
    now = tokenizer_fingerprint(tokenizer)
    asked = {"tokenizer": now, "max_new_tokens": max_new_tokens, "seed": seed, "sampler": "transformers"}
    there = store.key.to_dict()
    different = [f"{name} is {value!r}, the store's is {there[name]!r}"
                 for name, value in asked.items() if value is not None and value != there[name]]  # fmt: skip
    if different:
        raise MismatchError("these rollouts would not belong here: " + "; ".join(different), where=str(store.path),
                            mend="Open a store with the matching key")  # fmt: skip


def _require_fit(
    model: PreTrainedModel, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    context = context_length(model)
    if context is None:
        return
    too_long = [p for p, ids in enumerate(tokens) if len(ids) > context - max_new_tokens]
    if too_long:
        p = too_long[0]
        raise InputError(
            f"{len(too_long)} prompts leave no room for {max_new_tokens} new tokens in a context of {context}; "
            f"the first is prompt {p} ({prompts[p].id}) with {len(tokens[p])} tokens: {excerpt(prompts[p].prompt)}",
            where="prompts",
            mend="Leave them out, shorten them, or lower max_new_tokens",
        )


def _missing(store: RolloutStore, prompts: Sequence[Prompt], num_samples: int) -> list[_Wanted]:
    """For each prompt (by position, once) the rollouts that the store lacks."""
    present = store.present()
    seen: set[str] = set()
    missing: list[_Wanted] = []
    for position, prompt in enumerate(prompts):
        if prompt.id in seen:
            continue
        seen.add(prompt.id)
        there = present.get(prompt.id, set())
        lacking = [index for index in range(num_samples) if index not in there]
        if lacking:
            missing.append((position, lacking))
    return missing


def _take(pending: deque[_Wanted], rows: int) -> list[_Wanted]:
    """Remove the next `rows` rollouts from `pending`; a prompt with more than that is spread over batches."""
    batch: list[_Wanted] = []
    while pending and rows > 0:
        position, indices = pending.popleft()
        batch.append((position, indices[:rows]))
        if len(indices) > rows:
            pending.appendleft((position, indices[rows:]))
        rows -= min(rows, len(indices))
    return batch


def _draw(
    model: PreTrainedModel,
    batch: list[_Wanted],
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]],
    ends: list[int],
    key: RolloutKey,
) -> list[Continuation]:
    noise_BT = np.stack(
        [
            uniforms(key.seed, prompts[position].id, index, key.max_new_tokens)
            for position, indices in batch
            for index in indices
        ]
    )
    return decode(
        model,
        [tokens[position] for position, _ in batch],
        np.repeat(np.arange(len(batch)), [len(indices) for _, indices in batch]),
        noise_BT,
        end_tokens=ends,
        temperature=key.temperature,
        top_p=key.top_p,
    )


def _rows(
    tokenizer: Any, batch: list[_Wanted], prompts: Sequence[Prompt], drawn_B: list[Continuation]
) -> dict[str, list[Any]]:
    # The end token is no text, whether or not the tokenizer counts it among its special ones.
    shown = [one.token_ids[:-1] if one.ended else one.token_ids for one in drawn_B]
    return {
        "prompt_id": [prompts[position].id for position, indices in batch for _ in indices],
        "index": [index for _, indices in batch for index in indices],
        "text": tokenizer.batch_decode(shown, skip_special_tokens=True),
        "token_ids": [one.token_ids for one in drawn_B],
        "logprob": [one.logprob for one in drawn_B],
        "num_tokens": [len(one.token_ids) for one in drawn_B],
        "finish_reason": ["stop" if one.ended else "length" for one in drawn_B],
    }


def _rows_in_memory(model: PreTrainedModel, longest: int) -> int:
    """How many rollouts fit in the free memory: their keys and values, and the logits of one token."""
    if model.device.type != "cuda":
        return _ROWS_ON_CPU
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * longest * model.dtype.itemsize
    logits = config.vocab_size * (model.dtype.itemsize + 4 * 4)  # as they come, and four float32 copies on the way
    free, _ = torch.cuda.mem_get_info(model.device)
    # Dropping ended rows copies the cache once.
    return int(np.clip(_SHARE_OF_MEMORY * free / (2 * cache + logits), 1, _MOST_ROWS))
