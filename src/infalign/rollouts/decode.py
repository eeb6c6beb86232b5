"""The sampling loop: prompts prefilled once, their K continuations decoded together, ended rows dropped on the way.

Rollouts are drawn by inverting the cumulative distribution with one uniform number per token. The numbers belong to a
rollout (seed, prompt, index), not to a batch, so a rollout does not depend on which others it was drawn with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from infalign.errors import InputError
from infalign.rollouts.shared_prefix import SharedPrefix


@dataclass(frozen=True)
class Continuation:
    """One response.

    Attributes:
        token_ids: Its tokens, with the end token where it ended by itself.
        logprob: Sum of their log-probabilities under the sampler, in nats.
        ended: Whether it ended by itself.
    """

    token_ids: list[int]
    logprob: float
    ended: bool


class DrawingStopped(KeyboardInterrupt):
    """Ctrl-C while responses were drawn.

    Attributes:
        finished: The responses that had ended by themselves, by their row.
    """

    def __init__(self, finished: dict[int, Continuation]) -> None:
        super().__init__()
        self.finished = finished


def uniforms(seed: int, prompt_id: str, index: int, count: int) -> NDArray[np.float64]:
    """The numbers in [0, 1) that decide rollout `index` of a prompt, one per token."""
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}\0{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompt_tokens: Sequence[Sequence[int]],
    prompt_of_B: NDArray[np.int64],
    uniforms_BT: NDArray[np.float64],
    *,
    end_tokens: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    share_prompts: bool = True,
) -> list[Continuation]:
    """Draw one continuation per row, T tokens at most.

    Args:
        model: The policy, in evaluation mode.
        prompt_tokens: Token ids of the prompts; each is run through the model once.
        prompt_of_B: Which prompt each row continues, shape (B,).
        uniforms_BT: One number in [0, 1) per row and token, shape (B, T).
        end_tokens: Tokens that end a response.
        temperature: Logits are divided by it.
        top_p: Smallest set of tokens kept, by probability.
        share_prompts: Keep a prompt's keys and values once for all its continuations where the model's attention
            allows it; the same distribution, up to rounding.

    Returns:
        One continuation per row.

    Raises:
        DrawingStopped: By Ctrl-C, with the rows that had ended.
    """
    device = model.device
    num_rows, max_new_tokens = uniforms_BT.shape
    longest = max(len(tokens) for tokens in prompt_tokens)
    ids_PL = torch.zeros(len(prompt_tokens), longest, dtype=torch.long)
    mask_PL = torch.zeros(len(prompt_tokens), longest, dtype=torch.long)
    for row, tokens in enumerate(prompt_tokens):
        ids_PL[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask_PL[row, longest - len(tokens) :] = 1
    ids_PL, mask_PL = ids_PL.to(device), mask_PL.to(device)
    padded = bool((mask_PL == 0).any())
    cache = _roomy_cache(model, longest + max_new_tokens)
    logits_PV = model(
        input_ids=ids_PL,
        attention_mask=mask_PL,
        position_ids=(mask_PL.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]

    if bool(torch.isnan(logits_PV).any()):
        raise InputError(
            "the model's logits are not numbers",
            where="policy",
            hint="Check its weights and data type; after a training, lower the learning rate",
        )
    prompt_of = torch.as_tensor(prompt_of_B, device=device)
    shared = None
    if share_prompts and SharedPrefix.fits(model, cache, len(prompt_tokens), num_rows):
        shared = SharedPrefix(cache, mask_PL, prompt_of, max_new_tokens)
    else:
        _keep_rows(cache, prompt_of)
    logits_BV = logits_PV[prompt_of]
    lengths_B = mask_PL.sum(-1)[prompt_of]
    mask_BL = torch.nn.functional.pad(mask_PL, (0, max_new_tokens), value=1)[prompt_of]
    noise_BT = torch.as_tensor(uniforms_BT, device=device)
    ends = torch.tensor(sorted(end_tokens), device=device)

    live_B = torch.arange(num_rows, device=device)  # which row each line of the running batch is
    running_B = torch.ones(num_rows, dtype=torch.bool, device=device)
    tokens_BT = torch.zeros(num_rows, max_new_tokens, dtype=torch.long, device=device)
    count_B = torch.zeros(num_rows, dtype=torch.long, device=device)
    logprob_B = torch.zeros(num_rows, dtype=torch.float64, device=device)
    ended_B = torch.zeros(num_rows, dtype=torch.bool, device=device)
    stopped = False
    try:
        with nullcontext() if shared is None else shared.used_by(model):
            for t in range(max_new_tokens):
                token_B, step_logprob_B = draw_tokens(logits_BV, noise_BT[live_B, t], temperature, top_p)
                tokens_BT[live_B, t] = token_B
                logprob_B[live_B] += torch.where(running_B, step_logprob_B, 0.0)
                count_B[live_B] += running_B
                stops_B = running_B & torch.isin(token_B, ends)
                ended_B[live_B] |= stops_B
                running_B = running_B & ~stops_B
                num_running = int(running_B.sum())
                if num_running == 0 or t == max_new_tokens - 1:
                    break
                # Dropping rows copies the cache: worth it once an eighth of them is idle.
                if num_running <= 0.875 * running_B.numel():
                    keep = running_B.nonzero().squeeze(-1)
                    if shared is None:
                        _keep_rows(cache, keep)
                    else:
                        shared.keep_rows(keep)
                    live_B, token_B, lengths_B, mask_BL = live_B[keep], token_B[keep], lengths_B[keep], mask_BL[keep]
                    running_B = running_B[keep]
                logits_BV = model(
                    input_ids=token_B[:, None],
                    attention_mask=mask_BL[:, : longest + t + 1] if padded and shared is None else None,
                    position_ids=(lengths_B + t)[:, None],
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
    except KeyboardInterrupt:
        stopped = True  # a row that is marked as ended is complete: the mark is set last

    counts, logprobs, ended = count_B.tolist(), logprob_B.tolist(), ended_B.tolist()
    rows = tokens_BT.cpu().numpy()
    drawn = [Continuation(rows[b, : counts[b]].tolist(), logprobs[b], ended[b]) for b in range(num_rows)]
    if stopped:
        raise DrawingStopped({b: one for b, one in enumerate(drawn) if one.ended})
    return drawn


def draw_tokens(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert the cumulative distribution at `uniform_B`: tokens, and their log-probabilities in float64."""
    logits_BV = logits_BV.float()
    if temperature != 1.0:
        logits_BV = logits_BV / temperature
    if top_p < 1.0:
        logits_BV = _keep_nucleus(logits_BV, top_p)
    probability_BV = torch.softmax(logits_BV, dim=-1)
    cumulative_BV = probability_BV.cumsum(-1)
    total_B = cumulative_BV[:, -1]
    # The last float below the total: a number that rounds up to it must not run past the last possible token.
    below_total_B = torch.nextafter(total_B, torch.zeros_like(total_B))
    at_B = torch.minimum((uniform_B * total_B.double()).float(), below_total_B)
    token_B = torch.searchsorted(cumulative_BV, at_B[:, None], right=True).squeeze(-1)
    logprob_B = logits_BV.gather(-1, token_B[:, None]).squeeze(-1).double() - torch.logsumexp(logits_BV, -1).double()
    return token_B, logprob_B


