"""Candidates from a server that speaks the OpenAI protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infalign._io.http import Endpoint
from infalign._io.threads import each_in_threads
from infalign.errors import InfalignError, InputError
from infalign.rollouts.asking import SAMPLER, finish_prompt
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.plain_sampling import PlainSampling
from infalign.select.candidates import CandidateSampler, Draw, Drawn, Request


class EndpointSampler(CandidateSampler):
    """A model behind an endpoint; how it is asked is said at `infalign.rollouts.endpoint.ServedPolicy`.

    Each request carries a seed of its own; whether the server honours it is the server's affair.

    Args:
        endpoint: The server; its address ends before `/completions`, usually in `/v1`.
        model: The model's name there.
        max_new_tokens: Longest response.
        temperature: 1 samples the policy itself, which calibration refers to.
        top_p: As `temperature`.
        concurrency: Requests under way at the same time, for each call.
        count_tokens: Counts the tokens of a response's text. Without it there is only what the server tells of all the
            candidates of one request together.
        request_fields: As in `ServedPolicy`.

    Raises:
        InputError: A setting is out of range.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        concurrency: int = 16,
        count_tokens: Callable[[str], int] | None = None,
        request_fields: Mapping[str, Any] | None = None,
    ) -> None:
        if concurrency < 1:
            raise InputError(f"concurrency is {concurrency}", where="EndpointSampler", hint="Give at least 1")
        self.name = model
        self._server = PlainSampling(endpoint, request_fields)
        self._settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self._key(seed=0)
        self._concurrency = concurrency
        self._count_tokens = count_tokens

    def draw(self, requests: Sequence[Request], seed: int) -> list[Drawn | InfalignError]:
        """As `CandidateSampler.draw`; an EndpointError where the server did not give all that was asked for."""
        key = self._key(seed)
        if len(requests) <= 1:
            return [self._one(request, key) for request in requests]
        return each_in_threads(lambda request: self._one(request, key), requests, min(self._concurrency, len(requests)))

    def _one(self, request: Request, key: RolloutKey) -> Drawn | InfalignError:
        answer = finish_prompt(
            self._server, self.name, request.prompt, request.indices, key, self._count_tokens, request.stream
        )
        if answer.failure is not None:
            return answer.failure
        draws = tuple(Draw(row["text"], row["num_tokens"], row["finish_reason"]) for row in answer.rows)
        counts = [one.num_tokens for one in draws if one.num_tokens is not None]
        return Drawn(draws, sum(counts) if len(counts) == len(draws) else answer.num_tokens)

    def _key(self, seed: int) -> RolloutKey:
        settings: dict[str, Any] = self._settings
        return RolloutKey(f"endpoint:{self.name}", "none", seed=seed, sampler=SAMPLER, **settings)
