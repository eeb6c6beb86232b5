"""Draw rollouts with a loaded transformers model: `LocalPolicy.draw` as a function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infalign._io.progress import Progress
from infalign.errors import InputError
from infalign.rollouts.batches import require_key
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.policy import LocalPolicy
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore


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
    require_key(store, tokenizer, max_new_tokens, seed)
    policy = LocalPolicy(model, tokenizer)
    return policy.draw(prompts, num_samples, store=store, batch_size=batch_size, progress=progress)
