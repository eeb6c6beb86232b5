"""Candidates from a policy, by the sampler that draws rollouts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infalign.errors import InfalignError, InputError
from infalign.rollouts.batches import Missing, rows_in_memory
from infalign.rollouts.decode import decode, uniforms
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.policy import Adapter, LocalPolicy, Policy, UnfinishedError
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.texts import response_texts
from infalign.rollouts.tokens import end_tokens
from infalign.select.candidates import CandidateSampler, Draw, Drawn, Request


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


class PolicySampler(CandidateSampler):
    """Any policy: a model, a mixture or a reshaped policy, in this process or behind a server.

    A policy of this process serves one call at a time, with all its requests in one batch; threads wait for each other.
    A candidate does not depend on its batch, but for rounding in the model's own arithmetic.

    Args:
        policy: The policy.
        max_new_tokens: Longest response.
        temperature: 1 samples the policy itself, which calibration refers to.
        top_p: As `temperature`.
        batch_size: Candidates drawn at the same time; by default as many as fit in memory.

    Raises:
        InputError: A setting is out of range.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}", where=type(self).__name__, hint="Give at least 1")
        self.name = policy.name
        self.policy = policy
        # A key wants the fingerprints of a store; nothing is stored here.
        self._settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self._key(seed=0)
        self._batch_size = batch_size
        self._lock = threading.Lock() if policy.sampler == "transformers" else nullcontext()

    def draw(self, requests: Sequence[Request], seed: int) -> list[Drawn | InfalignError]:
        """As `CandidateSampler.draw`; an InputError for a prompt that leaves no room for the response."""
        key = self._key(seed)
        refused: dict[int, InfalignError] = {}
        with self._lock:
            wanted: list[Missing] = []
            for at, request in enumerate(requests):
                try:
                    tokens = self.prompt_tokens(request.prompt)
                except InputError as error:
                    refused[at] = error
                    continue
                wanted.append(Missing(str(at), tokens, list(request.indices), request.stream, request.prompt))
            wanted.sort(key=lambda one: -len(one.tokens))
            draws: dict[int, dict[int, Draw]] = {at: {} for at in range(len(requests))}
            try:
                for rows in self.policy.draw_rows(wanted, key, self._batch_size):
                    columns = (rows[c] for c in ("prompt_id", "index", "text", "num_tokens", "finish_reason"))
                    for at, index, *drawn in zip(*columns, strict=True):
                        draws[int(at)][index] = Draw(*drawn)
            except UnfinishedError as error:
                refused |= {int(at): reason for at, reason in error.failures.items()}
        return [refused[at] if at in refused else _in_order(draws[at], one) for at, one in enumerate(requests)]

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids; InputError where they leave no room for the response."""
        return self.policy.prompt_tokens([prompt], self._key(0).max_new_tokens)[0]

    def _key(self, seed: int) -> RolloutKey:
        settings: dict[str, Any] = self._settings
        return RolloutKey("", "", seed=seed, sampler=self.policy.sampler, **settings)


class LocalSampler(PolicySampler):
    """A transformers model; it can also go on with candidates that were begun.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        name: What to call the model in messages and records.
        **settings: As for `PolicySampler`.

    Raises:
        InputError: A setting is out of range, or nothing tells how a response ends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        self._local = LocalPolicy(model, tokenizer, name=name)
        super().__init__(self._local, **settings)
        self._model = model
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens(model, tokenizer)

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
        with self._lock, self._local.active():
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
        return response_texts(self._tokenizer, [self.prompt_tokens(beginning.prompt)], [shown])[0]


def sampler_of(policy: Policy, **settings: Any) -> PolicySampler:
    """The sampler of a policy: a `LocalSampler` where it is a single model of this process.

    Args:
        policy: The policy.
        **settings: As for `PolicySampler`.
    """
    if isinstance(policy, LocalPolicy) and policy.adapter in (None, Adapter("default")):
        return LocalSampler(policy.model, policy.tokenizer, name=policy.name, **settings)
    return PolicySampler(policy, **settings)


def _in_order(draws: dict[int, Draw], request: Request) -> Drawn:
    ordered = tuple(draws[index] for index in request.indices)
    counts = [one.num_tokens for one in ordered if one.num_tokens is not None]
    return Drawn(ordered, sum(counts) if len(counts) == len(ordered) else None)
