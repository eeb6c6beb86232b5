"""What is attacked: a model on this machine, or one behind a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from infalign._io.http import Endpoint
from infalign._io.progress import Progress
from infalign.rollouts.asking import SAMPLER
from infalign.rollouts.endpoint import ServedPolicy
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.models import load_tokenizer
from infalign.rollouts.opening import open_policy
from infalign.rollouts.policy import Policy
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore

Batches = Sequence[tuple[int, Sequence[Prompt]]]
"""For each (count, prompts) that many rollouts of each prompt."""


class Drawing(Protocol):
    """Fills stores from one model."""

    def draw(self, batches: Batches, path: Path, *, max_new_tokens: int, seed: int, progress: Progress) -> RolloutStore:
        """Fill a store with what it lacks."""
        ...


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

    def opened(self) -> Drawing:
        """Ready to draw; what is held is freed when the caller lets go of it."""
        ...


@dataclass(frozen=True)
class LocalModel:
    """A model folder, an adapter folder, a folder with a policy.json, or a hub name.

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

    def opened(self) -> Drawing:
        """As `Target.opened`."""
        return _LocalDrawing(self)


class _LocalDrawing:
    """Loads the model when something is missing, and once."""

    def __init__(self, target: LocalModel) -> None:
        self._target = target
        self._tokenizer = load_tokenizer(target.model, trust_remote_code=target.trust_remote_code)
        self._policy: Policy | None = None

    def draw(self, batches: Batches, path: Path, *, max_new_tokens: int, seed: int, progress: Progress) -> RolloutStore:
        """As `Drawing.draw`; errors as in `open_policy` and `Policy.draw`."""
        target = self._target
        key = RolloutKey.of(target.model, self._tokenizer, max_new_tokens=max_new_tokens, seed=seed)
        store = RolloutStore.open(path, key)
        present = store.present()
        if all(present.get(one.id, set()).issuperset(range(count)) for count, prompts in batches for one in prompts):
            return store
        if self._policy is None:
            self._policy = open_policy(
                target.model, trust_remote_code=target.trust_remote_code, allow_pickle=target.allow_pickle
            )
        for count, prompts, told in _in_turn(batches, progress):
            self._policy.draw(prompts, count, store=store, batch_size=target.batch_size, progress=told)
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

    def opened(self) -> Drawing:
        """As `Target.opened`."""
        return self

    def draw(self, batches: Batches, path: Path, *, max_new_tokens: int, seed: int, progress: Progress) -> RolloutStore:
        """As `Drawing.draw`; errors as in `Policy.draw`."""
        key = RolloutKey(f"endpoint:{self.model}", "the server's", max_new_tokens, seed, sampler=SAMPLER)
        store = RolloutStore.open(path, key)
        policy = ServedPolicy(self.endpoint, self.model, concurrency=self.concurrency)
        for count, prompts, told in _in_turn(batches, progress):
            policy.draw(prompts, count, store=store, progress=told)
        return store


def _in_turn(batches: Batches, progress: Progress) -> Iterator[tuple[int, Sequence[Prompt], Progress]]:
    """Each batch with a callback that counts on from the batches before."""
    total = sum(count * len(prompts) for count, prompts in batches)
    before = 0
    for count, prompts in batches:
        yield count, prompts, partial(_told, progress, before, total)
        before += count * len(prompts)


def _told(progress: Progress, before: int, total: int, done: int, _: int, text: str) -> None:
    progress(before + done, total, text)
