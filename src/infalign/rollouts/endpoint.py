"""Draw rollouts from any server that speaks the OpenAI protocol: vLLM, SGLang, TGI, llama.cpp, `transformers serve`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from infalign.data import Prompt
from infalign.errors import InputError, MismatchError
from infalign.rollouts.http import Endpoint, EndpointError
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.plain_sampling import PlainSampling
from infalign.rollouts.progress import Progress, no_progress
from infalign.rollouts.store import RolloutStore
from infalign.wording import counted

SAMPLER = "openai"
_ROWS_PER_SHARD = 512
_SECONDS_PER_SHARD = 5.0


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
    """Draw rollouts 0..num_samples−1 of every prompt, as far as the store does not have them.

    Text prompts go to `/completions`, messages to `/chat/completions`, each asking for all missing rollouts of one
    prompt at once; a server that gives fewer choices than asked for is asked again. Token ids and log-probabilities
    stay null: servers do not agree on whether the end token is among them. Whether a seed is honoured is the server's
    affair. Each request switches off the top-k, penalties and greedy decoding that servers add on their own, in the
    words of vLLM, SGLang and llama.cpp or in those of `transformers serve`, whichever the server accepts.

    Args:
        endpoint: The server; its address ends before `/completions`, usually in `/v1`.
        model: The model's name there.
        prompts: Text or chat messages.
        num_samples: Rollouts per prompt.
        store: Where they go; its key has `sampler="openai"` and says temperature, top_p, length and seed.
        concurrency: Requests under way at the same time.
        count_tokens: Counts the tokens of a response's text, for the column `num_tokens`; null without it.
        request_fields: Sent with each request instead of those words, for a server that takes neither.
        progress: Called after each write.

    Returns:
        How many rollouts were drawn.

    Raises:
        MismatchError: The store's rollouts do not come from an endpoint.
        EndpointError: Some prompts could not be finished (says how many, and the first reason); what was drawn is kept.
        StorageError: The store cannot be written, or somebody else is writing to it.
    """
    if store.key.sampler != SAMPLER:
        raise MismatchError(f"the store's rollouts come from {store.key.sampler!r}", where=str(store.path),
                            hint=f"Open a store whose key has sampler={SAMPLER!r}")  # fmt: skip
    if num_samples < 1 or concurrency < 1:
        raise InputError(f"num_samples is {num_samples} and concurrency {concurrency}", where="sample_endpoint",
                         hint="Both must be at least 1")  # fmt: skip
    report = progress or no_progress
    server = PlainSampling(endpoint, request_fields)
    with store.writing():
        present = store.present()
        unique = {prompt.id: prompt for prompt in prompts}
        missing = {prompt_id: [index for index in range(num_samples) if index not in present.get(prompt_id, ())]
                   for prompt_id in unique}  # fmt: skip
        total = len(unique) * num_samples
        done = total - sum(map(len, missing.values()))
        drawn, num_tokens, failures = 0, 0, list[str]()
        rows: list[dict[str, Any]] = []
        started = written = time.monotonic()
        report(done, total, "")

        def flush() -> None:
            nonlocal drawn, num_tokens, written
            if rows:
                store.append({name: [row[name] for row in rows] for name in rows[0]})
                drawn += len(rows)
                num_tokens += sum(row["num_tokens"] or 0 for row in rows)
                rows.clear()
                seconds = max(time.monotonic() - started, 1e-9)
                speed = f"{drawn / seconds:,.1f} rollouts/s"
                report(done + drawn, total, f"{num_tokens / seconds:,.0f} tokens/s" if num_tokens else speed)
            written = time.monotonic()

        with ThreadPoolExecutor(concurrency) as pool:
            waiting = iter([(unique[prompt_id], indices) for prompt_id, indices in missing.items() if indices])
            running: set[Future[Finished]] = set()
            try:
                while True:
                    while len(running) < 2 * concurrency and (task := next(waiting, None)) is not None:
                        running.add(pool.submit(finish_prompt, server, model, *task, store.key, count_tokens))
                    if not running:
                        break
                    finished, running = wait(running, timeout=_SECONDS_PER_SHARD, return_when=FIRST_COMPLETED)
                    for future in finished:
                        one = future.result()
                        rows.extend(one.rows)
                        if one.failure is not None:
                            failures.append(str(one.failure))
                    if len(rows) >= _ROWS_PER_SHARD or time.monotonic() - written > _SECONDS_PER_SHARD:
                        flush()
            finally:
                flush()
                pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        raise EndpointError(f"{len(failures)} of {counted(len(unique), 'prompt')} could not be finished; the "
                            f"first: {failures[0]}",
                            hint="Start again to draw what is missing")  # fmt: skip
    return drawn


@dataclass(frozen=True)
class Finished:
    """What a server gave for one prompt.

    Attributes:
        rows: Rollouts, as a store takes them.
        failure: Why some are missing; None where none is.
        num_tokens: Tokens generated, by the server's own count; None where it does not tell.
    """

    rows: list[dict[str, Any]]
    failure: EndpointError | None
    num_tokens: int | None


def finish_prompt(
    server: PlainSampling,
    model: str,
    prompt: Prompt,
    indices: Sequence[int],
    key: RolloutKey,
    count_tokens: Callable[[str], int] | None,
    stream: str | None = None,
) -> Finished:
    """All missing rollouts of one prompt, or as many as could be had.

    Args:
        server: The server.
        model: The model's name there.
        prompt: The prompt.
        indices: Which of its rollouts.
        key: Seed, length, temperature and top_p.
        count_tokens: As in `sample_endpoint`.
        stream: The rollouts are decided by (seed, stream, index), as far as the server honours seeds; the prompt's id
            by default.
    """
    stream = prompt.id if stream is None else stream
    rows: list[dict[str, Any]] = []
    told: list[int | None] = []
    failure = None
    empty_answers = 0
    while len(rows) < len(indices) and failure is None:
        lacking = indices[len(rows) :]
        try:
            choices, num_tokens = _ask(server, model, prompt, len(lacking), _seed(key.seed, stream, lacking[0]), key)
        except EndpointError as error:
            failure = error
            break
        told.append(num_tokens)
        usable = [choice for choice in choices if choice is not None]
        for index, (text, reason) in zip(lacking, usable, strict=False):
            tokens = None if count_tokens is None else count_tokens(text) + (reason == "stop")
            rows.append(
                {
                    "prompt_id": prompt.id,
                    "index": index,
                    "text": text,
                    "token_ids": None,
                    "logprob": None,
                    "num_tokens": tokens,
                    "finish_reason": reason,
                }
            )
        empty_answers = 0 if usable else empty_answers + 1
        if empty_answers > server.endpoint.retries:
            failure = EndpointError(
                f"the server gave no finished choice for prompt {prompt.id} in {empty_answers} answers",
                where=server.endpoint.url,
            )
    counts = [count for count in told if count is not None]
    return Finished(rows, failure, sum(counts) if len(counts) == len(told) else None)


def _ask(
    server: PlainSampling, model: str, prompt: Prompt, n: int, seed: int, key: RolloutKey
) -> tuple[list[tuple[str, str] | None], int | None]:
    """Text and finish reason of each choice, None for one that ended otherwise; and the tokens of all, if told."""
    settings = {
        "model": model,
        "n": n,
        "max_tokens": key.max_new_tokens,
        "temperature": key.temperature,
        "top_p": key.top_p,
        "seed": seed,
    }
    if isinstance(prompt.prompt, str):
        answer = server.post("/completions", {**settings, "prompt": prompt.prompt})
    else:
        answer = server.post("/chat/completions", {**settings, "messages": prompt.prompt})
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        raise EndpointError(f"the answer has no choices: {str(answer)[:200]}", where=server.endpoint.url)
    usage = answer.get("usage")
    num_tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return [_read_choice(choice) for choice in choices], num_tokens if type(num_tokens) is int else None


def _read_choice(choice: Any) -> tuple[str, str] | None:
    if not isinstance(choice, dict):
        return None
    text = choice.get("text") if "text" in choice else (choice.get("message") or {}).get("content")
    reason = choice.get("finish_reason")
    return (text, reason) if isinstance(text, str) and reason in ("stop", "length") else None


def _seed(seed: int, stream: str, index: int) -> int:
    """A seed of 31 bits for the rollouts of a stream from `index` on."""
    digest = hashlib.blake2b(f"{seed}\0{stream}\0{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 33
