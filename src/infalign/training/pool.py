"""Scored rollouts with the reference's log-probabilities: what the offline losses learn from.

A stored reference rollout is one of the K references that calibrate its own prompt. It is ranked among the K − 1
others: the ranks of a prompt's K rollouts are then 0..K−1, each once, and the mean of exp(Φ_{K−1}/β) over them is
∫ exp(Φ/β) exactly (M6). So weights by the known normaliser Z and self-normalised weights are one and the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError
from infalign.rollouts.prompts import Prompt
from infalign.theory.finite_k import tilt_at_ranks
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.training.target import follower_of
from infalign.training.tilt import log_partition, tilt_by_rank, tilt_of_reward
from infalign.transforms import RewardTransform

if TYPE_CHECKING:
    from infalign.rollouts.store import RolloutStore

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class RolloutPool:
    """R rollouts of some prompts, ranked among reference rewards.

    Attributes:
        prompts: The prompts.
        prompt_R: Which of them each rollout answers.
        token_ids: The tokens of each rollout, end token included.
        ref_logprobs_R: log p(y|x) of each, summed over its tokens, in nats.
        ranks_R: How many of `num_ref_R` reference rewards each one's reward beats, a tie counting one half.
        ties_R: How many it ties with.
        num_ref_R: How many it was compared with.
        row_R: The calibrator's row of each one's prompt; None if unknown.
        level_counts: Of each of these rows, how many of its K references have the lowest reward, the next, …; left out
            where ties are resolved. A stored rollout is one of them itself.
    """

    prompts: tuple[Prompt, ...]
    prompt_R: Int  # noqa: N815
    token_ids: list[list[int]]
    ref_logprobs_R: Float  # noqa: N815
    ranks_R: Float  # noqa: N815
    ties_R: Int  # noqa: N815
    num_ref_R: Int  # noqa: N815
    row_R: Int | None = None  # noqa: N815
    level_counts: Mapping[int, Int] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


def stored_rollouts(
    store: RolloutStore,
    prompts: Sequence[Prompt],
    calibrator: RewardCalibrator | CombinedCalibrator,
    calibrated_ids: Sequence[str],
    *,
    scored_PK: NDArray[np.bool_] | None = None,
    ref_logprobs_PK: Float | None = None,
) -> RolloutPool:
    """The reference rollouts that a calibrator was fitted on, each ranked among the others of its prompt.

    Args:
        store: The rollouts.
        prompts: Prompts to take, all among the calibrated ones.
        calibrator: Fitted on the rewards of the first K rollouts of `calibrated_ids`.
        calibrated_ids: The prompt id of each of the calibrator's rows.
        scored_PK: The mask that the calibrator was fitted with, row by row; all count by default.
        ref_logprobs_PK: Log-probabilities under the reference, for a store without them; row by row.

    Raises:
        InputError: The store lacks token ids or log-probabilities, was drawn at another temperature, or a prompt is
            not calibrated or has a single reference.
    """
    num_ref_P = calibrator.num_ref_P
    k = int(num_ref_P.max()) if scored_PK is None else scored_PK.shape[1]
    mask_PK = np.ones((len(calibrated_ids), k), dtype=np.bool_) if scored_PK is None else scored_PK
    if (mask_PK.sum(axis=1) != num_ref_P).any():
        raise InputError("the calibrator was fitted on other rollouts", where=str(store.path),
                         hint="Give the mask that it was fitted with")  # fmt: skip
    if not store.key.samples_the_policy:
        raise InputError(
            f"these rollouts were drawn at temperature {store.key.temperature} and top_p {store.key.top_p}",
            where=str(store.path),
            hint="Offline training needs draws of the reference itself",
        )
    row_of = {prompt_id: row for row, prompt_id in enumerate(calibrated_ids)}
    unknown = [prompt.id for prompt in prompts if prompt.id not in row_of]
    if unknown:
        raise InputError(f"prompt {unknown[0]!r} has no reference rollouts to calibrate with", where="stored_rollouts",
                         hint="Draw reference rollouts for every training prompt first")  # fmt: skip
    _require_known(store, ref_logprobs_PK is None)
    logprobs_PK = store.column_PK("logprob", calibrated_ids, k) if ref_logprobs_PK is None else ref_logprobs_PK
    token_ids_PK = store.column_PK("token_ids", calibrated_ids, k)
    ranks_R, ties_R = calibrator.reference_ranks_and_ties()
    row_R, column_R = np.nonzero(mask_PK)
    mine_of_row = np.full(len(calibrated_ids), -1, dtype=np.int64)
    mine_of_row[[row_of[prompt.id] for prompt in prompts]] = np.arange(len(prompts))
    taken = np.flatnonzero(mine_of_row[row_R] >= 0)
    rows, columns = row_R[taken], column_R[taken]
    return RolloutPool(
        tuple(prompts),
        mine_of_row[rows],
        list(token_ids_PK[rows, columns]),
        logprobs_PK[rows, columns],
        ranks_R[taken],
        ties_R[taken],
        num_ref_P[rows] - 1,
        rows,
        level_counts_of(calibrator, rows),
    )


def level_counts_of(calibrator: RewardCalibrator | CombinedCalibrator, row_R: Int) -> dict[int, Int] | None:
    """`RolloutPool.level_counts` of a calibrator's rows."""
    if calibrator.ties != "midrank":
        return None
    return {int(row): calibrator.level_counts(int(row)) for row in np.unique(row_R)}


