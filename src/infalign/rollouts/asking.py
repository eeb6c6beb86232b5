"""Ask a server that speaks the OpenAI protocol: vLLM, SGLang, TGI, llama.cpp, `transformers serve`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infalign._io.http import EndpointError, RequestRefusedError, known_keys
from infalign._io.outside import in_short
from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.plain_sampling import PlainSampling
from infalign.rollouts.prompts import Prompt

SAMPLER = "openai"
_BYTES_PER_TOKEN = 256  # more than JSON needs for a token's text, and for what some servers say about it
_BYTES_PER_LOGPROB = 4096


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
    asked, empty_answers = 0, 0  # of `indices`: those that have been answered, by text or by something odd
    while asked < len(indices) and failure is None:
        lacking = indices[asked:]
        try:
            choices, num_tokens = _ask(server, model, prompt, len(lacking), _seed(key.seed, stream, lacking[0]), key)
        except EndpointError as error:
            failure = error
            break
        told.append(num_tokens)
        for index, choice in zip(lacking, choices, strict=False):
            asked += 1
            try:
                text, reason = _read_choice(choice, server)
            except EndpointError as error:  # no more is asked for: what is drawn until it fits would be biased
                failure = failure or error
                continue
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
        empty_answers = 0 if choices else empty_answers + 1
        if empty_answers > server.endpoint.retries:
            failure = EndpointError(
                f"the server gave no finished choice for prompt {prompt.id} in {counted(empty_answers, 'answer')}",
                where=server.endpoint.url,
            )
    counts = [count for count in told if count is not None]
    return Finished(rows, failure, sum(counts) if len(counts) == len(told) else None)


def _ask(
    server: PlainSampling, model: str, prompt: Prompt, n: int, seed: int, key: RolloutKey
) -> tuple[list[Any], int | None]:
    """The choices as they came, `n` at most; and the tokens of all, if told."""
    content: dict[str, Any] = {
        "model": model,
        "max_tokens": key.max_new_tokens,
        "temperature": key.temperature,
        "top_p": key.top_p,
        "seed": seed,
    }
    is_text = isinstance(prompt.prompt, str)
    content["prompt" if is_text else "messages"] = prompt.prompt
    path = "/completions" if is_text else "/chat/completions"
    answer = server.post_choices(path, content, n, largest_each=_BYTES_PER_TOKEN * (key.max_new_tokens + 64))
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        said = in_short(answer, known_keys())
        raise EndpointError("the answer has no choices", where=server.endpoint.url, said=said)
    usage = answer.get("usage")
    num_tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return choices[:n], num_tokens if type(num_tokens) is int and 0 <= num_tokens < 2**53 else None


def _read_choice(choice: Any, server: PlainSampling) -> tuple[str, str]:
    """Text and finish reason of a choice.

    One without text (cut inside its reasoning) is empty, and one that a filter cut is cut: both are what the policy
    gives when it is used through this server. Drawing others in their place would favour short and harmless ones.

    Raises:
        EndpointError: It is neither text that ended nor text that was cut.
    """

    def odd(what: str, value: Any) -> EndpointError:
        return EndpointError(
            f"no finished choice: one {what}",
            where=server.endpoint.url,
            said=in_short(value, known_keys()),
        )

    if not isinstance(choice, dict):
        raise odd("is not an object", choice)
    inner = choice if "text" in choice else choice.get("message")
    if not isinstance(inner, dict):
        raise odd("has neither text nor a message", choice)
    text, reason = inner.get("text" if inner is choice else "content"), choice.get("finish_reason")
    if inner.get("tool_calls") or inner.get("function_call"):
        raise odd("is a tool call, not text; serve the model without a tool parser", reason)
    if reason not in ("stop", "length", "content_filter"):
        raise odd("did not end by itself and was not cut: its finish_reason is another", reason)
    if text is not None and not isinstance(text, str):
        raise odd("has a text that is none", text)
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise odd("has half of a surrogate pair in its text, which is no Unicode", text) from None
    return text or "", "stop" if reason == "stop" else "length"


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
            answer = server.endpoint.post(
                "/completions", {**settings, **fields}, largest=(1 << 20) + _BYTES_PER_LOGPROB * len(ids)
            )
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
    """Log-probabilities, which are at most 0 but for rounding; None where they are not."""
    if len(values) != len(ids) or any(type(one) not in (int, float) for one in values):
        return None
    return [float(one) for one in values] if all(-1e9 < one < 0.01 for one in values) else None
