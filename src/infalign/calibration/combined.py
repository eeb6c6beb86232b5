"""Several rewards as one: each on its own quantile scale, their weighted mean calibrated again.

Raw scales cannot be added: a weight would mean another thing for every reward and every prompt. Quantiles can. Their
weighted mean is no longer uniform under the reference, so it is ranked once more; the result is a calibrated reward
like any other, with the same transforms, the same finite-K normaliser (M6) and the same theory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign._io.files import write_json
from infalign.calibration.calibrator import (
    FloatArray,
    IntArray,
    RewardCalibrator,
    Ties,
    ranks_and_ties_left,
    resolve_ties,
)
from infalign.errors import InputError, StorageError

_CHUNK = 1 << 22  # numbers held at once while ranking


class CombinedCalibrator:
    """Quantiles of a weighted mean of M rewards' quantiles, under the reference, prompt by prompt.

    A response is judged together with its prompt's K references as one pool of K + 1, each reward ranking that pool.
    Under the reference the pool's members are exchangeable, so the response's rank in it is exactly uniform, as M6
    needs; ranking references among themselves and a newcomer among all of them would not be.

    Args:
        weights: M positive numbers; only their proportions matter.
        ties: What equal combined scores count, as in `RewardCalibrator`; within one reward ties count one half.
        seed: Seed of the lots drawn with `ties="random"`.

    Example:
        >>> ref_rewards_PKM = [[[0.0, 9.0], [1.0, 8.0], [2.0, 10.0]]]  # one prompt, three references, two rewards
        >>> CombinedCalibrator([1, 1]).fit(ref_rewards_PKM).calibrate([[[1.5, 9.5]]])
        array([[0.66666667]])
    """

    def __init__(self, weights: Sequence[float], ties: Ties = "midrank", *, seed: int = 0) -> None:
        given = np.asarray(weights, dtype=np.float64)
        if given.ndim != 1 or not given.size or not np.isfinite(given).all() or given.min() <= 0:
            raise InputError(f"weights must be positive numbers, one per reward, not {weights}", where="weights")
        self.weights: FloatArray = given / given.sum()
        self.calibrators = [RewardCalibrator(seed=seed) for _ in given]
        self.ties: Ties = RewardCalibrator(ties).ties
        self.seed = seed
        self._rng = np.random.default_rng(seed)

    def fit(self, ref_rewards_PKM: ArrayLike, *, mask_PK: ArrayLike | None = None) -> CombinedCalibrator:
        """Store the references' rewards.

        Args:
            ref_rewards_PKM: M rewards of K reference responses per prompt, shape (P, K, M).
            mask_PK: True where a response counts, shape (P, K): one that some reward could not score does not.

        Raises:
            InputError: As for `RewardCalibrator.fit`, or there is not one weight per reward.
        """
        rewards_PKM = np.asarray(ref_rewards_PKM, dtype=np.float64)
        if rewards_PKM.ndim != 3 or rewards_PKM.shape[2] != self.weights.size:
            raise InputError(
                f"reference rewards have shape {rewards_PKM.shape} for {self.weights.size} weights",
                where="ref_rewards_PKM",
                hint="Give shape (P, K, M): prompts, references per prompt, rewards",
            )
        for m, calibrator in enumerate(self.calibrators):
            calibrator.fit(rewards_PKM[:, :, m], mask_PK=mask_PK)
        self._prepare()
        return self

    def _prepare(self) -> None:
        """Lay out each prompt's references side by side, and how each ranks among the others of its prompt."""
        num_ref_P = self.num_ref_P
        self._valid_PK: NDArray[np.bool_] = np.arange(num_ref_P.max())[None, :] < num_ref_P[:, None]
        shape = (*self._valid_PK.shape, self.weights.size)
        self._refs_PKM, self._ranks_PKM = np.full(shape, np.nan), np.full(shape, np.nan)
        prompt_R = np.repeat(np.arange(num_ref_P.size), num_ref_P)
        for m, calibrator in enumerate(self.calibrators):
            refs = calibrator.ref_rewards_PK
            flat = np.concatenate([np.ravel(row) for row in refs]) if isinstance(refs, list) else refs.ravel()
            self._refs_PKM[:, :, m][self._valid_PK] = flat
            # Compared with all of its prompt, a reference ties with itself: half a rank too many.
            self._ranks_PKM[:, :, m][self._valid_PK] = calibrator.ranks(flat, prompt_index=prompt_R) - 0.5

    @property
    def num_prompts(self) -> int:
        """P, the number of prompts fitted."""
        return self.calibrators[0].num_prompts

    @property
    def num_ref_P(self) -> IntArray:  # noqa: N802
        """K of each prompt, shape (P,)."""
        return self.calibrators[0].num_ref_P

    def ranks(self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None) -> FloatArray:
        """Ranks b in 0..K of combined scores among the references'.

        Args:
            rewards: M rewards of each response: shape (P, G, M), row p of prompt p; or (…, M) with `prompt_index`.
            prompt_index: Which fitted prompt each response belongs to, shape (…).

        Returns:
            Shape (P, G) or (…).

        Raises:
            InputError: A reward is NaN or infinite, or the shapes or indices do not fit.
        """
        below, equal, _ = self._compare(rewards, prompt_index)
        return resolve_ties(below, equal, self.ties, self._rng)

    def ranks_and_ties(
        self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None
    ) -> tuple[FloatArray, IntArray]:
        """As `ranks`, and with how many references each response ties; see `RewardCalibrator.ranks_and_ties`."""
        below, equal, _ = self._compare(rewards, prompt_index)
        return ranks_and_ties_left(below, equal, self.ties, self._rng)

    def reference_ranks_and_ties(self) -> tuple[FloatArray, IntArray]:
        """Ranks in 0..K−1 of the references themselves; see `RewardCalibrator.reference_ranks_and_ties`.

        The pool by which they are judged is the K references alone.
        """
        score_PK = _rounded(self._ranks_PKM @ self.weights)  # NaN where there is none
        below: list[IntArray] = []
        equal: list[IntArray] = []
        for row, valid in zip(score_PK, self._valid_PK, strict=True):
            scores = row[valid]
            ordered = np.sort(scores)
            below.append(np.searchsorted(ordered, scores, side="left"))
            equal.append(np.searchsorted(ordered, scores, side="right") - below[-1] - 1)
        return ranks_and_ties_left(np.concatenate(below), np.concatenate(equal), self.ties, self._rng)

    def calibrate(self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None) -> FloatArray:
        """Calibrated combined rewards in [0, 1]; arguments, shape and errors as for `ranks`."""
        below, equal, num_ref = self._compare(rewards, prompt_index)
        return resolve_ties(below, equal, self.ties, self._rng) / num_ref

    def compare(self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None) -> tuple[IntArray, IntArray]:
        """How many references have a lower, and an equal, combined score; arguments and errors as for `ranks`."""
        below, equal, _ = self._compare(rewards, prompt_index)
        return below, equal

    def resolve(self, below: IntArray, equal: IntArray) -> tuple[FloatArray, IntArray]:
        """As `RewardCalibrator.resolve`."""
        return ranks_and_ties_left(below, equal, self.ties, self._rng)

    def level_counts(self, prompt: int) -> IntArray:
        """How many references of a prompt have its lowest combined score, the next, …; they sum to K."""
        scores = _rounded(self._ranks_PKM[prompt][self._valid_PK[prompt]] @ self.weights)
        return np.unique(scores, return_counts=True)[1]

    def score(self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None) -> FloatArray:
        """The weighted mean of the M calibrated rewards itself: a score that depends on nothing but the response.

        What a procedure can choose by where these references are not among the candidates. Arguments and errors as for
        `ranks`.
        """
        scores = self._checked(rewards)
        parts = [c.calibrate(scores[..., m], prompt_index=prompt_index) for m, c in enumerate(self.calibrators)]
        return np.stack(parts, axis=-1) @ self.weights

    @property
    def tie_mass(self) -> float:
        """Chance that two references of a random prompt have equal combined scores."""
        score_PK = np.where(self._valid_PK, _rounded(self._ranks_PKM @ self.weights), np.nan)
        ordered_PK = np.sort(score_PK, axis=1)
        shares: list[float] = []
        for row, num_ref in zip(ordered_PK, self.num_ref_P, strict=True):
            _, counts = np.unique(row[:num_ref], return_counts=True)
            shares.append(float((counts * (counts - 1)).sum()) / max(num_ref * (num_ref - 1), 1))
        return float(np.mean(shares))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the M calibrators into numbered folders, and `combined.json`.

        Raises:
            StorageError: The folder cannot be written.
        """
        path = Path(folder)
        for m, calibrator in enumerate(self.calibrators):
            calibrator.save(path / str(m))
        settings = {"weights": self.weights.tolist(), "ties": self.ties, "seed": self.seed}
        write_json(path / "combined.json", settings)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> CombinedCalibrator:
        """Open a saved calibrator.

        Raises:
            StorageError: The folder holds none that this version can read.
        """
        path = Path(folder)
        try:
            settings: dict[str, Any] = json.loads((path / "combined.json").read_text(encoding="utf-8"))
            loaded = cls(settings["weights"], settings["ties"], seed=settings["seed"])
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise StorageError(f"no readable calibrator here ({error})", where=str(path),
                               hint="Fit it again; in a run folder, run the recipe again")  from error  # fmt: skip
        loaded.calibrators = [RewardCalibrator.load(path / str(m)) for m in range(loaded.weights.size)]
        loaded._prepare()
        return loaded

    # --- inside ------------------------------------------------------------------------------------------------------

    def _checked(self, rewards: ArrayLike) -> FloatArray:
        scores = np.asarray(rewards, dtype=np.float64)
        if scores.ndim < 1 or scores.shape[-1] != self.weights.size:
            raise InputError(
                f"rewards have shape {scores.shape} for {self.weights.size} weights",
                where="rewards",
                hint="Give M rewards per response, along the last axis",
            )
        return scores

    def _compare(self, rewards: ArrayLike, prompt_index: ArrayLike | None) -> tuple[IntArray, IntArray, IntArray]:
        """How many references have a lower and an equal combined score, and how many there are."""
        scores = self._checked(rewards)
        # The calibrators check what they are given, and rank the response among the references.
        own_ranks = np.stack(
            [c.ranks(scores[..., m], prompt_index=prompt_index) for m, c in enumerate(self.calibrators)], axis=-1
        )
        shape = scores.shape[:-1]
        index = np.arange(self.num_prompts).reshape((-1,) + (1,) * (len(shape) - 1)) if prompt_index is None else None
        index_B = np.broadcast_to(np.asarray(prompt_index) if index is None else index, shape).ravel()
        scores_BM, own_B = scores.reshape(-1, self.weights.size), _rounded(own_ranks @ self.weights).ravel()
        below_B, equal_B = np.empty(own_B.size, np.int64), np.empty(own_B.size, np.int64)
        step = max(1, _CHUNK // max(self._refs_PKM[0].size, 1))
        for start in range(0, own_B.size, step):
            part = slice(start, start + step)
            prompts = index_B[part]
            refs_BKM, new_B1M = self._refs_PKM[prompts], scores_BM[part, None, :]
            pool_ranks_BKM = self._ranks_PKM[prompts] + (new_B1M < refs_BKM) + 0.5 * (new_B1M == refs_BKM)
            ref_score_BK = _rounded(pool_ranks_BKM @ self.weights)  # NaN, neither below nor equal, where there is none
            below_B[part] = (ref_score_BK < own_B[part, None]).sum(axis=1)
            equal_B[part] = (ref_score_BK == own_B[part, None]).sum(axis=1)
        return below_B.reshape(shape), equal_B.reshape(shape), self.num_ref_P[index_B].reshape(shape)


def _rounded(scores: FloatArray) -> FloatArray:
    """Without the last bits, by which equal weighted sums of half-ranks differ."""
    return np.round(scores, 9)