def _require_known(store: RolloutStore, logprobs_too: bool) -> None:
    """Raise InputError where the store lacks what only the reference's tokens and probabilities can tell."""
    table = store.table(["token_ids", "logprob"])
    for column, what in (("token_ids", "token ids"), ("logprob", "log-probability under the reference")):
        if table[column].null_count and (column == "token_ids" or logprobs_too):
            raise InputError(
                f"{table[column].null_count} rollouts have no {what}",
                where=str(store.path),
                hint="infalign.rollouts.fill.compute_logprobs computes, once, what a server did not give",
            )


def log_weights(pool: RolloutPool, transform: RewardTransform | SelfConsistentTransform, beta: float) -> Float:
    """Log of exp(Φ_K(b)/β)/Z in nats (M6, M17): what log π − log p is at the optimum of M2, shape (R,).

    Args:
        pool: R ranked rollouts.
        transform: Φ; a self-consistent one at its present estimate of the policy on each prompt.
        beta: KL coefficient, in units of Φ per nat.
    """
    following = follower_of(transform)
    if following is not None:
        return _log_weights_of_prompts(pool, following, beta)
    assert isinstance(transform, RewardTransform), "it does not follow"
    out_R = np.empty(len(pool))
    for num_ref in np.unique(pool.num_ref_R):
        of_K = pool.num_ref_R == num_ref
        table = tilt_by_rank(transform, beta, int(num_ref))
        out_R[of_K] = tilt_at_ranks(table, 1.0, pool.ranks_R[of_K], pool.ties_R[of_K]) - log_partition(table)
    return out_R


def _log_weights_of_prompts(pool: RolloutPool, transform: SelfConsistentTransform, beta: float) -> Float:
    out_R = np.empty(len(pool))
    first_R = np.rint(pool.ranks_R - pool.ties_R / 2).astype(np.int64)
    row_R = np.full(len(pool), -1) if pool.row_R is None else pool.row_R
    for row, compared_with in np.unique(np.stack([row_R, pool.num_ref_R]), axis=1).T.tolist():
        these = (row_R == row) & (pool.num_ref_R == compared_with)
        levels = None if pool.level_counts is None else pool.level_counts[row]
        num_ref = compared_with if levels is None else int(levels.sum())
        # Left out of its own comparison, a stored rollout is still one of the references of its level.
        ties = pool.ties_R[these] + (num_ref - compared_with)
        reward = transform.reward(num_ref, row if row >= 0 else None, levels)
        table = tilt_of_reward(reward, beta)
        out_R[these] = table.at(first_R[these], ties) - table.log_partition
    return out_R
