"""What is attacked: a model on this machine, or one behind a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from infalign.data import Prompt
from infalign.rollouts.endpoint import SAMPLER, sample_endpoint
from infalign.rollouts.http import Endpoint
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.models import load_policy
from infalign.rollouts.progress import Progress
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore


class Target(Protocol):
    """A model under audit."""

    @property
    def label(self) -> str:
        """Its name in tables; also the folder of its rollouts."""
        ...

    @property
    def model(self) -> str:
        """Where it comes from."""
        ...

    def draw(
        self,
        batches: Sequence[tuple[int, Sequence[Prompt]]],
        path: Path,
        *,
        max_new_tokens: int,
        seed: int,
        progress: Progress,
    ) -> RolloutStore:
        """Fill a store with what it lacks: for each (count, prompts) that many rollouts of each prompt."""
        ...


@dataclass(frozen=True)
class LocalModel:
    """A model folder, an adapter folder, or a hub name.

    Attributes:
        label: Its name in tables.
        model: Folder or name.
        batch_size: Rollouts drawn at the same time; by default as many as fit.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Also accept weights that are not safetensors.
    """

    label: str
    model: str
    batch_size: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def draw(
        self,
        batches: Sequence[tuple[int, Sequence[Prompt]]],
        path: Path,
        *,
        max_new_tokens: int,
        seed: int,
        progress: Progress,
    ) -> RolloutStore:
        """As `Target.draw`; errors as in `load_policy` and `sample`."""
        policy, tokenizer = load_policy(
            self.model, trust_remote_code=self.trust_remote_code, allow_pickle=self.allow_pickle
        )
        key = RolloutKey.of(self.model, tokenizer, max_new_tokens=max_new_tokens, seed=seed)
        store = RolloutStore.open(path, key)
        for count, prompts, told in _in_turn(batches, progress):
            sample(policy, tokenizer, prompts, count, store=store, batch_size=self.batch_size, progress=told)
        return store


@dataclass(frozen=True)
class ServedModel:
    """A model behind a server that speaks the OpenAI protocol.

    Attributes:
        label: Its name in tables.
        model: Its name at the server.
        endpoint: The server.
        concurrency: Requests under way at the same time.
    """

    label: str
    model: str
    endpoint: Endpoint = field(repr=False)
    concurrency: int = 16

    def draw(
        self,
        batches: Sequence[tuple[int, Sequence[Prompt]]],
        path: Path,
        *,
        max_new_tokens: int,
        seed: int,
        progress: Progress,
    ) -> RolloutStore:
        """As `Target.draw`; errors as in `sample_endpoint`."""
        key = RolloutKey(f"endpoint:{self.model}", "the server's", max_new_tokens, seed, sampler=SAMPLER)
        store = RolloutStore.open(path, key)
        for count, prompts, told in _in_turn(batches, progress):
            sample_endpoint(
                self.endpoint, self.model, prompts, count, store=store, concurrency=self.concurrency, progress=told
            )
        return store


def _in_turn(
    batches: Sequence[tuple[int, Sequence[Prompt]]], progress: Progress
) -> Iterator[tuple[int, Sequence[Prompt], Progress]]:
    """Each batch with a callback that counts on from the batches before."""
    total = sum(count * len(prompts) for count, prompts in batches)
    before = 0
    for count, prompts in batches:
        yield count, prompts, partial(_told, progress, before, total)
        before += count * len(prompts)


def _told(progress: Progress, before: int, total: int, done: int, _: int, text: str) -> None:
    progress(before + done, total, text)
