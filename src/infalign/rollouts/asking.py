"""Ask a server that speaks the OpenAI protocol: vLLM, SGLang, TGI, llama.cpp, `transformers serve`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infalign.data import Prompt
from infalign.errors import InputError
from infalign.rollouts.http import EndpointError, RequestRefusedError
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.plain_sampling import PlainSampling

SAMPLER = "openai"


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
        count_tokens: As in `ServedPolicy`.
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


def prompt_logprobs(
    server: PlainSampling, model: str, prompt_ids: Sequence[int], completion_ids: Sequence[int]
) -> float:
    """Log-probability of a given response to a given prompt, both as token ids, summed over its tokens.

    A server gives it as the log-probabilities of a prompt: by `echo` with `logprobs`, as OpenAI's first protocol has
    it, or by vLLM's `prompt_logprobs`.

    Raises:
        InputError: It gives neither.
        EndpointError: It cannot be reached.
    """
    if not completion_ids:
        return 0.0
    ids = [*prompt_ids, *completion_ids]
    settings = {"model": model, "prompt": ids, "n": 1, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
    refusals: list[str] = []
    for fields, read in (({"echo": True, "logprobs": 1}, _echoed), ({"prompt_logprobs": 0}, _told_of_prompt)):
        try:
            answer = server.endpoint.post("/completions", {**settings, **fields})
        except RequestRefusedError as error:
            refusals.append(error.what)
            continue
        found = read(answer, ids)
        if found is not None:
            return float(sum(found[len(prompt_ids) :]))
        refusals.append(f"with {', '.join(fields)} it gave no log-probabilities of the prompt's tokens")
    raise InputError(
        f"{model} cannot score given text ({'; '.join(refusals)})",
        where=server.endpoint.url,
        hint="Use a server that gives prompt log-probabilities, such as vLLM; a mixture does without",
    )


def _echoed(answer: Any, ids: Sequence[int]) -> list[float] | None:
    """Log-probabilities of all tokens, from an echo; None where they are not there."""
    try:
        values = answer["choices"][0]["logprobs"]["token_logprobs"]
        return _as_numbers([0.0, *values[1 : len(ids)]], ids)
    except (KeyError, IndexError, TypeError):
        return None


def _told_of_prompt(answer: Any, ids: Sequence[int]) -> list[float] | None:
    """As `_echoed`, from vLLM's own field: for each token of the prompt a table of token ids."""
    try:
        tables = answer["choices"][0]["prompt_logprobs"]
        values = [table[str(token)]["logprob"] for table, token in zip(tables[1:], ids[1:], strict=True)]
        return _as_numbers([0.0, *values], ids)
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _as_numbers(values: list[Any], ids: Sequence[int]) -> list[float] | None:
    right = len(values) == len(ids) and all(isinstance(one, int | float) for one in values)
    return [float(one) for one in values] if right else None
