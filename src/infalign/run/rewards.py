"""The rewards of one recipe: opened, asked, calibrated, and combined where there are several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign._io.http import Endpoint
from infalign._io.progress import Progress
from infalign._io.wording import counted
from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError
from infalign.rewards.combined import CombinedReward, combine_stored_rewards
from infalign.rewards.score import score_store
from infalign.rewards.source import FunctionReward, HTTPReward, RewardSource, SequenceClassificationReward
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.run.recipe import Recipe, Reward

Float = NDArray[np.float64]


def open_reward(reward: Reward, *, testbed_model: str | None = None) -> RewardSource:
    """The source that a recipe's `reward` names.

    Args:
        reward: The recipe's section.
        testbed_model: The reward model where it names none.

    Raises:
        InputError: If it cannot be opened, or names nothing and there is no testbed.
    """
    if reward.function is not None:
        return FunctionReward(reward.function)
    if reward.url is not None:
        assert reward.name is not None, "held by the recipe"
        endpoint = Endpoint(reward.url, api_key_variable=reward.api_key_variable)
        return HTTPReward(endpoint, name=reward.name, batch_size=reward.batch_size)
    model = reward.model or testbed_model
    if model is None:
        raise InputError("no reward is named", where="reward", hint="Give model, function or url")
    return SequenceClassificationReward(
        model,
        batch_size=reward.batch_size,
        max_length=reward.max_length,
        trust_remote_code=reward.trust_remote_code,
        allow_pickle=reward.allow_pickle,
    )


class RunRewards:
    """The M rewards of one recipe.

    Args:
        recipe: The experiment.
        testbed_model: The reward model where the recipe names none.
        moment: Says when the run's chat prompts are rendered (`Prompt.rendered_at`), once it is known.
    """

    def __init__(
        self, recipe: Recipe, *, testbed_model: str | Path, moment: Callable[[], str | None] = lambda: None
    ) -> None:
        self._moment = moment
        self._rewards = recipe.reward
        self._calibration: dict[str, Any] = {"ties": recipe.calibration.ties, "seed": recipe.seed}
        self._testbed_model = str(testbed_model)

    @property
    def combined(self) -> bool:
        """Whether there are several."""
        return len(self._rewards) > 1

    def sources(self) -> list[RewardSource]:
        """Each by itself; M of them."""
        return [self.open(reward) for reward in self._rewards]

    def open(self, reward: Reward) -> RewardSource:
        """A reward of the run, gold ones among them, that renders chat messages as the run does."""
        source = open_reward(reward, testbed_model=self._testbed_model)
        source.render_at(self._moment())
        return source

    def source(self) -> RewardSource:
        """The only one, or all together."""
        sources = self.sources()
        return CombinedReward(sources, [reward.weight for reward in self._rewards]) if self.combined else sources[0]

    def score(
        self, store: RolloutStore, prompts: Sequence[Prompt], progress: Progress, *, retry_unscored: bool = False
    ) -> None:
        """Score what each source has not scored yet; arguments and errors as for `score_store`."""
        for source in self.sources():
            score_store(store, source, prompts, progress=progress, retry_unscored=retry_unscored)

    def read_PKM(self, store: RolloutStore, prompt_ids: Sequence[str], count: int) -> Float:  # noqa: N802
        """Stored rewards of every source, shape (P, count, M); NaN where one could not score."""
        parts = [store.rewards_PK(one.key, prompt_ids, count, allow_unscored=True) for one in self.sources()]
        return np.stack(parts, axis=-1)

    def fit(self, rewards_PKM: Float, prompt_ids: Sequence[str]) -> RewardCalibrator | CombinedCalibrator:
        """Calibrate on the rollouts that every source could score.

        Args:
            rewards_PKM: As `read_PKM` gives them.
            prompt_ids: P names, for messages.

        Raises:
            InputError: If a prompt has fewer than two such rollouts, or a reward never differs within a prompt.
        """
        scored_PK = scored_by_all(rewards_PKM)
        counts_P = scored_PK.sum(axis=1)
        if counts_P.min() < 2:
            raise InputError(
                f"{counted(int((counts_P < 2).sum()), 'prompt has', 'prompts have')} fewer than two scored reference "
                "rollouts, the first is "
                f"{prompt_ids[int(counts_P.argmin())]}",
                where="reward",
                hint="Fix the reward for their responses, or leave these prompts out",
            )
        for source, rewards_PK in zip(self.sources(), np.moveaxis(rewards_PKM, -1, 0), strict=True):
            first_P = rewards_PK[np.arange(len(rewards_PK)), scored_PK.argmax(axis=1)]
            if ((rewards_PK == first_P[:, None]) | ~scored_PK).all():
                raise InputError(
                    "the reward gives every response to a prompt the same score, so there is nothing to learn",
                    where=f"reward {source}",
                    hint="Check the reward function or model",
                )
        if not self.combined:
            return RewardCalibrator(**self._calibration).fit(rewards_PKM[:, :, 0], mask_PK=scored_PK)
        weights = [reward.weight for reward in self._rewards]
        return CombinedCalibrator(weights, **self._calibration).fit(rewards_PKM, mask_PK=scored_PK)

    def combine(
        self, store: RolloutStore, calibrator: CombinedCalibrator, prompt_ids: Sequence[str], count: int
    ) -> None:
        """Write the combined score of each rollout beside its rewards; see `combine_stored_rewards`."""
        source = self.source()
        assert isinstance(source, CombinedReward), "asked for with several rewards only"
        combine_stored_rewards(store, source, calibrator, prompt_ids, count)


def scored_by_all(rewards_PKM: Float) -> NDArray[np.bool_]:
    """Which rollouts every source could score, shape (P, K)."""
    return np.asarray(~np.isnan(rewards_PKM).any(axis=-1))
