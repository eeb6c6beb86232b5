"""Candidates from a transformers model in this process, by the sampler that draws rollouts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infalign.data import Prompt
from infalign.decode.candidates import CandidateSampler, Draw, Drawn, Request
from infalign.errors import InfalignError, InputError
from infalign.rollouts.batches import Missing, draw_all, require_fit, rows_in_memory
from infalign.rollouts.decode import decode, uniforms
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.tokens import end_tokens, prompt_token_ids


@dataclass(frozen=True)
class Beginning:
    """The first tokens of a candidate.

    Attributes:
        prompt: What it answers.
        stream: As in `Request`; with `index` and the seed it decides how the candidate goes on.
        index: As in `Request`.
        token_ids: Its tokens so far.
        finish_reason: None while it goes on.
    """

    prompt: Prompt
    stream: str
    index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None


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
            raise InputError(f"batch_size is {batch_size}", where="LocalSampler", hint="Give at least 1")
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
        with self._sampling():
            refused: dict[int, InfalignError] = {}
            wanted: list[Missing] = []
            for at, request in enumerate(requests):
                try:
                    tokens = self.prompt_tokens(request.prompt)
                except InputError as error:
                    refused[at] = error
                    continue
                wanted.append(Missing(str(at), tokens, list(request.indices), stream=request.stream))
            wanted.sort(key=lambda one: -len(one.tokens))
            draws: dict[int, dict[int, Draw]] = {at: {} for at in range(len(requests))}
            for rows in draw_all(self._model, self._tokenizer, wanted, self._end_tokens, key, self._batch_size):
                columns = (rows[c] for c in ("prompt_id", "index", "text", "num_tokens", "finish_reason"))
                for at, index, *drawn in zip(*columns, strict=True):
                    draws[int(at)][index] = Draw(*drawn)
        return [refused[at] if at in refused else _in_order(draws[at], one) for at, one in enumerate(requests)]

    def extend(self, beginnings: Sequence[Beginning], num_tokens: int, seed: int) -> list[Beginning]:
        """Go on with candidates by up to `num_tokens` tokens; one carried to its end is what `draw` gives.

        Its beginning is read anew, which costs as much as reading a longer prompt.

        Args:
            beginnings: Unfinished candidates, all of one length.
            num_tokens: At least 1.
            seed: As in `draw`.

        Raises:
            InputError: A prompt leaves no room for the response.
        """
        key = self._key(seed)
        if not beginnings:
            return []
        length = len(beginnings[0].token_ids)
        stop = min(length + num_tokens, key.max_new_tokens)
        with self._sampling():
            tokens_of = {one.prompt.id: self.prompt_tokens(one.prompt) for one in beginnings}
            order = sorted(range(len(beginnings)), key=lambda b: -len(tokens_of[beginnings[b].prompt.id]))
            longest = len(tokens_of[beginnings[order[0]].prompt.id]) + stop
            rows = self._batch_size or rows_in_memory(self._model, longest)
            extended: dict[int, Beginning] = {}
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                # What begins alike is read once: at the start all candidates of a prompt.
                read = {(beginnings[b].prompt.id, beginnings[b].token_ids): b for b in batch}
                place = {begun: i for i, begun in enumerate(read)}
                drawn_B = decode(
                    self._model,
                    [[*tokens_of[prompt_id], *token_ids] for prompt_id, token_ids in read],
                    np.array([place[beginnings[b].prompt.id, beginnings[b].token_ids] for b in batch]),
                    np.stack([uniforms(seed, beginnings[b].stream, beginnings[b].index, stop)[length:] for b in batch]),
                    end_tokens=self._end_tokens,
                    temperature=key.temperature,
                    top_p=key.top_p,
                )
                for b, drawn in zip(batch, drawn_B, strict=True):
                    cut = "length" if stop == key.max_new_tokens else None
                    extended[b] = replace(
                        beginnings[b],
                        token_ids=(*beginnings[b].token_ids, *drawn.token_ids),
                        finish_reason="stop" if drawn.ended else cut,
                    )
        return [extended[b] for b in range(len(beginnings))]

    def text(self, beginning: Beginning) -> str:
        """What has been said so far, without the end token."""
        ended = beginning.finish_reason == "stop"
        shown = list(beginning.token_ids[:-1] if ended else beginning.token_ids)
        return self._tokenizer.batch_decode([shown], skip_special_tokens=True)[0]

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids; InputError where they leave no room for the response."""
        (tokens,) = prompt_token_ids(self._tokenizer, [prompt])
        require_fit(self._model, [prompt], [tokens], self._key(0).max_new_tokens)
        return tokens

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """The model to itself, in evaluation mode."""
        with self._lock:
            was_training = self._model.training
            self._model.eval()
            try:
                yield
            finally:
                self._model.train(was_training)

    def _key(self, seed: int) -> RolloutKey:
        settings: dict[str, Any] = self._settings
        return RolloutKey("", "", seed=seed, **settings)


def _in_order(draws: dict[int, Draw], request: Request) -> Drawn:
    ordered = tuple(draws[index] for index in request.indices)
    return Drawn(ordered, sum(one.num_tokens or 0 for one in ordered))
