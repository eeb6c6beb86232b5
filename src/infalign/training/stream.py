"""The order in which a training sees its examples, and how they become batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from infalign.rollouts.tokens import prompt_token_ids
from infalign.training.losses import Examples
from infalign.training.pool import RolloutPool

PIECE = 64  # rollouts that are padded to one length together


def step_order(lengths_N: NDArray[np.int64], steps: int, per_step: int, seed: int | Sequence[int]) -> NDArray[np.int64]:
    """Which examples each step takes, shape (steps, per_step): every example once before any comes again.

    Which ones come together is left to chance; within a step they are sorted by length.
    """
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(len(lengths_N)) for _ in range(-(-steps * per_step // len(lengths_N)))]
    order = np.concatenate(rounds)[: steps * per_step].reshape(steps, per_step)
    return np.take_along_axis(order, np.argsort(lengths_N[order], axis=1, kind="stable"), axis=1)


class ExampleStream(Dataset[dict[str, Any]]):
    """The whole training as one pass: item i belongs to step i // per_step.

    The order is part of the data, so that a resumed training sees the same. Fresh rollouts, where there are any, take
    half of every step from the second window of `every` steps on.
    """

    def __init__(
        self, pool: RolloutPool, examples: Examples, tokenizer: Any, *, steps: int, per_step: int, seed: int
    ) -> None:
        self._tokenizer, self._steps, self._per_step, self._seed = tokenizer, steps, per_step, seed
        self.pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._every = steps
        self._parts: list[_Part] = []
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._targets: dict[int, list[NDArray[np.float64]]] = {}
        self.add(pool, examples)

    def add(self, pool: RolloutPool, examples: Examples) -> None:
        """Take in the examples of another pool; seen from the next window on."""
        self._parts.append(_Part(pool, examples, prompt_token_ids(self._tokenizer, pool.prompts)))

    def retarget(self, window: int, targets_of: Callable[[RolloutPool], NDArray[np.float64]]) -> None:
        """From this window on, give the examples of all pools so far other targets, in nats.

        The window before, which the data loader may still be reading, keeps its own.
        """
        self._targets = {w: known for w, known in self._targets.items() if w == window - 1}
        self._targets[window] = [targets_of(part.pool) for part in self._parts]

    def refresh_every(self, steps: int) -> None:
        """Expect a pool of fresh rollouts for every window of so many steps but the first."""
        self._every = steps

    def __len__(self) -> int:
        return self._steps * self._per_step

    def __getitem__(self, item: int) -> dict[str, Any]:
        step, place = divmod(item, self._per_step)
        window, step_in_window = divmod(step, self._every)
        if window not in self._orders:
            self._orders = {window: self._order(window)}
        number = int(self._orders[window][step_in_window, place])
        targets = self._targets.get(window)
        for index, part in enumerate(self._parts):
            if number < len(part):
                example = part.item(number)
                return example if targets is None else {**example, "target": targets[index][number]}
            number -= len(part)
        raise IndexError(item)

    def _order(self, window: int) -> NDArray[np.int64]:
        """Examples of the window's steps, numbered through all parts; half stored and half fresh where there are."""
        steps = min(self._every, self._steps - window * self._every)
        seen = self._parts[: window + 1]
        assert len(seen) == window + 1, "fresh rollouts are drawn before their window begins"
        stored, later = seen[0].lengths_N, [part.lengths_N for part in seen[1:]]
        if not later:
            return step_order(stored, steps, self._per_step, [self._seed, window])
        half = self._per_step // 2
        new = np.concatenate(later)
        parts = [
            step_order(stored, steps, self._per_step - half, [self._seed, window, 0]),
            len(stored) + step_order(new, steps, half, [self._seed, window, 1]),
        ]
        return np.concatenate(parts, axis=1)


class _Part:
    """One pool's examples, ready to be collated."""

    def __init__(self, pool: RolloutPool, examples: Examples, prompt_ids: list[list[int]]) -> None:
        self.pool, self._examples, self._prompt_ids = pool, examples, prompt_ids
        lengths_R = np.array([len(pool.token_ids[r]) for r in range(len(pool))])
        lengths_R = lengths_R + np.array([len(ids) for ids in prompt_ids])[pool.prompt_R]
        self.lengths_N: NDArray[np.int64] = lengths_R[examples.rollouts_NM].max(axis=1)

    def __len__(self) -> int:
        return len(self.lengths_N)

    def item(self, number: int) -> dict[str, Any]:
        rows_M = self._examples.rollouts_NM[number]
        return {
            "prompt_ids": [self._prompt_ids[self.pool.prompt_R[row]] for row in rows_M],
            "completion_ids": [self.pool.token_ids[row] for row in rows_M],
            "ref_logprobs": self.pool.ref_logprobs_R[rows_M],
            "target": self._examples.targets_N[number],
            "weight": self._examples.weights_N[number],
        }


def collate(items: Sequence[Mapping[str, Any]], pad: int, padding_side: str = "left") -> list[dict[str, torch.Tensor]]:
    """A batch of examples, cut into pieces of like length so that little is padded."""
    size = max(1, PIECE // len(items[0]["ref_logprobs"]))
    return [_piece(items[start : start + size], pad, padding_side) for start in range(0, len(items), size)]


def _piece(items: Sequence[Mapping[str, Any]], pad: int, padding_side: str) -> dict[str, torch.Tensor]:
    """N examples of M rollouts; rollouts are rows, N·M of them, example by example."""
    prompts = [ids for item in items for ids in item["prompt_ids"]]
    completions = [ids for item in items for ids in item["completion_ids"]]
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids_RL = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask_RL, counts_RL = torch.zeros_like(ids_RL), torch.zeros_like(ids_RL, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        length = len(prompt) + len(completion)
        start = longest - length if padding_side == "left" else 0
        ids_RL[row, start : start + length] = torch.tensor([*prompt, *completion])
        mask_RL[row, start : start + length] = 1
        counts_RL[row, start + len(prompt) : start + length] = True
    return {
        "input_ids": ids_RL,
        "attention_mask": mask_RL,
        "counts": counts_RL,
        "ref_logprobs": torch.tensor(np.stack([item["ref_logprobs"] for item in items]), dtype=torch.float32),
        "targets": torch.tensor([item["target"] for item in items], dtype=torch.float32),
        "weights": torch.tensor([item["weight"] for item in items], dtype=torch.float32),
    }
