"""Log-probabilities of given responses (teacher forcing), and how far two policies are apart on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from infalign._io.progress import Progress, no_progress
from infalign.errors import InputError
from infalign.rollouts.embeddings import embedding_rows, require_embeddings
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.tokens import prompt_token_ids

Float = NDArray[np.float64]


@dataclass(frozen=True)
class LogRatios:
    """How a policy differs from the reference on given responses, in nats.

    Attributes:
        log_ratios_PG: log π(y|x) − log p(y|x) of each response, end token included, shape (P, G).
        exact_kl_PG: Sum over the prefixes of the response of KL(π(·|prefix) ‖ p(·|prefix)), shape (P, G). For responses
            of π both have the mean KL(π ‖ p), and this one the smaller variance.
    """

    log_ratios_PG: Float  # noqa: N815
    exact_kl_PG: Float  # noqa: N815


def sequence_logprobs(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt_ids_list: Sequence[Sequence[int]],
    completion_ids_list: Sequence[Sequence[int]],
    batch_size: int = 64,
) -> Float:
    """Log π(y|x) of each response, summed over its tokens in float64.

    Args:
        model: The policy.
        tokenizer: Says what to pad with.
        prompt_ids_list: B prompts as token ids.
        completion_ids_list: B responses as token ids; the end token counts if it is among them.
        batch_size: Responses run at the same time.

    Returns:
        Shape (B,), in nats. An empty response has log-probability 0.

    Raises:
        InputError: The lists differ in length, or a prompt is empty.
    """
    logprob_B = np.zeros(len(completion_ids_list))
    with _evaluating(model):
        for batch in _batches(model, tokenizer, prompt_ids_list, completion_ids_list, batch_size):
            logprobs_BT = _chosen(_log_softmax(model, batch), batch)
            logprob_B[batch.rows] = logprobs_BT.double().sum(-1).cpu().numpy()
    return logprob_B


def sequence_log_ratios(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    tokenizer: Any,
    prompt_ids_list: Sequence[Sequence[int]],
    completion_ids_list: Sequence[Sequence[int]],
    batch_size: int = 64,
    progress: Progress | None = None,
) -> tuple[Float, Float]:
    """Log π − log p of each response, and the exact KL summed over its prefixes; each of shape (B,), in nats.

    Args:
        policy: π.
        ref: p, with the same vocabulary.
        tokenizer: Says what to pad with.
        prompt_ids_list: B prompts as token ids.
        completion_ids_list: B responses as token ids.
        batch_size: Responses run at the same time.
        progress: Called after each batch.

    Raises:
        InputError: The vocabularies differ in size, the lists differ in length, or a prompt is empty.
    """
    return mixture_log_ratios(
        [(1.0, _AsItIs(policy))],
        [(1.0, _AsItIs(ref))],
        tokenizer,
        prompt_ids_list,
        completion_ids_list,
        batch_size,
        progress,
    )


class Scoring(Protocol):
    """A model to score with, such as a `LocalPolicy`."""

    @property
    def model(self) -> Any:
        """The model."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """The model in evaluation mode, with the right adapter, for as long as the context lasts."""
        ...


Components = Sequence[tuple[float, Scoring]]
"""Weights, which sum to one, and models: each response comes from one of them."""


def mixture_log_ratios(
    policy: Components,
    ref: Components,
    tokenizer: Any,
    prompt_ids_list: Sequence[Sequence[int]],
    completion_ids_list: Sequence[Sequence[int]],
    batch_size: int = 64,
    progress: Progress | None = None,
) -> tuple[Float, Float]:
    """`sequence_log_ratios` where policy and reference may be mixtures of models over whole responses.

    A mixture Σ_c w_c π_c(y) is autoregressive too. After a prefix y_<t its next token has the distribution
    Σ_c v_c π_c(· | y_<t), v_c ∝ w_c π_c(y_<t): the weights that the prefix leaves to each component. So its KL is exact
    at every prefix, like that of a single model. Each model is run once, whichever sides it is on.

    Args:
        policy: π: one model with weight 1, or several.
        ref: p, with the same vocabulary.
        tokenizer: Says what to pad with.
        prompt_ids_list: B prompts as token ids.
        completion_ids_list: B responses as token ids.
        batch_size: Responses run at the same time.
        progress: Called after each batch.

    Returns:
        Log π − log p of each response, and the exact KL summed over its prefixes; each of shape (B,), in nats.

    Raises:
        InputError: As `sequence_log_ratios`.
    """
    total = len(completion_ids_list)
    log_ratio_B, kl_B = np.zeros(total), np.zeros(total)
    report, done = progress or no_progress, 0
    for batch in _batches(policy[0][1].model, tokenizer, prompt_ids_list, completion_ids_list, batch_size):
        read: dict[int, torch.Tensor] = {}
        with torch.inference_mode():
            policy_side, ref_side = (_read(side, batch, read) for side in (policy, ref))
            log_policy_BTV, log_ref_BTV = policy_side.log_next_BTV, ref_side.log_next_BTV
            difference_BTV = log_policy_BTV - log_ref_BTV
            kl_BT = (log_policy_BTV.exp() * difference_BTV).sum(-1).masked_fill(~batch.counts_BT, 0.0)
            if len(policy) == len(ref) == 1:
                whole_B = _chosen(difference_BTV, batch).double().sum(-1)
            else:
                whole_B = policy_side.log_whole_B - ref_side.log_whole_B
        log_ratio_B[batch.rows] = whole_B.cpu().numpy()
        kl_B[batch.rows] = kl_BT.double().sum(-1).cpu().numpy()
        done += len(batch.rows)
        report(done, total, "")
    return log_ratio_B, kl_B


@dataclass(frozen=True)
class _Side:
    """What a mixture says of a batch: log-probabilities of every next token, and of the whole responses."""

    log_next_BTV: torch.Tensor  # noqa: N815
    log_whole_B: torch.Tensor  # noqa: N815


def _read(side: Components, batch: _Batch, read: dict[int, torch.Tensor]) -> _Side:
    """Run the models of a side that have not been run on this batch, and mix them; `read` keeps what they said."""
    used = [(weight, one) for weight, one in side if weight > 0]
    for _, one in used:
        if id(one) not in read:
            with one.active() as model:
                read[id(one)] = _log_softmax(model, batch).to(batch.targets_BT.device)
            _require_one_vocabulary(list(read.values()))
    if len(used) == 1:
        log_next_BTV = read[id(used[0][1])]
        return _Side(log_next_BTV, _chosen(log_next_BTV, batch).double().sum(-1))
    chosen_CBT = torch.stack([_chosen(read[id(one)], batch).double() for _, one in used])
    log_weight_C11 = torch.tensor([weight for weight, _ in used], dtype=torch.float64).log()[:, None, None]
    log_weight_C11 = log_weight_C11.to(chosen_CBT.device)
    log_left_CBT = torch.log_softmax(log_weight_C11 + chosen_CBT.cumsum(-1) - chosen_CBT, dim=0).float()
    log_next_BTV = torch.logsumexp(
        torch.stack([left_BT[..., None] + read[id(one)] for left_BT, (_, one) in zip(log_left_CBT, used, strict=True)]),
        dim=0,
    )
    return _Side(log_next_BTV, torch.logsumexp(log_weight_C11[..., 0] + chosen_CBT.sum(-1), dim=0))


def _require_one_vocabulary(log_probabilities: Sequence[torch.Tensor]) -> None:
    first, last = log_probabilities[0].shape[-1], log_probabilities[-1].shape[-1]
    if first != last:
        raise InputError(
            f"the policy has {first} tokens, the reference {last}",
            where="log_ratios",
            hint="Compare a policy with the reference that it was trained from",
        )


class _AsItIs:
    """A model with whatever adapter is on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def active(self) -> AbstractContextManager[Any]:
        return _evaluating(self.model)


