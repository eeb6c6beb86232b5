"""A run's transformed reward behind verl's custom reward function.

A file for verl holds two lines, and verl's `custom_reward_function.path` names it:

    from infalign.integrations.verl import make_compute_score
    compute_score = make_compute_score("runs/my-model")

The data set's `extra_info` carries each prompt's id as `prompt_id` (the ids of `prompts/train.jsonl` in the run
folder; `infalign.rollouts.prompts.prompt_id` computes them). The reward is in nats, so verl's own KL belongs into the
reward with coefficient 1 and into nothing else; `docs/other_trainers.md` lists the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infalign.errors import InputError
from infalign.integrations.trl import TrainerReward

Score = dict[str, float]


def make_compute_score(run_folder: str | Path, policy: str | None = None, *, beta: float | None = None) -> ComputeScore:
    """Make `compute_score(data_source, solution_str, ground_truth, extra_info=None)`: one response at a time.

    Args:
        run_folder: A run folder in which at least `infalign calibrate` has been done.
        policy: Name of the transform, as in the folder's `plan.json`; by default the recipe's own.
        beta: KL coefficient, in units of Φ per nat; by default the planned one.

    Returns:
        A function that gives `score` (Φ_K/β in nats, M6), `calibrated_reward` (M5) and `raw_reward`; verl optimises the
        first and logs all three.

    Raises:
        InfalignError: As `infalign.integrations.trl.load_transformed_reward`, at once.
    """
    return ComputeScore(run_folder, policy, beta)


def make_batch_compute_score(
    run_folder: str | Path, policy: str | None = None, *, beta: float | None = None
) -> ComputeBatchScore:
    """Make `compute_score(data_sources, solution_strs, ground_truths, extra_infos)`, for verl's batch reward manager.

    Arguments, results (one per response) and errors are those of `make_compute_score`.
    """
    return ComputeBatchScore(run_folder, policy, beta)


class _OfRun:
    """Holds the reward; a copy sent to another process opens the run there."""

    def __init__(self, run_folder: str | Path, policy: str | None, beta: float | None) -> None:
        self._made_of = (str(Path(run_folder).resolve()), policy, beta)
        self._reward = TrainerReward(*self._made_of[:2], beta=beta)
        self.__name__ = "compute_score"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    def _score(self, responses: Sequence[str], extra_infos: Sequence[Mapping[str, Any] | None]) -> list[Score]:
        prompt_ids: list[str] = []
        for extra_info in extra_infos:
            if not extra_info or "prompt_id" not in extra_info:
                raise InputError(
                    "extra_info holds no prompt_id",
                    where="verl compute_score",
                    hint="Write the id of each prompt into the data set's column extra_info, as prompt_id",
                )
            prompt_ids.append(str(extra_info["prompt_id"]))
        worth = self._reward(prompt_ids, responses)
        columns = (worth.nats_B.tolist(), worth.calibrated_B.tolist(), worth.rewards_B.tolist())
        return [
            {"score": nats, "calibrated_reward": calibrated, "raw_reward": raw}
            for nats, calibrated, raw in zip(*columns, strict=True)
        ]


class ComputeScore(_OfRun):
    """What `make_compute_score` returns."""

    def __call__(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Score:
        """The score of one response; what else verl hands over does not change it.

        Raises:
            InputError: If `extra_info` holds no `prompt_id`, or one that the run does not know.
            RewardError: If the response cannot be scored.
        """
        return self._score([solution_str], [extra_info])[0]


class ComputeBatchScore(_OfRun):
    """What `make_batch_compute_score` returns."""

    def __call__(
        self,
        data_sources: Sequence[str],
        solution_strs: Sequence[str],
        ground_truths: Sequence[Any],
        extra_infos: Sequence[Mapping[str, Any] | None],
        **_: Any,
    ) -> list[Score]:
        """The score of each response. Errors are those of `ComputeScore`."""
        return self._score(list(solution_strs), list(extra_infos))
