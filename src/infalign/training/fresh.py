"""Mixed training: rollouts of the current policy join the stored ones every few steps.

Pointwise regression has the same optimum whatever distribution its rollouts come from: at the optimum of M2 the
residual is zero on every response (M12). Fresh rollouts put the weight where the policy now is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, TrainerCallback

from infalign._io.processes import is_main, wait_for_all
from infalign.errors import InputError
from infalign.rollouts.key import RolloutKey, tokenizer_fingerprint
from infalign.rollouts.logprobs import sequence_logprobs
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.tokens import prompt_token_ids
from infalign.training.losses import OfflineLoss
from infalign.training.pool import RolloutPool, level_counts_of
from infalign.training.reward import TransformedReward
from infalign.training.stream import ExampleStream


class FreshRollouts(TrainerCallback):
    """Draws, scores and adds rollouts of the current policy for every window of steps but the first.

    They are drawn one step before their window begins, since the data loader reads ahead. Each round is a rollout store
    in the training's folder, so that a stopped training finds it again. A self-consistent transform (the same object in
    the reward and in the loss) takes in every round, and the targets of all rollouts, old and new, follow it.

    Args:
        reward: Scores responses and ranks them among all K references of their prompt.
        every: Steps in a window, at least 2.
        num_prompts: Prompts in one round; every prompt once before any comes again.
        num_samples: Rollouts per prompt.

    Raises:
        InputError: If `every` is less than 2.
    """

    def __init__(self, reward: TransformedReward, *, every: int, num_prompts: int, num_samples: int) -> None:
        if every < 2:
            raise InputError(f"fresh rollouts every {every} steps", where="training.refresh_every",
                             hint="Use at least 2; training on rollouts of every step is solver: online")  # fmt: skip
        self.reward, self.every = reward, every
        self.num_prompts, self.num_samples = num_prompts, num_samples
        self.kl: float | None = None  # of the last round, in nats

    def begin(
        self,
        folder: Path,
        reference: PreTrainedModel,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        loss: OfflineLoss,
        data: ExampleStream,
        *,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        """Get to know the training that this serves."""
        self._folder, self._reference, self._tokenizer = folder, reference, tokenizer
        self._prompts, self._loss, self._data = list(prompts), loss, data
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self.num_prompts = min(self.num_prompts, len(self._prompts))
        self.reward.take_columns_from(self._prompts)
        self.reward.restart()  # a stopped training takes in its rounds again, in order
        data.refresh_every(self.every)

    def restore(self, step: int, steps: int) -> None:
        """Take in the rounds that were drawn before a checkpoint at this step, of a training of so many steps."""
        for window in range(1, (step + 1) // self.every + 1):
            if self._is_drawn(window, steps):
                self._add(window, None)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Draw the next window's round where it is time to."""
        window, left = divmod(state.global_step + 1, self.every)
        if left == 0 and self._is_drawn(window, state.max_steps):
            self._add(window, model)

    def _is_drawn(self, window: int, steps: int) -> bool:
        """Whether any step is left to use this window's round."""
        return window * self.every < steps

    def _add(self, window: int, policy: Any) -> None:
        prompts = self._round_prompts(window)
        store = self._store(window)
        if policy is not None and is_main():
            sample(policy, self._tokenizer, prompts, self.num_samples, store=store)
        wait_for_all()
        ids = [prompt.id for prompt in prompts]
        prompt_R = np.repeat(np.arange(len(prompts)), self.num_samples)
        token_ids, texts = (
            [one for row in store.lists_PK(column, ids, self.num_samples) for one in row]
            for column in ("token_ids", "text")
        )
        ids_R = [ids[p] for p in prompt_R]
        rewards = self.reward.score([prompts[p].prompt for p in prompt_R], texts, ids_R)
        prompt_ids = prompt_token_ids(self._tokenizer, prompts)
        ref_logprobs_R = sequence_logprobs(
            self._reference, self._tokenizer, [prompt_ids[p] for p in prompt_R], token_ids
        )
        ranked = self.reward.rank(rewards, ids_R)
        pool = RolloutPool(
            tuple(prompts),
            prompt_R,
            token_ids,
            ref_logprobs_R,
            ranked.rank_B,
            ranked.tied_B,
            ranked.num_ref_B,
            ranked.prompt_B,
            level_counts_of(self.reward.calibrator, ranked.prompt_B),
        )
        self.kl = float((store.column_PK("logprob", ids, self.num_samples).ravel() - ref_logprobs_R).mean())
        self._data.add(pool, self._loss.examples(pool))
        if self.reward.follower is not None:
            self.reward.follow(ranked)
            self._data.retarget(window, lambda seen: self._loss.examples(seen).targets_N)

    def _round_prompts(self, window: int) -> list[Prompt]:
        """This round's prompts: consecutive pieces of one random order after another."""
        first, out = (window - 1) * self.num_prompts, []
        for place in range(first, first + self.num_prompts):
            lap, position = divmod(place, len(self._prompts))
            order = np.random.default_rng([self._seed, lap, 7]).permutation(len(self._prompts))
            out.append(self._prompts[order[position]])
        return list(dict.fromkeys(out))

    def _store(self, window: int) -> RolloutStore:
        key = RolloutKey(
            f"round {window}",
            tokenizer_fingerprint(self._tokenizer),
            max_new_tokens=self._max_new_tokens,
            seed=self._seed + 7919 * window,
        )
        return RolloutStore.open(self._folder / f"{window:05d}", key)