def log_ratios(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    token_ids_PG: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> LogRatios:
    """`sequence_log_ratios` for G responses to each of P prompts, as a store's `lists_PK("token_ids", …)` gives them.

    Raises:
        InputError: As there; or the prompts differ in their number of responses.
    """
    prompt_ids_list, completion_ids_list, shape = flat_responses(tokenizer, prompts, token_ids_PG)
    log_ratio_B, kl_B = sequence_log_ratios(
        policy, ref, tokenizer, prompt_ids_list, completion_ids_list, batch_size, progress
    )
    return LogRatios(log_ratio_B.reshape(shape), kl_B.reshape(shape))


def flat_responses(
    tokenizer: Any, prompts: Sequence[Prompt], token_ids_PG: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[list[int]], list[Sequence[int]], tuple[int, int]]:
    """B = P·G prompts and responses as token ids, and the shape (P, G).

    Raises:
        InputError: The prompts differ in their number of responses.
    """
    counts = {len(responses) for responses in token_ids_PG}
    if len(token_ids_PG) != len(prompts) or len(counts) != 1:
        raise InputError(f"{len(prompts)} prompts, but responses for {len(token_ids_PG)} with {sorted(counts)} each",
                         where="log_ratios", hint="Give the same number of responses for every prompt")  # fmt: skip
    (per_prompt,) = counts
    prompt_ids_list = [ids for ids in prompt_token_ids(tokenizer, prompts) for _ in range(per_prompt)]
    return prompt_ids_list, [ids for responses in token_ids_PG for ids in responses], (len(prompts), per_prompt)


@dataclass(frozen=True)
class _Batch:
    rows: NDArray[np.int64]  # which of the given responses these are
    ids_BL: torch.Tensor  # noqa: N815  prompt and response, padded on the left so that all end together
    mask_BL: torch.Tensor  # noqa: N815
    targets_BT: torch.Tensor  # noqa: N815  the last T tokens: responses, and what is not counted before the shorter ones
    counts_BT: torch.Tensor  # noqa: N815  True where a token belongs to the response


class _evaluating:  # noqa: N801  a context manager, used like a function
    """Evaluation mode without gradients; the model's own mode comes back afterwards."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._inference = torch.inference_mode()

    def __enter__(self) -> PreTrainedModel:
        self._was_training = self._model.training
        self._model.eval()
        self._inference.__enter__()
        return self._model

    def __exit__(self, *error: Any) -> None:
        self._inference.__exit__(*error)
        self._model.train(self._was_training)


def _batches(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt_ids_list: Sequence[Sequence[int]],
    completion_ids_list: Sequence[Sequence[int]],
    batch_size: int,
) -> Iterator[_Batch]:
    if len(prompt_ids_list) != len(completion_ids_list):
        raise InputError(f"{len(prompt_ids_list)} prompts for {len(completion_ids_list)} responses", where="logprobs")
    empty = [row for row, ids in enumerate(prompt_ids_list) if len(ids) == 0]
    if empty:
        raise InputError(f"prompt {empty[0]} has no tokens", where="logprobs", hint="Nothing precedes its first token")
    size = embedding_rows(model)
    for what, ids in (("prompt", prompt_ids_list), ("response", completion_ids_list)):
        require_embeddings(ids, size, "logprobs", tokenizer=tokenizer, what=what)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    pad = pad if size is None or pad < size else 0  # no model looks at it
    lengths = np.array([len(p) + len(c) for p, c in zip(prompt_ids_list, completion_ids_list, strict=True)])
    order = np.argsort(-lengths, kind="stable")  # like lengths together; the longest first, so that memory fails early
    order = order[[len(completion_ids_list[row]) > 0 for row in order]] if len(order) else order
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = int(lengths[rows].max())
        num_targets = max(len(completion_ids_list[row]) for row in rows)
        ids_BL = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask_BL = torch.zeros(len(rows), longest, dtype=torch.long)
        counts_BT = torch.zeros(len(rows), num_targets, dtype=torch.bool)
        for b, row in enumerate(rows):
            ids_BL[b, longest - lengths[row] :] = torch.tensor([*prompt_ids_list[row], *completion_ids_list[row]])
            mask_BL[b, longest - lengths[row] :] = 1
            counts_BT[b, num_targets - len(completion_ids_list[row]) :] = True
        device = model.device
        targets_BT = ids_BL[:, longest - num_targets :]
        yield _Batch(rows, ids_BL.to(device), mask_BL.to(device), targets_BT.to(device), counts_BT.to(device))


def _log_softmax(model: PreTrainedModel, batch: _Batch) -> torch.Tensor:
    """Log-probabilities of all tokens at the places of the targets, shape (B, T, V), in float32."""
    device, num_targets = model.device, batch.targets_BT.shape[1]
    logits_BTV = model(
        input_ids=batch.ids_BL.to(device),
        attention_mask=batch.mask_BL.to(device),
        position_ids=(batch.mask_BL.cumsum(-1) - 1).clamp(min=0).to(device),
        use_cache=False,
        logits_to_keep=num_targets + 1,
    ).logits
    return torch.log_softmax(logits_BTV[:, -num_targets - 1 : -1].float(), dim=-1)


def _chosen(values_BTV: torch.Tensor, batch: _Batch) -> torch.Tensor:
    """The values of the responses' own tokens, 0 elsewhere, shape (B, T)."""
    return values_BTV.gather(-1, batch.targets_BT[..., None]).squeeze(-1).masked_fill(~batch.counts_BT, 0.0)