def _keep_nucleus(logits_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits with all but the smallest set of tokens of total probability at least top_p at −∞."""
    ordered_BV, order_BV = logits_BV.sort(-1, descending=True)
    probability_BV = torch.softmax(ordered_BV, dim=-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    ordered_BV = ordered_BV.masked_fill(before_BV >= top_p, float("-inf"))
    return torch.empty_like(logits_BV).scatter_(-1, order_BV, ordered_BV)


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for the whole response: writes in place where `DynamicLayer` copies at every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._all_keys: torch.Tensor | None = None
        self._all_values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._all_keys is None or self._all_values is None:
            self._all_keys, self._all_values = self._grown(key_states, old), self._grown(value_states, old)
            if old and self.keys is not None and self.values is not None:
                self._all_keys[:, :, :old], self._all_values[:, :, :old] = self.keys, self.values
        self._all_keys[:, :, old:new] = key_states
        self._all_values[:, :, old:new] = value_states
        self.keys, self.values = self._all_keys[:, :, :new], self._all_values[:, :, :new]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._all_keys = self._all_values = None  # made anew, for the new number of rows, at the next token

    def _grown(self, states: torch.Tensor, old: int) -> torch.Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, max(self.capacity, old + states.shape[-2]), width)


def _keep_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Make the cache's rows these ones, in this order; a row may come several times."""
    cache.reorder_cache(cast("torch.LongTensor", rows))


def _roomy_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    # Sliding windows and recurrent states keep their own layers, which do not grow.
    cache.layers = [_RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
