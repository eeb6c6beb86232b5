"""What draws responses and gives their log-probabilities: one small protocol for every kind of policy.

A model in this process is a `LocalPolicy`, with or without an adapter; one behind a server a `ServedPolicy`
(`endpoint.py`); a mixture of them a `MixturePolicy`, a reshaped one a `ReshapedPolicy`. `open_policy` opens a folder.

Everything that is drawn comes from `Policy.draw_rows`: rollout (seed, stream, index) is decided by these three alone,
whoever else is in its batch. `Policy.draw` fills a store through it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from infalign._io.progress import Progress, no_progress
from infalign._io.wording import counted
from infalign.errors import InfalignError, InputError
from infalign.rollouts.adapters import adapted_layers, switch
from infalign.rollouts.batches import Missing, draw_all, missing_rollouts, require_fit, require_key
from infalign.rollouts.key import RolloutKey, model_fingerprint, tokenizer_fingerprint
from infalign.rollouts.logprobs import LogRatios, Scoring, flat_responses, mixture_log_ratios, sequence_logprobs
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.tokens import end_tokens, prompt_token_ids

Float = NDArray[np.float64]
Rows = dict[str, list[Any]]
"""Rollouts as columns, as a store takes them."""


class UnfinishedError(InfalignError):
    """Some prompts' rollouts could not be drawn. All others were.

    Attributes:
        failures: For each of those prompts' ids, why.
    """

    def __init__(self, failures: Mapping[str, InfalignError], total: int) -> None:
        first = next(iter(failures.values()))
        told = f"{len(failures)} of {counted(total, 'prompt')} could not be finished; the first: {first}"
        super().__init__(told, hint="Start again to draw what is missing")
        self.failures = dict(failures)


class Policy(ABC):
    """Something that draws responses and gives their log-probabilities.

    Attributes:
        name: What to call it in messages and records.
        sampler: What draws, for the key of a store.
        tokenizer: Its tokenizer; None for a server's model whose tokenizer is not at hand.
    """

    name: str
    sampler: str = "transformers"
    tokenizer: Any

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Its identity: the same for the same policy wherever it lies, another for every other."""

    def key(self, *, max_new_tokens: int, seed: int, temperature: float = 1.0, top_p: float = 1.0) -> RolloutKey:
        """What produces its rollouts, for a store.

        Raises:
            InputError: A setting is out of range, or the policy does not know where its weights come from.
        """
        tokenizer = "none" if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer)
        return RolloutKey(self.fingerprint, tokenizer, max_new_tokens, seed, temperature, top_p, self.sampler)

    def prompt_tokens(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        """Prompts as token ids; empty where the server does that.

        Raises:
            InputError: A prompt has no tokens, or leaves no room for the response.
        """
        return prompt_token_ids(self.tokenizer, prompts)

    # --- drawing -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def draw_rows(self, missing: Sequence[Missing], key: RolloutKey, batch_size: int | None = None) -> Iterator[Rows]:
        """Draw what is asked for, in batches as they are done.

        Args:
            missing: What to draw, each prompt once; the longest first, so that memory fails early.
            key: Seed, length, temperature and top_p; its other fields are not read.
            batch_size: Rollouts drawn at the same time; by default as many as fit in memory.

        Raises:
            UnfinishedError: At the end, when all else has been given: some prompts could not be finished.
        """

    def draw(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        *,
        store: RolloutStore,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Draw rollouts 0..num_samples−1 of every prompt, as far as the store does not have them.

        An interrupted run that is started again, another batch size or another order of prompts give the same rollouts,
        but for rounding in the model's own arithmetic.

        Args:
            prompts: Text is tokenised as it is, messages go through the chat template.
            num_samples: Rollouts per prompt.
            store: Where they go; its key says temperature, top_p, length and seed.
            batch_size: Rollouts drawn at the same time; by default as many as fit in memory.
            progress: Called after each batch with the rollouts there are, those wanted, and the speed.

        Returns:
            How many rollouts were drawn.

        Raises:
            InputError: A prompt is longer than the model's context minus the response.
            MismatchError: The store is for another tokenizer or another kind of sampler.
            StorageError: The store cannot be written, or somebody else is writing to it.
            UnfinishedError: Some prompts could not be finished; what was drawn is kept.
        """
        key = store.key
        self.require_key(store)
        if num_samples < 1 or (batch_size is not None and batch_size < 1):
            raise InputError(f"num_samples is {num_samples} and batch_size {batch_size}", where="sample",
                             hint="Both must be at least 1")  # fmt: skip
        tokens = self.prompt_tokens(prompts, key.max_new_tokens)
        prompt_of = {prompt.id: prompt for prompt in prompts}
        total = len(prompt_of) * num_samples
        report = progress or no_progress
        with store.writing():
            missing = [
                replace(one, prompt=prompt_of[one.prompt_id])
                for one in missing_rollouts(store, prompts, tokens, num_samples)
            ]
            drawn, done = 0, total - sum(len(one.indices) for one in missing)
            num_tokens, started = 0, time.monotonic()
            report(done, total, "")
            for new in self.draw_rows(missing, key, batch_size):
                store.append(new)
                drawn += len(new["index"])
                num_tokens += sum(count or 0 for count in new["num_tokens"])
                seconds = max(time.monotonic() - started, 1e-9)
                speed = f"{num_tokens / seconds:,.0f} tokens/s" if num_tokens else f"{drawn / seconds:,.1f} rollouts/s"
                report(done + drawn, total, speed + self.told())
        return drawn

    def require_key(self, store: RolloutStore) -> None:
        """Raise MismatchError unless the store is for this tokenizer and this kind of sampler."""
        require_key(store, self.tokenizer, sampler=self.sampler)

    def told(self) -> str:
        """What to add to the report of progress."""
        return ""

    # --- log-probabilities -------------------------------------------------------------------------------------------

    @property
    def components(self) -> list[tuple[float, Scoring]]:
        """The models in this process that its responses come from, with their weights.

        Raises:
            InputError: It is not a mixture of such models.
        """
        raise InputError(f"{self.name} gives no probabilities of single tokens", where="policy",
                         hint="Use a policy whose models are in this process")  # fmt: skip

    @abstractmethod
    def logprobs(
        self,
        prompt_ids_list: Sequence[Sequence[int]],
        completion_ids_list: Sequence[Sequence[int]],
        batch_size: int = 64,
    ) -> Float:
        """Log π(y|x) of each response, shape (B,) in nats, as `sequence_logprobs`.

        Raises:
            InputError: It cannot be known, with the reason.
        """

    def log_ratios(
        self,
        reference: Policy,
        prompts: Sequence[Prompt],
        token_ids_PG: Sequence[Sequence[Sequence[int]]],
        *,
        ref_token_ids_PK: Sequence[Sequence[Sequence[int]]] | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> LogRatios:
        """How far this policy is from a reference on G responses to each of P prompts.

        Args:
            reference: The reference, with the same tokens.
            prompts: P prompts.
            token_ids_PG: Responses as token ids, as a store's `lists_PK("token_ids", …)` gives them.
            ref_token_ids_PK: Responses of the reference; a `ReshapedPolicy` needs them, others do without.
            batch_size: Responses run at the same time.
            progress: Called after each batch.

        Raises:
            InputError: The vocabularies differ, the prompts differ in their number of responses, or one of the two
                gives no log-probabilities.
        """
        prompt_ids_list, completion_ids_list, shape = flat_responses(self.tokenizer, prompts, token_ids_PG)
        log_ratio_B, kl_B = mixture_log_ratios(
            *(self.components, reference.components, self.tokenizer),
            *(prompt_ids_list, completion_ids_list, batch_size, progress),
        )
        return LogRatios(log_ratio_B.reshape(shape), kl_B.reshape(shape))


# --- a model in this process ----------------------------------------------------------------------------------------

_locks: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()


@dataclass(frozen=True)
class Adapter:
    """Which adapter of a PEFT model is on.

    Attributes:
        name: Its name in the model; None for the base alone.
    """

    name: str | None


class LocalPolicy(Policy):
    """A transformers model in this process.

    Several policies may share one model: with its adapters on or off they are an aligned policy and its base, with one
    base in memory. Threads wait for each other.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        source: Where the weights came from (folder or hub name), for the key of a store.
        name: What to call it; by default the source.
        adapter: Which of the model's adapters is on; None to leave the model as it is.
    """

    tokenizer: Any

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        source: Any = None,
        name: str | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.name = name or str(source or getattr(model, "name_or_path", "") or type(model).__name__)
        self.adapter = adapter
        self._lock = _locks.setdefault(model, RLock())
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """As `model_fingerprint` of the source."""
        if self._fingerprint is None:
            if self.source is None:
                raise InputError(f"it is not known where the weights of {self.name} came from", where="policy",
                                 hint="Give source=FOLDER, or open it by open_policy(FOLDER)")  # fmt: skip
            self._fingerprint = model_fingerprint(self.source)
        return self._fingerprint

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The model in evaluation mode with this policy's adapter; then as it was."""
        with self._lock:
            was_training = self.model.training
            self.model.eval()
            try:
                with _switched(self.model, self.adapter):
                    yield self.model
            finally:
                self.model.train(was_training)

    def prompt_tokens(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        """As `Policy.prompt_tokens`."""
        tokens = prompt_token_ids(self.tokenizer, prompts)
        require_fit(self.model, prompts, tokens, max_new_tokens)
        return tokens

    def draw_rows(self, missing: Sequence[Missing], key: RolloutKey, batch_size: int | None = None) -> Iterator[Rows]:
        """As `Policy.draw_rows`; with log-probabilities."""
        ends = end_tokens(self.model, self.tokenizer)
        yield from draw_all(self.model, self.tokenizer, missing, ends, key, batch_size, self.active)

    @property
    def components(self) -> list[tuple[float, Scoring]]:
        """Itself."""
        return [(1.0, self)]

    def logprobs(
        self,
        prompt_ids_list: Sequence[Sequence[int]],
        completion_ids_list: Sequence[Sequence[int]],
        batch_size: int = 64,
    ) -> Float:
        """As `Policy.logprobs`."""
        with self.active() as model:
            return sequence_logprobs(model, self.tokenizer, prompt_ids_list, completion_ids_list, batch_size)


@contextmanager
def _switched(model: Any, adapter: Adapter | None) -> Iterator[None]:
    """One adapter on, or none; afterwards as it was."""
    if adapter is None:
        yield
        return
    layers = adapted_layers(model)
    before = [(layer, list(layer.active_adapters), bool(layer.disable_adapters)) for layer in layers]
    for layer in layers:
        switch(layer, [] if adapter.name is None else [adapter.name], adapter.name is None)
    try:
        yield
    finally:
        for layer, names, off in before:
            switch(layer, names, off)
