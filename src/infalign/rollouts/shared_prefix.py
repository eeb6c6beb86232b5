"""Attention in which the continuations of one prompt share the prompt's keys and values instead of each having a copy.

While decoding, reading the cache is what takes the time. With K continuations per prompt the prompt's part is read once
for all of them, as one matrix product, and only each continuation's own part is read row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Models whose attention is the plain scaled dot product and goes through the attention interface.
_PLAIN_ATTENTION = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2", "smollm3", "granite", "phi3"})
_NAME = "infalign_shared_prefix"
_FEWEST_ROWS_PER_PROMPT = 4


class SharedPrefix:
    """The prompts' keys and values, and which rows of the running batch continue which prompt.

    Args:
        cache: Cache after the prompts were run through the model, one row per prompt; its layers become those of the
            continuations alone.
        mask_PL: 1 where a prompt has a token.
        prompt_of_B: Which prompt each row continues.
        max_new_tokens: Room to make for the continuations.
    """

    def __init__(
        self, cache: DynamicCache, mask_PL: torch.Tensor, prompt_of_B: torch.Tensor, max_new_tokens: int
    ) -> None:
        self._cache = cache
        layers = cast("list[Any]", cache.layers)
        self._prefix: list[tuple[torch.Tensor, torch.Tensor]] = [(layer.keys, layer.values) for layer in layers]
        dtype = layers[0].keys.dtype
        bias_PL = torch.zeros(mask_PL.shape, dtype=dtype, device=mask_PL.device)
        self.bias_PL = bias_PL.masked_fill(mask_PL == 0, torch.finfo(dtype).min)
        self._prompt_of_B = prompt_of_B
        length = mask_PL.shape[1]
        cache.layers[:] = [_OwnLayer(layer, len(prompt_of_B), length, max_new_tokens) for layer in layers]
        self._group()

    @staticmethod
    def fits(model: PreTrainedModel, cache: DynamicCache, num_prompts: int, num_rows: int) -> bool:
        """Whether this model can share prompts, and whether it would pay."""
        config: Any = model.config.get_text_config()
        return (
            config.model_type in _PLAIN_ATTENTION
            and config._attn_implementation == "sdpa"
            and all(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in cache.layers)
            and num_rows >= _FEWEST_ROWS_PER_PROMPT * num_prompts
        )

    @contextmanager
    def used_by(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the model attend this way for a while."""
        before = str(model.config._attn_implementation)
        token = _active.set(self)
        model.set_attn_implementation(_NAME)
        try:
            yield
        finally:
            model.set_attn_implementation(before)
            _active.reset(token)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all other rows of the running batch."""
        self._cache.reorder_cache(cast("torch.LongTensor", rows))
        self._prompt_of_B = self._prompt_of_B[rows]
        self._group()

    def _group(self) -> None:
        """Rows of each prompt in a rectangle, shape (P, M), filled up with row 0; and where each row is in it."""
        order_B = torch.argsort(self._prompt_of_B, stable=True)
        counts_P = torch.bincount(self._prompt_of_B, minlength=len(self.bias_PL))
        first_P = counts_P.cumsum(0) - counts_P
        most = int(counts_P.max())
        slot_B = torch.arange(len(order_B), device=order_B.device) - first_P[self._prompt_of_B[order_B]]
        place_B = self._prompt_of_B[order_B] * most + slot_B
        rows_PM = torch.zeros(len(counts_P) * most, dtype=torch.long, device=order_B.device)
        rows_PM[place_B] = order_B
        self.rows_PM = rows_PM.view(-1, most)
        self.place_B = torch.empty_like(order_B)
        self.place_B[order_B] = place_B

    def attend(self, layer: int, query_BHD: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float):
        """Attention of one query per row over its prompt and its own tokens, shape (B, H, D)."""
        prefix_key, prefix_value = self._prefix[layer]
        rows, heads, width = query_BHD.shape
        shared_heads = key.shape[1]  # several query heads may share a key head
        query = query_BHD.view(rows, shared_heads, heads // shared_heads, width)
        prefix_scores = self._spread(self._gather(query) @ prefix_key.transpose(-1, -2), query)
        prefix_scores = prefix_scores * scaling + self.bias_PL[self._prompt_of_B][:, None, None]
        own_scores = (query @ key.transpose(-1, -2)) * scaling
        length = prefix_scores.shape[-1]
        weights = torch.softmax(torch.cat([prefix_scores, own_scores], -1), -1, dtype=torch.float32).to(query.dtype)
        out = weights[..., length:] @ value
        out = out + self._spread(self._gather(weights[..., :length]) @ prefix_value, query)
        return out.reshape(rows, heads, width)

    def _gather(self, per_row: torch.Tensor) -> torch.Tensor:
        """(B, H, R, X) → (P, H, M·R, X): the rows of each prompt side by side."""
        return per_row[self.rows_PM].permute(0, 2, 1, 3, 4).flatten(2, 3)

    def _spread(self, per_prompt: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The reverse of `_gather`."""
        repeats = like.shape[2]
        split = per_prompt.unflatten(2, (-1, repeats)).permute(0, 2, 1, 3, 4)
        return split.flatten(0, 1)[self.place_B]


class _OwnLayer(DynamicLayer):
    """Keys and values of the continuations alone, with room for all of them."""

    def __init__(self, prefix: Any, num_rows: int, prefix_length: int, capacity: int) -> None:
        super().__init__()
        _, heads, _, key_width = prefix.keys.shape
        self.lazy_initialization(prefix.keys, prefix.values)
        self._prefix_length = prefix_length
        self._count = 0
        self._all_keys = prefix.keys.new_empty(num_rows, heads, capacity, key_width)
        self._all_values = prefix.values.new_empty(num_rows, heads, capacity, prefix.values.shape[-1])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._all_keys[:, :, self._count] = key_states[:, :, 0]
        self._all_values[:, :, self._count] = value_states[:, :, 0]
        self._count += 1
        return self._all_keys[:, :, : self._count], self._all_values[:, :, : self._count]

    def get_seq_length(self) -> int:
        return self._prefix_length + self._count

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._all_keys = self._all_keys.index_select(0, beam_idx)
        self._all_values = self._all_values.index_select(0, beam_idx)


_active: ContextVar[SharedPrefix | None] = ContextVar("shared_prefix", default=None)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    shared = _active.get()
    if shared is None or query.shape[2] != 1:
        raise RuntimeError("shared-prefix attention decodes one token per row inside SharedPrefix.used_by")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHD = shared.attend(cast(Any, module).layer_idx, query[:, :, 0], key, value, scale)
    return out_BHD[:, None], None


AttentionInterface.register(_NAME, _attention)
