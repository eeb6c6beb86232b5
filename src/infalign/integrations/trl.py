"""The reward that a run was made with, out of its folder, for a trainer of one's own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infalign._io.wording import counted
from infalign.errors import InputError, MismatchError
from infalign.run.stages.run import open_run
from infalign.run.stages.trust import Trust
from infalign.training.reward import TransformedReward

Float = NDArray[np.float64]
# A script imports what it needs by itself, so it may open a run that names a function; nothing that a model brings.
SCRIPT = Trust(rewards=True)


@dataclass(frozen=True)
class Rewarded:
    """What B responses are worth.

    Attributes:
        nats_B: Φ_K/β (M6), what the trainer maximises with a KL coefficient of 1.
        calibrated_B: Calibrated rewards C in [0, 1] (M5).
        rewards_B: Raw rewards; of several sources together the first.
    """

    nats_B: Float  # noqa: N815
    calibrated_B: Float  # noqa: N815
    rewards_B: Float  # noqa: N815


class TrainerReward:
    """The transformed reward of a run for trainers that hand over a prompt's id and the response's text.

    Calls from several threads are taken one after the other.

    Args:
        run_folder: As in `load_transformed_reward`, whose errors it raises.
        policy: As there.
        beta: As there.
        trust: As there.
    """

    def __init__(
        self, run_folder: str | Path, policy: str | None = None, *, beta: float | None = None, trust: Trust = SCRIPT
    ) -> None:
        self.transformed = load_transformed_reward(run_folder, policy, beta=beta, trust=trust)
        self.run = open_run(run_folder, trust)
        self.prompts = self.run.prompts("train")
        self._content_of = {prompt.id: prompt.prompt for prompt in self.prompts}
        self._lock = threading.Lock()

    def __call__(self, prompt_ids: Sequence[str], responses: Sequence[str]) -> Rewarded:
        """Reward B responses.

        Raises:
            InputError: If a prompt is not one of the run's training prompts.
            RewardError: If the reward's source leaves a response without a finite score.
        """
        self.require(prompt_ids)
        reward = self.transformed
        with self._lock:
            rewards = reward.score([self._content_of[i] for i in prompt_ids], responses, prompt_ids)
            paid = reward.pay(rewards, prompt_ids)
            nats_B, calibrated_B = paid.nats_B, paid.ranked.rank_B / paid.ranked.num_ref_B
            reward.follow(paid.ranked)
        return Rewarded(nats_B, calibrated_B, rewards.reshape(len(responses), -1)[:, 0])

    def require(self, prompt_ids: Sequence[str]) -> None:
        """Raise InputError for the first prompt that is not one of the run's training prompts."""
        for prompt_id in prompt_ids:
            if prompt_id not in self._content_of:
                raise InputError(
                    f"prompt {prompt_id!r} is not among the run's {counted(len(self.prompts), 'training prompt')}",
                    where=str(self.run.out),
                    hint="Train on the prompts of prompts/train.jsonl in the run folder, with their ids",
                )


def load_transformed_reward(
    run_folder: str | Path, policy: str | None = None, *, beta: float | None = None, trust: Trust = SCRIPT
) -> TransformedReward:
    """The transformed reward Φ_K/β (M5, M6) that one policy of a run is, or would be, aligned with.

    It knows the run's training prompts by their ids, and each prompt's further columns. The reward's model is loaded
    when it is first needed.

    Args:
        run_folder: A run folder in which at least `infalign calibrate` has been done.
        policy: Name of the transform, as in the folder's `plan.json`; by default the recipe's own, the first.
        beta: KL coefficient, in units of Φ per nat; by default the planned one.
        trust: What the run's recipe is allowed; by default to name functions and servers as rewards, but not to run
            code that comes with a model or to read pickled weights.

    Returns:
        A reward that any trainer with TRL's reward-function signature takes. A self-consistent transform starts at the
        reference policy and follows the policy whose responses it is shown, at the pace of the recipe's training.

    Raises:
        InputError: If there is no such policy, its `beta` is not positive, or the run is of another version.
        MismatchError: If the reward is not the one that the run was calibrated with.
        StorageError: If the folder does not hold a calibrated run.
    """
    run = open_run(run_folder, trust)
    planned = {entry.name: entry for entry in run.planned()}
    name = next(iter(planned)) if policy is None else policy
    if name not in planned:
        raise InputError(
            f"there is no transform {name!r} in this run",
            where=str(run_folder),
            hint=f"There are: {', '.join(planned)}",
        )
    reward = run.transformed_reward(planned[name])
    scored_by = run.store("reference").reward_sources
    changed = [source.key for source in run.rewards.sources() if source.key not in scored_by]
    if changed:
        raise MismatchError(
            f"the reward is now {', '.join(changed)}, the calibration was made with {', '.join(scored_by)}",
            where=str(run_folder),
            hint="Do `infalign calibrate` again with the changed reward",
        )
    reward.take_columns_from(run.prompts("train"))
    if beta is not None:
        reward.beta = beta
    if reward.follower is not None:
        training = run.recipe.training
        reward.follower.rollouts_per_step = training.prompts_per_step * training.num_generations
    return reward
