"""Candidates from a transformers model in this process, by the sampler that draws rollouts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infalign.decode.candidates import CandidateSampler, Draw, Drawn, Request
from infalign.errors import InfalignError, InputError
from infalign.rollouts.batches import Missing, draw_all, require_fit
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.tokens import end_tokens, prompt_token_ids


class LocalSampler(CandidateSampler):
    """A transformers model.

    Threads wait for each other: the model serves one call at a time, with all its requests in one batch. A candidate
    does not depend on its batch, but for rounding in the model's own arithmetic.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        max_new_tokens: Longest response.
        temperature: 1 samples the policy itself, which calibration refers to.
        top_p: As `temperature`.
        batch_size: Candidates drawn at the same time; by default as many as fit in memory.
        name: What to call the model in messages and records.

    Raises:
        InputError: A setting is out of range, or nothing tells how a response ends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int | None = None,
        name: str | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}", where="LocalSampler", mend="Give at least 1")
        self.name = name or str(getattr(model, "name_or_path", "")) or type(model).__name__
        self._model = model
        self._tokenizer = tokenizer
        # A key wants the fingerprints of a store; nothing is stored here.
        self._settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self._key(seed=0)
        self._batch_size = batch_size
        self._end_tokens = end_tokens(model, tokenizer)
        self._lock = threading.Lock()

    def draw(self, requests: Sequence[Request], seed: int) -> list[Drawn | InfalignError]:
        """As `CandidateSampler.draw`; an InputError for a prompt that leaves no room for the response."""
        key = self._key(seed)
        with self._lock:
            refused: dict[int, InfalignError] = {}
            wanted: list[Missing] = []
            for at, request in enumerate(requests):
                try:
                    (tokens,) = prompt_token_ids(self._tokenizer, [request.prompt])
                    require_fit(self._model, [request.prompt], [tokens], key.max_new_tokens)
                except InputError as error:
                    refused[at] = error
                    continue
                wanted.append(Missing(str(at), tokens, list(request.indices), stream=request.stream))
            wanted.sort(key=lambda one: -len(one.tokens))
            draws: dict[int, dict[int, Draw]] = {at: {} for at in range(len(requests))}
            was_training = self._model.training
            self._model.eval()
            try:
                for rows in draw_all(self._model, self._tokenizer, wanted, self._end_tokens, key, self._batch_size):
                    columns = (rows[c] for c in ("prompt_id", "index", "text", "num_tokens", "finish_reason"))
                    for at, index, *drawn in zip(*columns, strict=True):
                        draws[int(at)][index] = Draw(*drawn)
            finally:
                self._model.train(was_training)
        return [refused[at] if at in refused else _in_order(draws[at], one) for at, one in enumerate(requests)]

    def _key(self, seed: int) -> RolloutKey:
        settings: dict[str, Any] = self._settings
        return RolloutKey("", "", seed=seed, **settings)


def _in_order(draws: dict[int, Draw], request: Request) -> Drawn:
    ordered = tuple(draws[index] for index in request.indices)
    return Drawn(ordered, sum(one.num_tokens or 0 for one in ordered))
