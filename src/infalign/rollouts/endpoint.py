"""A policy behind a server that speaks the OpenAI protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from infalign._io.http import Endpoint, EndpointError
from infalign._io.progress import Progress
from infalign._io.threads import each_in_threads, in_threads
from infalign.errors import InfalignError, InputError, MismatchError
from infalign.rollouts.asking import SAMPLER, Finished, finish_prompt, prompt_logprobs
from infalign.rollouts.batches import Missing
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.plain_sampling import PlainSampling
from infalign.rollouts.policy import Float, Policy, Rows, UnfinishedError
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore

_ROWS_PER_SHARD = 512
_SECONDS_PER_SHARD = 5.0


class ServedPolicy(Policy):
    """A model behind a server. Two of one server, a base and an adapter under two names, make a `MixturePolicy`.

    Text prompts go to `/completions`, messages to `/chat/completions`, each asking for all missing rollouts of one
    prompt at once; a server that gives or allows fewer choices than asked for is asked again. A response that the
    server cut is kept as one that was cut ("length"), also where it has no text yet or a filter stopped it. Token ids
    and log-probabilities stay null: servers do not agree on whether the end token is among them. Whether a seed is
    honoured is the server's affair. Each request switches off the top-k, penalties and greedy decoding that servers add
    on their own, in the words of vLLM, SGLang and llama.cpp or in those of `transformers serve`, whichever the server
    accepts.

    Args:
        endpoint: The server; its address ends before `/completions`, usually in `/v1`.
        model: The model's name there.
        concurrency: Requests under way at the same time.
        count_tokens: Counts the tokens of a response's text, for the column `num_tokens`; null without it.
        request_fields: Sent with each request instead of those words, for a server that takes neither.
        tokenizer: The model's tokenizer. It identifies the rollouts, and a `ReshapedPolicy` needs it to have responses
            scored.
        fingerprint: Identity of the model, for the key of a store; "endpoint:NAME" by default.
    """

    sampler = SAMPLER

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        concurrency: int = 16,
        count_tokens: Callable[[str], int] | None = None,
        request_fields: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        fingerprint: str | None = None,
    ) -> None:
        if concurrency < 1:
            raise InputError(f"concurrency is {concurrency}", where="ServedPolicy", hint="Give at least 1")
        self.name = model
        self.server = PlainSampling(endpoint, request_fields)
        self.concurrency = concurrency
        self.count_tokens = count_tokens
        self.tokenizer = tokenizer
        self._fingerprint = fingerprint or f"endpoint:{model}"

    @property
    def fingerprint(self) -> str:
        """What the constructor was given: a server does not say which weights it has."""
        return self._fingerprint

    def prompt_tokens(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        """The server does that."""
        return [[] for _ in prompts]

    def require_key(self, store: RolloutStore) -> None:
        """Raise MismatchError unless the store is for rollouts of a server."""
        if store.key.sampler != SAMPLER:
            raise MismatchError(
                f"the store's rollouts come from {store.key.sampler!r}",
                where=str(store.path),
                hint=f"Open a store whose key has sampler={SAMPLER!r}",
            )

    def draw_rows(self, missing: Sequence[Missing], key: RolloutKey, batch_size: int | None = None) -> Iterator[Rows]:
        """As `Policy.draw_rows`; each prompt must be there as such. Rows come every few seconds.

        Raises:
            ServerUnfinishedError: At the end: some prompts could not be finished.
        """
        failures: dict[str, InfalignError] = {}
        rows: list[dict[str, Any]] = []
        written = time.monotonic()
        finished = in_threads(lambda one: self.finish(one, key), missing, self.concurrency, tick=_SECONDS_PER_SHARD)
        try:
            for done in finished:
                if done is not None:
                    one, found = missing[done[0]], done[1]
                    rows.extend({**row, "prompt_id": one.prompt_id} for row in found.rows)
                    if found.failure is not None:
                        failures[one.prompt_id] = found.failure
                late = time.monotonic() - written > _SECONDS_PER_SHARD
                if rows and (len(rows) >= _ROWS_PER_SHARD or late):
                    taken, rows = rows, []
                    yield _as_columns(taken)
                    written = time.monotonic()
        except GeneratorExit:
            raise
        except BaseException:  # what has come is not lost, whatever stops this
            if rows:
                yield _as_columns(rows)
            raise
        if rows:
            yield _as_columns(rows)
        if failures:
            raise ServerUnfinishedError(failures, len(missing))

    def finish(self, one: Missing, key: RolloutKey) -> Finished:
        """All that is missing of one prompt, or as much as could be had."""
        assert one.prompt is not None, "a server is sent the prompt itself"
        return finish_prompt(self.server, self.name, one.prompt, one.indices, key, self.count_tokens, one.decided_by)

    def logprobs(
        self,
        prompt_ids_list: Sequence[Sequence[int]],
        completion_ids_list: Sequence[Sequence[int]],
        batch_size: int = 64,
    ) -> Float:
        """As `Policy.logprobs`, by one request for each response.

        Raises:
            InputError: The server does not give log-probabilities of given text.
            EndpointError: It cannot be reached.
        """
        pairs = list(zip(prompt_ids_list, completion_ids_list, strict=True))
        return np.array(
            each_in_threads(lambda pair: prompt_logprobs(self.server, self.name, *pair), pairs, self.concurrency)
        )


class ServerUnfinishedError(UnfinishedError, EndpointError):
    """As `UnfinishedError`, where a server is at fault."""


def _as_columns(rows: Sequence[dict[str, Any]]) -> Rows:
    return {name: [row[name] for row in rows] for name in rows[0]}


def sample_endpoint(
    endpoint: Endpoint,
    model: str,
    prompts: Sequence[Prompt],
    num_samples: int,
    *,
    store: RolloutStore,
    concurrency: int = 16,
    count_tokens: Callable[[str], int] | None = None,
    request_fields: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Draw rollouts from a server: `ServedPolicy(…).draw(…)` as a function.

    Args:
        endpoint: As for `ServedPolicy`, like the next arguments.
        model: The model's name there.
        prompts: Text or chat messages.
        num_samples: Rollouts of each.
        store: Where they go; its key has `sampler="openai"` and says temperature, top_p, length and seed.
        concurrency: Requests under way at the same time.
        count_tokens: Counts the tokens of a response's text.
        request_fields: What switches off what the server adds to its sampling.
        progress: Called after each write.

    Returns:
        How many rollouts were drawn.

    Raises:
        MismatchError: The store's rollouts do not come from an endpoint.
        EndpointError: Some prompts could not be finished (says how many, and the first reason); what was drawn is kept.
        StorageError: The store cannot be written, or somebody else is writing to it.
    """
    policy = ServedPolicy(
        endpoint, model, concurrency=concurrency, count_tokens=count_tokens, request_fields=request_fields
    )
    return policy.draw(prompts, num_samples, store=store, progress=progress)
