"""Run any decoder on a policy and keep what it returns: beam search, top-p, a proxy that chooses, a user's function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infalign._io.progress import Progress, no_progress
from infalign._io.wording import counted
from infalign.errors import InputError, RewardError
from infalign.procedures.measured import MeasuredProcedure
from infalign.rewards.score import column_names, columns_of
from infalign.rewards.source import FunctionReward, RewardSource, SequenceClassificationReward, import_function
from infalign.rollouts.batches import require_fit
from infalign.rollouts.decode import decode, uniforms
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.texts import response_texts
from infalign.rollouts.tokens import end_tokens, prompt_token_ids

_PROMPTS_AT_ONCE = 64


def decoder_key(procedure: MeasuredProcedure) -> str:
    """Names the decoder in the key of a store; one that would decode otherwise has another."""
    if procedure.function is not None:
        return f"decoder:{FunctionReward(procedure.function).key}"
    if procedure.proxy is not None:
        return f"decoder:best-of-{procedure.n}:{proxy_reward(procedure.proxy).key}"
    return f"decoder:{procedure.label}"


def proxy_reward(name: str) -> RewardSource:
    """The reward by which a proxy chooses: `module:function`, or a reward model.

    Raises:
        InputError: There is none of that name.
    """
    is_function = ":" in name and not Path(name).exists()
    return FunctionReward(name) if is_function else SequenceClassificationReward(name)


def decoder_function(name: str) -> Callable[..., Any]:
    """The user's function that decodes, once it is known that it can be called as it will be.

    Raises:
        InputError: There is none, or it takes other arguments.
    """
    function = import_function(name, "decoder")
    try:
        inspect.signature(function).bind(model=None, tokenizer=None, prompts=[], max_new_tokens=1, seed=0)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"it cannot be called as a decoder is ({error})",
            where=f"decoder {name}",
            hint="Write def decode(*, model, tokenizer, prompts, max_new_tokens, seed), and let it return one text for "
            "each prompt",
        ) from error
    return function


def run_decoder(
    procedure: MeasuredProcedure,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    store: RolloutStore,
    progress: Progress | None = None,
) -> int:
    """Fill a store with what the decoder returns for these prompts, as far as it lacks it.

    Output `index` of a prompt is decided by (seed, prompt, index) where the decoder draws with our sampler; a user's
    function gets a seed for each output.

    Args:
        procedure: The decoder and how many outputs each prompt gets.
        policy: The model it runs on.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        store: Where outputs go; its key says length and seed.
        progress: Called after each batch.

    Returns:
        How many outputs were made.

    Raises:
        InputError: A prompt is too long, or the function does not return one text per prompt.
        RewardError: The proxy could not score a response.
    """
    report, count, made = progress or no_progress, procedure.rollouts_per_prompt, 0
    unique = list({prompt.id: prompt for prompt in prompts}.values())
    require_fit(policy, unique, prompt_token_ids(tokenizer, unique), store.key.max_new_tokens)
    policy.eval()
    with store.writing():
        present = store.present()
        todo = [(index, [one for one in unique if index not in present.get(one.id, ())]) for index in range(count)]
        done = count * len(unique) - sum(len(lacking) for _, lacking in todo)
        report(done, count * len(unique), "")
        for index, lacking in todo:
            for start in range(0, len(lacking), _PROMPTS_AT_ONCE):
                batch = lacking[start : start + _PROMPTS_AT_ONCE]
                texts, ended = _decoded(procedure, policy, tokenizer, batch, index, store)
                store.append(
                    {
                        "prompt_id": [one.id for one in batch],
                        "index": [index] * len(batch),
                        "text": texts,
                        "token_ids": [None] * len(batch),
                        "logprob": [None] * len(batch),
                        "num_tokens": [None] * len(batch),
                        "finish_reason": ["stop" if one else "length" for one in ended],
                    }
                )
                made += len(batch)
                report(done + made, count * len(unique), "")
    return made


def _decoded(
    procedure: MeasuredProcedure,
    policy: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    index: int,
    store: RolloutStore,
) -> tuple[list[str], list[bool]]:
    """One output for each prompt, and whether it ended by itself."""
    if procedure.function is not None:
        return _by_function(procedure.function, policy, tokenizer, prompts, index, store)
    if procedure.beam is not None:
        return _by_beam_search(procedure.beam, policy, tokenizer, prompts, store.key.max_new_tokens)
    # The best of n takes samples n·index … n·index + n − 1 of each prompt.
    n, length = procedure.n or 1, store.key.max_new_tokens
    tokens = prompt_token_ids(tokenizer, prompts)
    drawn = decode(
        policy,
        tokens,
        np.repeat(np.arange(len(prompts)), n),
        np.stack([uniforms(store.key.seed, one.id, n * index + k, length) for one in prompts for k in range(n)]),
        end_tokens=end_tokens(policy, tokenizer),
        top_p=procedure.top_p or 1.0,
    )
    shown = [one.token_ids[:-1] if one.ended else one.token_ids for one in drawn]
    texts = response_texts(tokenizer, [ids for ids in tokens for _ in range(n)], shown)
    chosen = range(len(prompts))
    if procedure.proxy is not None:
        owners = [one for one in prompts for _ in range(n)]
        source = proxy_reward(procedure.proxy)
        source.render_at(prompts[0].rendered_at)
        columns = columns_of(owners, column_names(owners))
        scores = source.score_rows([one.prompt for one in owners], texts, **columns)
        bad = np.flatnonzero(np.isnan(scores.rewards))
        if bad.size:
            raise RewardError(f"{counted(bad.size, 'response')} could not be scored "
                              f"({scores.errors[bad[0]]})", where=str(source),
                              hint="The proxy of a procedure must score every response")  # fmt: skip
        # Samples are exchangeable, so the first of equally good ones is as good as any.
        chosen = np.argmax(scores.rewards.reshape(-1, n), axis=1) + n * np.arange(len(prompts))
    return [texts[at] for at in chosen], [drawn[at].ended for at in chosen]


def _by_function(
    function: str, policy: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], index: int, store: RolloutStore
) -> tuple[list[str], list[bool]]:
    texts = decoder_function(function)(
        model=policy,
        tokenizer=tokenizer,
        prompts=[one.prompt for one in prompts],
        max_new_tokens=store.key.max_new_tokens,
        seed=1000 * store.key.seed + index,
    )
    if not isinstance(texts, list) or len(texts) != len(prompts) or not all(isinstance(text, str) for text in texts):
        wanted = f"one text for each of {counted(len(prompts), 'prompt')}"
        raise InputError(f"it returned {type(texts).__name__}, not {wanted}",
                         where=f"decoder {function}", hint="Return a list of strings")  # fmt: skip
    return texts, [True] * len(texts)


@torch.inference_mode()
def _by_beam_search(
    beams: int, policy: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int
) -> tuple[list[str], list[bool]]:
    tokens = prompt_token_ids(tokenizer, prompts)
    longest, ends = max(map(len, tokens)), end_tokens(policy, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    ids_BL = torch.tensor([[pad] * (longest - len(one)) + one for one in tokens], device=policy.device)
    mask_BL = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in tokens], device=policy.device)
    generator: Any = policy  # the type of `generate` is unknown to checkers
    out_BT = generator.generate(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        num_beams=beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
    )[:, longest:]
    shown: list[list[int]] = []
    ended: list[bool] = []
    for row in out_BT.tolist():
        end = next((at for at, token in enumerate(row) if token in ends), None)
        ended.append(end is not None)
        shown.append(row[:end])
    return response_texts(tokenizer, tokens, shown), ended
