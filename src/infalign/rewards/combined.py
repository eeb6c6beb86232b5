"""Several reward sources as one, for training and for stores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from infalign._io.wording import distinct
from infalign.calibration.combined import CombinedCalibrator
from infalign.rewards.source import RewardSource, Scores
from infalign.rollouts.prompts import PromptContent
from infalign.rollouts.store import RolloutStore


class CombinedReward(RewardSource):
    """M sources asked about the same responses: M rewards each, for a `CombinedCalibrator` to combine.

    A response that one source cannot score is unscored.

    Args:
        sources: M sources.
        weights: M weights, which are part of what the combination is.
    """

    def __init__(self, sources: Sequence[RewardSource], weights: Sequence[float]) -> None:
        self.sources = list(sources)
        self.description = {
            "kind": "combined",
            "sources": [source.key for source in self.sources],
            "weights": [float(weight) for weight in weights],
        }
        digest = hashlib.sha256(repr(sorted(self.description.items())).encode()).hexdigest()[:12]
        self.key = f"combined@{digest}"

    def render_at(self, moment: str | None) -> None:
        """As `RewardSource.render_at`."""
        for source in self.sources:
            source.render_at(moment)

    def score_rows(
        self, prompts: Sequence[PromptContent], completions: Sequence[PromptContent], **columns: Any
    ) -> Scores:
        """As `RewardSource.score_rows`, with rewards of shape (B, M)."""
        parts = [source.score_rows(prompts, completions, **columns) for source in self.sources]
        errors = [next((error for error in of_one if error is not None), None)
                  for of_one in zip(*(part.errors for part in parts), strict=True)]  # fmt: skip
        return Scores(np.stack([part.rewards for part in parts], axis=-1), errors)

    def __str__(self) -> str:
        names = distinct([str(source) for source in self.sources])
        return " + ".join(
            f"{weight:g} × {name}" for weight, name in zip(self.description["weights"], names, strict=True)
        )


def combine_stored_rewards(
    store: RolloutStore, source: CombinedReward, calibrator: CombinedCalibrator, prompt_ids: Sequence[str], count: int
) -> None:
    """Write the weighted mean of calibrated rewards beside the first `count` rollouts of each prompt, under its key.

    Args:
        store: Rollouts that every source has scored.
        source: The sources; its key names the combined rewards.
        calibrator: Fitted on other rollouts of the reference for these prompts.
        prompt_ids: P prompts, in the calibrator's order.
        count: Rollouts per prompt.

    Raises:
        InputError: A rollout is missing, or one of the sources has not scored it.
    """
    parts = [store.rewards_PK(one.key, prompt_ids, count) for one in source.sources]
    combined_PK = calibrator.score(np.stack(parts, axis=-1))
    with store.writing_rewards(source.key, source.description):
        ids, indices = np.repeat(np.array(prompt_ids, dtype=object), count), np.tile(np.arange(count), len(prompt_ids))
        store.append_rewards(source.key, ids.tolist(), indices, combined_PK.ravel())
